// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "arena.h"
#include "foreign-wake.h"
#include "memfd.h"
#include "ring.h"
#include "sealed.h"
#include <capnp/common.h>
#include <kj/debug.h>
#include <kj/mutex.h>
#include <kj/refcount.h>
#include <deque>
#include <mutex>

namespace capnpshm {

class OutgoingMessage;

class OwnerThread {
  // Remembers the thread and process in which it was made.

public:
  OwnerThread();
  bool isCurrent() const;

  bool isForked() const;
  // Whether this is a fork child of the process. There, mappings are gone, locks may be held by
  // threads that do not exist, and the socket is the parent's: nothing may be touched.

private:
  const void* thread;
  uint64_t generation;
};

class Parcel {
  // The blocks of one message in shared memory, from their allocation until both the builder is
  // destroyed and the peer has released them.

public:
  struct Use {
    Arena::Block* block;
    size_t dirtyBytes;
  };
  kj::Vector<Use> uses;
  // The builder's blocks. `dirtyBytes` is set when the builder goes.

  Arena::Block* copy = nullptr;
  size_t copiedBytes = 0;
  // A block which we filled ourselves at send(); no builder knows it.

private:
  uint32_t index = 0;
  uint32_t generation = 0;
  bool taken = false;
  bool builderAlive = false;
  bool peerHolds = false;

  friend class Outbox;
};

struct OutboxLimits {
  size_t firstRegionBytes;  // A multiple of the page size.
  size_t maxBytes;
  uint freeEntries;         // For the free ring, in which our side frees what it reads; or 0.
  size_t retiredBytes = kj::maxValue;  // At most `maxBytes` in any case.
  size_t growAtOnceBytes = 0;
  // Messages which lack no more than this, in all, may have to do without a new region; see
  // Outbox::isWorthGrowing().
};

class Outbox final: public kj::AtomicRefcounted {
  // The memory that this side writes: regions, arena, descriptor ring. Turns messages into
  // descriptors and takes memory back when the peer is done with it. Knows no socket and no
  // promise; the connection carries its announcements and wakes the peer.
  //
  // Invariants:
  // - A descriptor refers only to regions that the peer has mapped, or to the first, without which
  //   it would not read it.
  // - A quarter of the memory is kept from builders and from messages read in place, so that copies
  //   find room soon. And a small reserve is never lent to either, so that a message can go in
  //   parts as soon as the peer has consumed everything: held messages can stall nothing, not even
  //   when they took all memory before the peer refused further regions.
  // - A block is reused only when its builder is destroyed and the peer has released it.
  //
  // Owned by the connection and by every message that has memory here, so it outlives the
  // connection as long as it must. Belongs to one thread, except where noted.

public:
  Outbox(const OutboxLimits& limits, kj::Own<ForeignWake> foreignWake, uint32_t version);
  // Makes the first region, with its header. Throws if the system refuses; see createRegion().
  // `foreignWake` is woken when a builder was destroyed on another thread, so that reclaim() should
  // be called. `version` is the agreed one.

  ~Outbox() noexcept(false);

  bool isOwnerThread() const { return owner.isCurrent(); }
  // Any thread.

  // -------------------------------------------------------------------
  // Setting up

  kj::AutoCloseFd takeFirstRegionFd();
  // To be sent once; not kept here, as a peer might say that it mapped the region before it is.
  // From here on messages can be published, as far as they find room in this region alone: whoever
  // cannot map it takes none.

  RegionHeader& getHeader();
  kj::ArrayPtr<SharedWord> getFreeRing();
  // The words which this side writes as a reader; see Inbox.

  void start(const RegionHeader& peerHeader, kj::ArrayPtr<const SharedWord> peerFreeRing);
  // The peer's first region is mapped: from here on what it consumed can be used again, and there
  // may be further regions. `peerHeader` (whose `consumed` and `freed` we read) and `peerFreeRing`
  // (empty if the peer copies everything) must stay mapped until stop().

  void stop();
  // The connection is gone, and with it the peer's memory. Nothing is published any more, but
  // messages can still be built and destroyed.

  // -------------------------------------------------------------------
  // Regions

  struct Announcement {
    uint32_t id;
    size_t bytes;
    kj::AutoCloseFd fd;
  };
  kj::Maybe<Announcement> takeAnnouncement();
  // A region which the peer must be told of, if there is one that something needs and no more than
  // three announcements are unanswered. The fd goes with it: a peer might answer before it is sent.

  void regionMapped(uint32_t id);
  void regionRefused(uint32_t id);
  // The peer's answer. Throws if nothing was announced under that id.

  // -------------------------------------------------------------------
  // Building

  kj::Maybe<Arena::Block&> tryAllocate(Parcel*& parcel, size_t bytes);
  // A zeroed block for a builder, charged to `parcel`, which is made if it is null. Null if memory
  // is short: then the builder uses the heap.

  void builderGone(Parcel& parcel);
  // The builder is destroyed and `dirtyBytes` of all its uses are set. Any thread.

  bool prepare();
  // There is time: takes back what the peer has consumed, and zeroes a little of what will have to
  // be zeroed before it can be handed out again. True if there is more to do now. Throws as
  // reclaim() does.

  kj::Array<capnp::word> takeScratch(size_t words);
  void returnScratch(kj::Array<capnp::word>&& scratch, size_t dirtyWords);
  // Zeroed private memory for first segments, kept warm.

  void allowSealed(const SealedLimits& limits);
  // The peer accepts sealed segments.

