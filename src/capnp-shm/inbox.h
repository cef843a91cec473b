// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "large-buffer.h"
#include "memfd.h"
#include "outbox.h"
#include "ring.h"
#include "sealed.h"
#include <capnp/message.h>
#include <capnp/rpc.h>
#include <kj/function.h>
#include <kj/io.h>
#include <kj/refcount.h>
#include <mutex>

namespace capnpshm {

class MappedTotal final: public kj::AtomicRefcounted {
  // How much of the peer's memory is mapped now, whoever still reads there. Any thread, since the
  // last to read in a region may be on any.

public:
  // Relaxed throughout: these are numbers alone, by which nothing else is ordered.
  void add(size_t size) {
    bytes.fetch_add(size, std::memory_order_relaxed);
    regions.fetch_add(1, std::memory_order_relaxed);
  }
  void remove(size_t size) {
    bytes.fetch_sub(size, std::memory_order_relaxed);
    regions.fetch_sub(1, std::memory_order_relaxed);
  }
  uint64_t getBytes() const { return bytes.load(std::memory_order_relaxed); }
  uint64_t getRegions() const { return regions.load(std::memory_order_relaxed); }

private:
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint64_t> regions{0};
};

class PeerRegion final: public kj::AtomicRefcounted {
  // A region of the peer's, mapped read-only. Owned by the inbox and by every message that is read
  // in place in it.

public:
  PeerRegion(uint32_t id, Mapping&& mapping): id(id), mapping(kj::mv(mapping)) {}
  ~PeerRegion() noexcept(false) {
    KJ_IF_MAYBE(t, total) (*t)->remove(bytes().size());
  }

  const uint32_t id;
  kj::ArrayPtr<const byte> bytes() const { return mapping.bytes(); }

  void countIn(kj::Own<MappedTotal> newTotal) {
    newTotal->add(bytes().size());
    total = kj::mv(newTotal);
  }
  // As long as it is mapped. Once, before it is shared.

private:
  Mapping mapping;
  kj::Maybe<kj::Own<MappedTotal>> total;
};

struct InboxLimits {
  uint64_t traversalLimitInWords;  // Of one message.
  int nestingLimit;
  uint64_t maxBytes;               // Of all regions of the peer together.
  bool inPlace;                    // Whether to read messages where they lie.
  uint64_t sealedBytes = 0;        // Of sealed segments that are mapped at a time.
  uint furtherRegions = 32;        // Of the peer's, mapped at a time.
};

class IncomingMessage;

class Inbox final: public kj::AtomicRefcounted {
  // The peer's memory, read-only: takes messages from its descriptor ring and gives their memory
  // back. Knows no socket and no promise.
  //
  // Whatever the peer writes, the methods here do nothing worse than throw a kj::Exception of type
  // FAILED that says what was wrong; then the connection is to be closed.
  //
  // Owned by the connection and by every message read in place. Belongs to one thread, except
  // where noted.

public:
  Inbox(kj::Own<Outbox> outbox, kj::Own<PeerRegion> firstRegion, uint32_t version,
        const InboxLimits& limits, kj::Own<ForeignWake> foreignWake);
  // Checks the header of the peer's first region. `outbox` is this side's own memory, where it
  // publishes what it consumed and freed. `foreignWake` is woken when a message was released on
  // another thread, so that takeFreed() should be called.

  ~Inbox() noexcept(false);

  const RegionHeader& getPeerHeader() const;
  kj::ArrayPtr<const SharedWord> getPeerFreeRing() const { return peerFreeRing; }
  // For Outbox::start().

  bool addRegion(uint32_t id, kj::Maybe<int> fd, uint64_t bytes);
  // Maps a further region. False if it cannot be mapped, goes beyond `maxBytes` or
  // `furtherRegions`, or came without its fd; throws if it is not what the protocol demands. What
  // was retired counts until nobody reads there any more.

  bool isReady() const { return !held && ring.isReady(); }
  // Whether tryTake() may find something. Not if it waits for file descriptors.

  const SharedWord& getNextStamp() const { return ring.getNextStamp(); }
  // Which changes before isReady() does, unless file descriptors arrive. Mapped until tryTake() is
  // called.

  kj::Maybe<kj::Own<IncomingMessage>> tryTake(
      bool fdsArrived, kj::ArrayPtr<SealedFile> sealed = nullptr);
  // The next message, if it is there in whole. If file descriptors belong to it, only if
  // `fdsArrived`; otherwise it is to be tried again when they are here. `sealed` came with them.

  bool isIncomplete() const { return held || assembly != nullptr; }
  // Whether a message has begun to arrive whose rest, or whose file descriptors, are not there.

  bool publishConsumed(bool force);
  // Tells the peer how far the ring was consumed, if that is enough to be worth a cache miss on its
  // side or if `force`. True if something was published.

  bool takeFreed();
  // Whether handles were freed since the last call, or tryTake() has told of consumption, so that a
  // peer that wants room must be woken. Also frees what was released on other threads.

  void close();
  // The connection is gone: messages need not be given back any more.

