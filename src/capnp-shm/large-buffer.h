// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <capnp/common.h>
#include <kj/array.h>
#include <kj/refcount.h>
#include <kj/vector.h>
#include <mutex>

namespace capnpshm {

constexpr size_t LARGE_BUFFER_WORDS = (1 << 20) / sizeof(capnp::word);
// From 1 MiB on, fresh memory costs more than what is done with it: a page fault for each page. Who
// needs such memory again and again should keep it, in huge pages; see BufferPool.

constexpr size_t MAX_MALLOC_WORDS = (32 << 20) / sizeof(capnp::word);
// What is smaller and needed a few times only is likely to be warm already if it comes from
// malloc(), which has it from the last message, or the last connection. What is larger glibc maps
// and unmaps each time.

kj::Array<capnp::word> newZeroedBuffer(size_t words);
// Private memory of zeros, from MAX_MALLOC_WORDS on in huge pages where the system lends them.
// Pages that nobody touches cost nothing, if they are new. Any thread.

class BufferPool final: public kj::AtomicRefcounted {
  // Large private buffers that messages were copied to, kept for the next messages of their size
  // while they are warm.
  //
  // Invariant: keeps no more than `limitBytes`, and nothing that was not used for a while.
  //
  // Owned by the inbox and by each message that has a buffer of it. Any thread.

public:
  explicit BufferPool(size_t limitBytes): limitBytes(limitBytes) {}

  kj::Array<capnp::word> take(size_t words);
  // At least so many words, at least LARGE_BUFFER_WORDS, of whatever was in them.

  void giveBack(kj::Array<capnp::word>&& buffer);

  void passed(uint64_t messages);
  // So many messages were received since the connection began; drops what was not used lately.

  size_t getKeptBytes() const;

private:
  struct Kept {
    kj::Array<capnp::word> buffer;
    uint64_t since;  // The number of messages when it was given back.
  };

  const size_t limitBytes;
  mutable std::mutex mutex;
  kj::Vector<Kept> kept;   // The oldest first.
  size_t keptBytes = 0;
  uint64_t messages = 0;

  void drop(size_t index);
};

}  // namespace capnpshm