  kj::Maybe<SealedSender&> getSealedSender();
  // Null as long as large segments are built like others.

  // -------------------------------------------------------------------
  // Publishing

  bool tryPublish(OutgoingMessage& message, uint fdCount);
  // Publishes a message, or as much of it as there is room for. False if (the rest of) it must
  // wait: for room, or until the peer has mapped a region. Then it must be tried again before any
  // other message.

  void sleptForRoom() { ++sleepsForRoom; }
  // This side has slept while a message waited for room or was on its way in parts.

  bool hasNews() const;
  // Whether the peer has consumed or freed something since reclaim() was last called, or another
  // thread has destroyed a builder.

  void reclaim();
  // Takes back what the peer has consumed and freed. Throws if it claims the impossible.

  uint64_t getPosition() const { return KJ_ASSERT_NONNULL(ring).getPosition(); }
  uint64_t getConsumed() const { return KJ_ASSERT_NONNULL(ring).getConsumed(); }
  // Of the descriptor ring: what is published, and what reclaim() has seen consumed.

  // -------------------------------------------------------------------
  // Figures

  struct Figures {
    uint64_t inlineMessages = 0, inlineBytes = 0;
    uint64_t referencedMessages = 0, referencedBytes = 0;
    uint64_t copiedBytes = 0;
    uint64_t sealedBytes = 0;
  };
  const Figures& getFigures() const { return figures; }
  uint getRegionCount() const;
  size_t getRegionBytes() const { return totalBytes; }
  size_t getRingBytes() const;
  size_t getRingBytesInUse() const;
  size_t getArenaBytesInUse() const { return arena.getBytesInUse(); }

private:
  struct Region {
    enum State { LOCAL, ANNOUNCED, MAPPED, REFUSED };

    uint32_t id;
    State state;
    bool awaited;       // Something waits to be published there, though it holds no block yet.
    size_t bytes;
    uint64_t lastUsed;  // Value of `published` when it was last seen in use.
    OwnRegion memory;
  };

  struct InFlight {
    // Blocks that are free once the peer has consumed the ring up to `position`.
    uint64_t position;
    Parcel* parcel;       // Of a message, or null:
    Arena::Block* block;  // Or, if null too, the reserve.
    size_t dirtyBytes;
    size_t partBytes;     // If it is a part of a message.
  };

  struct Progress {
    // Of the message that is on its way in parts.
    bool active = false;
    kj::Array<kj::ArrayPtr<const capnp::word>> segments;
    // As they were announced; whoever still has the message may make it grow meanwhile.
    uint segment = 0;
    size_t word = 0;
    size_t wordsLeft = 0;
  };

  OutboxLimits limits;
  kj::Own<ForeignWake> foreignWake;
  OwnerThread owner;
  Arena arena;
  kj::ArrayPtr<byte> reserve;
  // In region 0, for messages in parts. In flight only if nothing was when it was used.

  kj::Vector<kj::Own<Region>> regions;
  uint32_t nextRegionId = 1;
  uint unanswered = 0;
  size_t totalBytes = 0;
  size_t retiredBytes = 0;
  uint64_t unusedBeforeRetire = 4096;
  // For how many messages a region must have been unused. Doubled each time that turned out to be
  // too few, so that a load with rare bursts does not make and retire regions for ever.

  bool growthAllowed = true;
  uint64_t lastShortage = kj::maxValue;  // Value of `published` when memory was last short.
  size_t bytesShort = 0;                 // What was needed then, in all.
  uint sleepsForRoom = 0;

  kj::Maybe<kj::Exception> violation;
  // Of the protocol by the peer, found where it could not be told: a bad handle, once taken from
  // the free ring, would not be found again.

  kj::Vector<kj::Own<Parcel>> parcels;
  kj::Vector<Parcel*> spareParcels;
  kj::Vector<kj::Array<capnp::word>> scratches;
  kj::Maybe<kj::Own<SealedSender>> sealedSender;

  kj::Maybe<DescriptorProducer> ring;
  Arena::Block* ringBlock = nullptr;  // Where the ring lies; null for the first, before the arena.
  uint timesFull = 0;
  const RegionHeader* peerHeader = nullptr;
  kj::Maybe<FreeConsumer> freeRing;
  std::deque<InFlight> inFlight;
  size_t partBytesInFlight = 0;
  size_t outstandingHandles = 0;
  size_t bytesSinceReclaim = 0;
  Progress progress;
  uint64_t published = 0;
  Figures figures;

  mutable std::mutex foreignMutex;
  kj::Vector<Parcel*> foreignReleases;
  std::atomic<bool> foreignPending{false};

  Parcel& newParcel();
  void recycle(Parcel& parcel);
  void releaseIfDone(Parcel& parcel);
  void drainForeignReleases();
  Region* findRegion(uint32_t id);
  kj::Maybe<Arena::Block&> allocateOrGrow(size_t bytes, size_t neededBytes = 0);
  bool isWorthGrowing(size_t neededBytes);
  bool tryGrow(size_t bytes);
  void tryGrowRing();
  void countPublished();
  void retireUnused();
  void dropRegion(size_t index);
  void awaitRegion(Region& region, Arena::Block& block);
  bool mayHold(size_t bytes);
  bool publishInParts(OutgoingMessage& message, uint fdCount);
  void copyNextPart(kj::ArrayPtr<capnp::word> part);
  bool ringHasRoom(uint bodyWords);
};

}  // namespace capnpshm