  uint64_t getCopiedBytes() const { return copiedBytes; }
  uint64_t getInlineMessages() const { return inlineMessages; }
  uint64_t getInlineBytes() const { return inlineBytes; }
  uint64_t getSealedBytes() const { return sealedBytes; }

  void release(uint64_t handle);
  // A message read in place is no longer needed. Any thread.

  void onRelease(kj::Function<void()> callback);
  // What to call when a message read in place was released on the owner's thread.

private:
  struct Assembly {
    // A message that comes in parts.
    kj::Own<IncomingMessage> message;
    kj::Array<capnp::word> memory;
    size_t size;    // In words, of the message; `memory` may be larger.
    size_t filled;
  };

  kj::Own<Outbox> outbox;
  InboxLimits limits;
  kj::Own<ForeignWake> foreignWake;
  OwnerThread owner;
  kj::Vector<kj::Own<PeerRegion>> regions;
  kj::ArrayPtr<const SharedWord> peerFreeRing;
  kj::Maybe<kj::Own<PeerRegion>> ringRegion;  // Where the ring lies after a JUMP.
  DescriptorConsumer ring;
  kj::Maybe<FreeProducer> freeRing;
  uint64_t nextRegionId = 1;
  kj::Own<MappedTotal> mapped;

  Descriptor descriptor;
  bool held = false;             // `descriptor` waits for its file descriptors.
  kj::Maybe<Assembly> assembly;
  kj::Maybe<kj::Own<BufferPool>> pool;
  uint copiesBeforePool = 0;
  uint64_t messages = 0;
  uint64_t publishedPosition;
  uint64_t consumedBytes = 0;    // Of blocks, since consumption was last published.
  bool freedSomething = false;   // Or consumed, within tryTake().
  kj::Maybe<kj::Function<void()>> releaseCallback;
  bool closed = false;
  uint64_t copiedBytes = 0;
  uint64_t inlineMessages = 0;
  uint64_t inlineBytes = 0;
  uint64_t sealedBytes = 0;
  kj::Own<SealedBudget> sealedBudget;

  std::mutex foreignMutex;
  kj::Vector<uint64_t> foreignReleases;
  std::atomic<bool> foreignPending{false};

  kj::Array<capnp::word> newCopy(IncomingMessage& message, size_t words);
  PeerRegion& findRegion(uint32_t id);
  kj::ArrayPtr<const byte> resolve(const SegmentEntry& entry);
  kj::Own<IncomingMessage> takeMessage(kj::ArrayPtr<SealedFile> sealed);
  void beginAssembly();
  bool continueAssembly();
  void takeJump();
  void takeRetire();
};

class IncomingMessage final: public capnp::IncomingRpcMessage, private capnp::MessageReader {
  // A message received: either a private copy, or segments in the peer's memory, which are given
  // back when it is destroyed, on whichever thread.

public:
  explicit IncomingMessage(capnp::ReaderOptions options);
  ~IncomingMessage() noexcept(false);

  // The segments; one of these two:
  void copyInline(kj::ArrayPtr<const uint64_t> words);
  // A message that travelled in a descriptor, whose only segment is `words`; without words, a
  // message without segments. Copied into this object, so that nothing more is allocated.
  void setSegments(kj::Array<kj::ArrayPtr<const capnp::word>> segments);

  void ownCopy(kj::Array<capnp::word> memory) { copy = kj::mv(memory); }
  void returnCopyTo(kj::Own<BufferPool> newPool) { pool = kj::mv(newPool); }
  // What the segments refer to, and where it goes afterwards.
  void ownSealed(kj::Own<SealedSegment> segment) { sealed.add(kj::mv(segment)); }
  void readInPlace(kj::Own<Inbox> inbox, uint64_t handle, kj::Vector<kj::Own<PeerRegion>> regions);

  kj::ArrayPtr<const capnp::word> getFirstSegment() { return getSegment(0); }

  uint getFdCount() const { return fdCount; }
  void setFdCount(uint count) { fdCount = count; }
  void attachFds(kj::Array<kj::AutoCloseFd> fds) { this->fds = kj::mv(fds); }

  // implements IncomingRpcMessage ---------------------------------------------

  capnp::AnyPointer::Reader getBody() override { return getRoot<capnp::AnyPointer>(); }
  kj::ArrayPtr<kj::AutoCloseFd> getAttachedFds() override { return fds; }
  size_t sizeInWords() override { return words; }

private:
  kj::ArrayPtr<const kj::ArrayPtr<const capnp::word>> segments;
  size_t words = 0;
  kj::ArrayPtr<const capnp::word> inlineSegment;
  capnp::word inlineWords[MAX_BODY_WORDS];
  kj::Array<kj::ArrayPtr<const capnp::word>> ownSegments;
  kj::Array<capnp::word> copy;
  kj::Maybe<kj::Own<BufferPool>> pool;
  kj::Vector<kj::Own<SealedSegment>> sealed;
  kj::Vector<kj::Own<PeerRegion>> regions;
  kj::Maybe<kj::Own<Inbox>> inbox;
  uint64_t handle = 0;
  uint fdCount = 0;
  kj::Array<kj::AutoCloseFd> fds;

  kj::ArrayPtr<const capnp::word> getSegment(uint id) override;
};

}  // namespace capnpshm
