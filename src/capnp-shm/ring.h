// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "layout.h"
#include <kj/array.h>
#include <kj/common.h>

namespace capnpshm {

// Lock-free single-producer single-consumer rings between two processes that need not trust each
// other. No I/O, no promises, no ownership of memory: the rings work on spans that the caller
// keeps mapped. Each object belongs to one thread at a time.

void fullFence();
// A sequentially consistent fence: stores before it are visible before loads after it are made.
// Under ThreadSanitizer, which does not understand fences, a read-modify-write stands in for it.

class DescriptorProducer {
  // The sending end of a descriptor ring, in the sender's own memory.
  //
  // Invariants: `consumed <= position <= consumed + lines.size()`. Lines in [consumed, position)
  // belong to the reader, the others to us. One line is kept in reserve for a JUMP.

public:
  explicit DescriptorProducer(kj::ArrayPtr<DescriptorLine> lines);
  // `lines` must be zeroed, its size a power of two of at least 2 * MAX_DESCRIPTOR_LINES.

  DescriptorProducer(kj::ArrayPtr<DescriptorLine> lines, uint64_t firstPosition);
  // Starts at a later position, which must be a multiple of the ring's size; for tests.

  bool hasRoom(uint lineCount) const {
    return position + lineCount + 1 <= consumed + lines.size();
  }

  void updateConsumed(uint64_t peerConsumed);
  // Takes over what the peer says it has consumed. Throws if the value goes backwards or beyond
  // what was published.

  void publish(DescriptorHead head, kj::ArrayPtr<const uint64_t> body);
  // Writes a descriptor and makes it visible. `head.lines` is computed here. The caller has asked
  // hasRoom(linesForBody(body.size())).

  void jump(SegmentEntry target, kj::ArrayPtr<DescriptorLine> newLines);
  // Publishes JUMP to `target`, where `newLines` (zeroed, larger than the present ring) lies, and
  // goes on there.

  uint64_t getPosition() const { return position; }
  // Of the next line to be written: everything before it is published.

  uint64_t getConsumed() const { return consumed; }
  size_t getLineCount() const { return lines.size(); }

private:
  kj::ArrayPtr<DescriptorLine> lines;
  uint64_t position;
  uint64_t consumed;

  DescriptorLine& line(uint64_t pos) { return lines[pos & (lines.size() - 1)]; }
  void write(DescriptorHead head, kj::ArrayPtr<const uint64_t> body);
};

struct Descriptor {
  // A descriptor copied into private memory and validated as far as that is possible without
  // knowing the regions.

  DescriptorHead head;
  uint bodyWords;      // What `head.lines` can hold; the rest of the last line is padding.
  uint64_t body[MAX_BODY_WORDS];
};

class DescriptorConsumer {
  // The receiving end of a descriptor ring, which lies in the peer's memory. Every word is loaded
  // once, atomically, into private memory, then validated, then used.
  //
  // Invariant: `position` is the first line not yet taken.

public:
  explicit DescriptorConsumer(kj::ArrayPtr<const DescriptorLine> lines);
  // The size of `lines` is a power of two of at least 2 * MAX_DESCRIPTOR_LINES.

  DescriptorConsumer(kj::ArrayPtr<const DescriptorLine> lines, uint64_t firstPosition);
  // Starts at a later position, as the producer did; for tests.

  bool isReady() const {
    // Whether a descriptor can be taken, or the ring is broken, which tryTake() will tell.
    //
    // Acquire: pairs with the release store of the head's stamp in DescriptorProducer::write(), so
    // that the body and all payload written before it are visible too.
    uint64_t stamp = line(position).stamp.load(std::memory_order_acquire);
    return stamp == headStamp(position) || (stamp >> 2) >= position;
  }

  const SharedWord& getNextStamp() const { return line(position).stamp; }
  // Which changes before isReady() does.

  bool tryTake(Descriptor& descriptor);
  // Copies out the next descriptor, if there is one. Throws if the peer wrote a stamp or a head
  // that cannot be.

  void jump(kj::ArrayPtr<const DescriptorLine> newLines);
  // Goes on in `newLines`, after a JUMP was taken.

  uint64_t getPosition() const { return position; }
  size_t getLineCount() const { return lines.size(); }

private:
  kj::ArrayPtr<const DescriptorLine> lines;
  uint64_t position;

  const DescriptorLine& line(uint64_t pos) const { return lines[pos & (lines.size() - 1)]; }
};

class FreeProducer {
  // The end of a free ring on which the reader of messages gives back handles; it lies in that
  // reader's own memory. The sender never has more handles outstanding than the ring has entries,
  // so there is always room.

public:
  FreeProducer(kj::ArrayPtr<SharedWord> entries, SharedWord& freed);

  void push(uint64_t handle);

private:
  kj::ArrayPtr<SharedWord> entries;
  SharedWord& freed;
  uint64_t count = 0;
};

class FreeConsumer {
  // The end on which the sender learns what was freed; it lies in the peer's memory.

public:
  FreeConsumer(kj::ArrayPtr<const SharedWord> entries, const SharedWord& freed);

  bool isReady() const {
    // Acquire: pairs with the release store in FreeProducer::push(); the peer's reads of the block
    // happened before it, so the block may be written again.
    return freed.load(std::memory_order_acquire) != count;
  }

  kj::Maybe<uint64_t> tryPop(uint64_t outstanding);
  // The next freed handle. Throws if the peer's counter went backwards or says that more than
  // `outstanding` handles were freed. Whether the handle itself is outstanding is the caller's to
  // check.

  size_t getCapacity() const { return entries.size(); }

private:
  kj::ArrayPtr<const SharedWord> entries;
  const SharedWord& freed;
  uint64_t count = 0;
};

}  // namespace capnpshm
