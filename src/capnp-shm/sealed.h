// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "layout.h"
#include "memfd.h"
#include <capnp/common.h>
#include <kj/refcount.h>
#include <kj/vector.h>
#include <atomic>

namespace capnpshm {

// Sealed segments: large segments that even a peer which does not trust us can read in place. Each
// has a memfd of its own, and before the peer gets it, nobody can write it any more.

// ---------------------------------------------------------------------------------------
// Sending

class SealedSender;

class SealedBuffer {
  // A segment that is built in a memfd of its own.
  //
  // Invariant: `bytes()` stays readable and writable at the same address until the destructor,
  // also after it was sealed; what is written then stays private.

public:
  SealedBuffer(SealedSender& sender, kj::AutoCloseFd fd, Mapping mapping)
      : sender(sender), fd(kj::mv(fd)), mapping(kj::mv(mapping)) {}
  ~SealedBuffer() noexcept(false);
  // Any thread.
  KJ_DISALLOW_COPY(SealedBuffer);

  kj::ArrayPtr<byte> bytes() const { return mapping.bytes(); }

  bool trySeal();
  // Makes the file immutable. False if the system refuses, because something of ours still could
  // write it: a pinned page, another mapping. That can take a fifth of a second. The contents are
  // still there then.

  kj::AutoCloseFd takeFd();
  // What to send to the peer.

private:
  SealedSender& sender;
  kj::AutoCloseFd fd;
  Mapping mapping;
};

struct SealedLimits {
  size_t thresholdBytes;   // Smaller segments are not worth it.
  uint64_t largestBytes;   // Larger ones the peer would not map.
  uint64_t totalBytes;     // Of all that the peer is ever given, since it may keep them.
};

class SealedSender {
  // Decides, for a connection, which segments are built to be sealed. Belongs to the thread of the
  // connection, except where buffers are destroyed; must outlive them.

public:
  explicit SealedSender(const SealedLimits& limits): limits(limits) {}
  KJ_DISALLOW_COPY(SealedSender);

  kj::Maybe<kj::Own<SealedBuffer>> tryCreate(size_t bytes);
  // Zeroed memory for a segment of at least `bytes`. Null if that is too small or too large, if
  // the peer has been given as much as it may, if too many files are open for it already, or if
  // the system refuses.

  bool trySeal(SealedBuffer& buffer, size_t usedBytes);
  // Seals a segment of which so much is used, to be given to the peer. False if it is to be copied
  // instead.

  void stop() { stopped = true; }
  // From here on segments are built and sent without this.

private:
  SealedLimits limits;
  uint64_t givenBytes = 0;
  bool stopped = false;
  std::atomic<uint> openFiles{0};
  // Of buffers whose fd was not taken.

  friend class SealedBuffer;
};

class SealedSegments {
  // Those of one message being built.

public:
  kj::ArrayPtr<capnp::word> tryAllocate(SealedSender& sender, size_t bytes);
  // Empty if the segment is to be built otherwise.

  uint countSealable() const { return kj::min(buffers.size(), size_t(MAX_SEALED_SEGMENTS)); }
  // How many may be sealed, at most.

  struct File {
    kj::AutoCloseFd fd;
    uint64_t bytes;
  };
  kj::Vector<File> seal(kj::ArrayPtr<const kj::ArrayPtr<const capnp::word>> segments);
  // Seals what can and should be, once and for all. What is returned is sent to the peer in this
  // order; all other segments are copied.

  uint countSealed() const { return sealed.size(); }
  kj::Maybe<uint32_t> find(const capnp::word* segment) const;
  // Under which number (SegmentEntry::region) a segment was sealed, if it was.

private:
  kj::Maybe<SealedSender&> sender;
  kj::Vector<kj::Own<SealedBuffer>> buffers;
  kj::Vector<const capnp::word*> sealed;
};

// ---------------------------------------------------------------------------------------
// Receiving

struct SealedFile {
  // What came of the peer for one sealed segment. Nothing about it is trusted.

  kj::AutoCloseFd fd;  // Null if it got lost.
  uint64_t bytes;
  bool claimed = false;
};

void claimSealed(kj::ArrayPtr<SealedFile> files, const SegmentEntry& entry);
// Throws if the entry does not refer to one of these files, or if another one did already.

class SealedBudget;

class SealedSegment {
  // A sealed segment in a message that was received: mapped, or copied.

public:
  SealedSegment(kj::Own<SealedBudget> budget, Mapping mapping, size_t words);
  SealedSegment(kj::Array<capnp::word> copy): copy(kj::mv(copy)), words(this->copy) {}
  ~SealedSegment() noexcept(false);
  // Any thread.
  KJ_DISALLOW_COPY(SealedSegment);

  kj::ArrayPtr<const capnp::word> getWords() const { return words; }
  bool isCopied() const { return mapping == nullptr; }

private:
  kj::Maybe<kj::Own<SealedBudget>> budget;
  kj::Maybe<Mapping> mapping;
  kj::Array<capnp::word> copy;
  kj::ArrayPtr<const capnp::word> words;
};

class SealedBudget final: public kj::AtomicRefcounted {
  // How much a connection may have mapped of the peer's sealed segments. Owned by it and by every
  // segment that is mapped.

public:
  explicit SealedBudget(uint64_t maxBytes): maxBytes(maxBytes) {}

  kj::Own<SealedSegment> open(SealedFile& file, size_t words);
  // The first `words` words of a sealed segment; mapped if the budget and the system allow that,
  // else copied. Throws FAILED if the file is not what the protocol demands.

private:
  const uint64_t maxBytes;
  std::atomic<uint64_t> mappedBytes{0};

  friend class SealedSegment;
};

}  // namespace capnpshm
