// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox.h"

#include "fault-point.h"
#include "huge-pages.h"
#include <string.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;
using kj::uint;

namespace {

constexpr size_t RECLAIM_INTERVAL = 8192;
constexpr size_t RESERVE_BYTES = 4096;
constexpr size_t ZEROED_AT_A_TIME = 32 * 1024;
constexpr size_t MIN_ARENA_BYTES = 1024;
constexpr size_t SHORT_MESSAGES = 8;
constexpr uint SLEEPS_FOR_ROOM = 3;
// A sleep and its wake-up for each few parts cost more than anything else.

static_assert(MAX_SEGMENTS * sizeof(word) <= RESERVE_BYTES,
    "the table of a message in parts must fit into the reserve");

size_t roundUpToPages(size_t bytes) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  return (bytes + pageSize - 1) / pageSize * pageSize;
}

void fillHeader(RegionHeader& header, const OutboxLimits& limits, uint32_t version) {
  // Relaxed, as all of this: the header is not in the region yet, and the system call that puts it
  // there orders it.
  auto set = [](SharedWord& word, uint64_t value) {
    word.store(value, std::memory_order_relaxed);
    faultPoint();
  };
  set(header.version, version);
  set(header.regionBytes, limits.firstRegionBytes);
  set(header.freeOffset, sizeof(RegionHeader));
  set(header.freeEntries, limits.freeEntries);
  set(header.ringOffset, sizeof(RegionHeader) + limits.freeEntries * sizeof(SharedWord));
  set(header.ringLines, FIRST_RING_LINES);
  // Where the peer's ring starts, so that its first look at our counter finds no surprise.
  set(header.consumed, FIRST_RING_LINES);
  set(header.magic, REGION_MAGIC);
}

const void* threadAddress() {
  // Different in all threads that live at the same time.
  static thread_local char here;
  return &here;
}

}  // namespace

OwnerThread::OwnerThread(): thread(threadAddress()), generation(forkGeneration()) {}

bool OwnerThread::isCurrent() const {
  return thread == threadAddress() && generation == forkGeneration();
}

bool OwnerThread::isForked() const { return generation != forkGeneration(); }

// =======================================================================================
// Setting up

Outbox::Outbox(const OutboxLimits& limits, kj::Own<ForeignWake> foreignWake, uint32_t version)
    : limits(limits), foreignWake(kj::mv(foreignWake)) {
  RegionHeader header {};
  fillHeader(header, limits, version);
  auto memory = createRegion(limits.firstRegionBytes,
      kj::arrayPtr(reinterpret_cast<const kj::byte*>(&header), sizeof(header)));
  auto bytes = memory.mapping.bytes();
  totalBytes = bytes.size();
  regions.add(kj::heap<Region>(
      Region { 0, Region::LOCAL, false, bytes.size(), 0, kj::mv(memory) }));

  size_t ringOffset = sizeof(RegionHeader) + limits.freeEntries * sizeof(SharedWord);
  size_t reserveOffset = ringOffset + FIRST_RING_LINES * sizeof(DescriptorLine);
  size_t arenaOffset = reserveOffset + RESERVE_BYTES;
  KJ_REQUIRE(arenaOffset + MIN_ARENA_BYTES <= bytes.size(),
      "first region is too small", bytes.size());
  ring = DescriptorProducer(kj::arrayPtr(
      reinterpret_cast<DescriptorLine*>(bytes.begin() + ringOffset), FIRST_RING_LINES));
  reserve = bytes.slice(reserveOffset, arenaOffset);
  arena.addRange(0, arenaOffset, bytes.slice(arenaOffset, bytes.size()));
}

Outbox::~Outbox() noexcept(false) {}

kj::AutoCloseFd Outbox::takeFirstRegionFd() {
  regions[0]->state = Region::MAPPED;
  return kj::mv(regions[0]->memory.fd);
}

RegionHeader& Outbox::getHeader() {
  return *reinterpret_cast<RegionHeader*>(regions[0]->memory.mapping.bytes().begin());
}

kj::ArrayPtr<SharedWord> Outbox::getFreeRing() {
  return kj::arrayPtr(reinterpret_cast<SharedWord*>(&getHeader() + 1), limits.freeEntries);
}

void Outbox::start(const RegionHeader& peer, kj::ArrayPtr<const SharedWord> peerFreeRing) {
  peerHeader = &peer;
  if (peerFreeRing.size() > 0) freeRing = FreeConsumer(peerFreeRing, peer.freed);
}

void Outbox::stop() {
  peerHeader = nullptr;
  freeRing = nullptr;
  KJ_IF_MAYBE(s, sealedSender) (*s)->stop();
}

// =======================================================================================
// Regions

Outbox::Region* Outbox::findRegion(uint32_t id) {
  for (auto& region: regions) {
    if (region->id == id) return region;
  }
  return nullptr;
}

bool Outbox::tryGrow(size_t bytes) {
  if (!growthAllowed || peerHeader == nullptr) return false;

  size_t available = limits.maxBytes - kj::min(limits.maxBytes, totalBytes);
  size_t size = roundUpToPages(bytes);
  if (size < bytes || size > available) return false;
  // Twice what is wanted, so that the next of its kind can be zeroed while the peer has this one.
  if (size <= Arena::MAX_PAIRED_BLOCK) size *= 2;
  size = kj::min(kj::max(size, roundUpToPages(totalBytes)), available / 4096 * 4096);
  if (size < bytes) return false;

  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    auto memory = createRegion(size);
    auto range = memory.mapping.bytes();
    // A larger one is in huge pages, or else too large to be mapped whole before it is needed.
    if (size < HUGE_PAGE) populatePages(range);
    uint32_t id = nextRegionId++;
    regions.add(kj::heap<Region>(Region {
        id, Region::LOCAL, false, size, published, kj::mv(memory) }));
    arena.addRange(id, 0, range);
    totalBytes += size;
    // Memory that is wanted again was given back too soon.
    if (retiredBytes > 0) unusedBeforeRetire *= 2;
  })) {
    // The system has no more memory or fds for us; what we have goes on working.
    (void)exception;
    growthAllowed = false;
    return false;
  }
  return true;
}

kj::Maybe<Outbox::Announcement> Outbox::takeAnnouncement() {
  if (unanswered >= MAX_UNANSWERED_REGIONS) return nullptr;
  // In the order of their ids, whatever order retireUnused() left them in. Not before one of them
  // is needed: a message that made the outbox grow may have been refused or dropped.
  Region* first = nullptr;
  bool needed = false;
  for (auto& region: regions) {
    if (region->state != Region::LOCAL || region->id == 0) continue;
    if (first == nullptr || region->id < first->id) first = region;
    needed = needed || region->awaited || !arena.isUnused(region->id);
  }
  if (!needed) return nullptr;
  first->state = Region::ANNOUNCED;
  ++unanswered;
  return Announcement { first->id, first->bytes, kj::mv(first->memory.fd) };
}

void Outbox::awaitRegion(Region& region, Arena::Block& block) {
  region.awaited = true;
  arena.free(block, 0);
}

void Outbox::regionMapped(uint32_t id) {
  Region* region = findRegion(id);
  KJ_REQUIRE(region != nullptr && region->state == Region::ANNOUNCED,
      "peer says it mapped a region that was not announced to it", id);
  region->state = Region::MAPPED;
  region->awaited = false;
  --unanswered;
}

void Outbox::regionRefused(uint32_t id) {
  Region* region = findRegion(id);
  KJ_REQUIRE(region != nullptr && region->state == Region::ANNOUNCED,
      "peer refuses a region that was not announced to it", id);
  region->state = Region::REFUSED;
  region->awaited = false;
  --unanswered;
  growthAllowed = false;
  arena.removeRange(id);
}

void Outbox::retireUnused() {
  for (size_t i = 1; i < regions.size(); i++) {
    auto& region = *regions[i];
    if (!arena.isUnused(region.id) || region.awaited) {
      region.lastUsed = published;
      continue;
    }
    if (region.state == Region::LOCAL && region.id + 1 == nextRegionId &&
        published - region.lastUsed >= unusedBeforeRetire) {
      // The peer has never heard of it.
      arena.removeRange(region.id);
      --nextRegionId;
      dropRegion(i);
      return;
    }
    // A peer may keep the memory of retired regions, so no more is retired than that limit.
    if ((region.state == Region::MAPPED || region.state == Region::REFUSED) &&
        published - region.lastUsed >= unusedBeforeRetire &&
        retiredBytes + region.bytes <= kj::min(limits.retiredBytes, limits.maxBytes)) {
      auto& r = KJ_ASSERT_NONNULL(ring);
      if (region.state == Region::MAPPED) {
        if (!r.hasRoom(1)) return;
        uint64_t body[] = { region.id };
        r.publish({ DescriptorKind::RETIRE, 0, 0, 0, 0 }, body);
        faultPoint();
        arena.removeRange(region.id);
      }
      retiredBytes += region.bytes;
      dropRegion(i);
      return;
    }
  }
}

void Outbox::dropRegion(size_t index) {
  totalBytes -= regions[index]->bytes;
  regions[index] = kj::mv(regions.back());
  regions.removeLast();
}

// =======================================================================================
// Building

bool Outbox::mayHold(size_t bytes) {
  // Whether memory may be given to those who can keep it as long as they like.
  size_t growth = growthAllowed ? limits.maxBytes - kj::min(limits.maxBytes, totalBytes) : 0;
  return arena.getBytesInUse() + bytes <= (arena.getCapacity() + growth) / 4 * 3;
}

kj::Maybe<Arena::Block&> Outbox::allocateOrGrow(size_t bytes, size_t neededBytes) {
  // A message needs `neededBytes`, if that is more, of which these are a part.
  KJ_IF_MAYBE(block, arena.tryAllocate(bytes)) return *block;
  if (!isWorthGrowing(kj::max(bytes, neededBytes)) || !tryGrow(bytes)) return nullptr;
  return arena.tryAllocate(bytes);
}

bool Outbox::isWorthGrowing(size_t neededBytes) {
  // Whether to make a region for a message that needs so much. For each page of it both sides have
  // a page fault, so that it costs about as much as SHORT_MESSAGES messages lose which are copied
  // in parts through the few pages that are warm already. So the first few are; as in the ski
  // rental problem, what that costs in all is at most twice the best that could be done, whatever
  // follows.
  if (sleepsForRoom >= SLEEPS_FOR_ROOM) return true;
  if (lastShortage != published) {
    // Once for each message, which asks again and again.
    lastShortage = published;
    bytesShort += neededBytes;
  }
  return bytesShort > kj::min(neededBytes * SHORT_MESSAGES, limits.growAtOnceBytes);
}

Parcel& Outbox::newParcel() {
  Parcel* result;
  if (spareParcels.size() > 0) {
    result = spareParcels.back();
    spareParcels.removeLast();
  } else {
    auto own = kj::heap<Parcel>();
    own->index = parcels.size();
    result = own;
    parcels.add(kj::mv(own));
  }
  result->taken = true;
  return *result;
}

void Outbox::recycle(Parcel& parcel) {
  parcel.uses.resize(0);
  parcel.copy = nullptr;
  parcel.copiedBytes = 0;
  parcel.builderAlive = parcel.peerHolds = parcel.taken = false;
  ++parcel.generation;
  spareParcels.add(&parcel);
}

kj::Maybe<Arena::Block&> Outbox::tryAllocate(Parcel*& parcel, size_t bytes) {
  bytesSinceReclaim += bytes;
  if (bytesSinceReclaim >= RECLAIM_INTERVAL || !mayHold(bytes)) {
    // Reuse warm memory rather than cold. If the peer claims the impossible the connection will
    // hear of it when it looks next; this is not the place to tell it.
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() { reclaim(); })) {
      violation = kj::mv(*exception);
    }
  }
  if (!mayHold(bytes)) return nullptr;
  KJ_IF_MAYBE(block, allocateOrGrow(bytes)) {
    if (parcel == nullptr) {
      parcel = &newParcel();
      parcel->builderAlive = true;
    }
    parcel->uses.add(Parcel::Use { block, 0 });
    return *block;
  }
  return nullptr;
}

void Outbox::releaseIfDone(Parcel& parcel) {
  if (parcel.peerHolds) return;
  if (parcel.copy != nullptr) {
    arena.free(*parcel.copy, parcel.copiedBytes);
    parcel.copy = nullptr;
  }
  if (parcel.builderAlive) return;
  for (auto& use: parcel.uses) arena.free(*use.block, use.dirtyBytes);
  recycle(parcel);
}

void Outbox::builderGone(Parcel& parcel) {
  if (owner.isCurrent()) {
    parcel.builderAlive = false;
    releaseIfDone(parcel);
  } else if (!owner.isForked()) {
    {
      std::lock_guard<std::mutex> lock(foreignMutex);
      foreignReleases.add(&parcel);
      // Relaxed: only a hint; the mutex orders the list itself.
      foreignPending.store(true, std::memory_order_relaxed);
    }
    foreignWake->wake();
  }
}

void Outbox::drainForeignReleases() {
  // Relaxed: whoever set it wakes us through ForeignWake, whose mutex orders it.
  if (!foreignPending.load(std::memory_order_relaxed)) return;
  kj::Vector<Parcel*> list;
  {
    std::lock_guard<std::mutex> lock(foreignMutex);
    list = kj::mv(foreignReleases);
    foreignReleases = kj::Vector<Parcel*>();
    foreignPending.store(false, std::memory_order_relaxed);
  }
  for (auto parcel: list) {
    parcel->builderAlive = false;
    releaseIfDone(*parcel);
  }
}

bool Outbox::prepare() {
  // Small blocks are not worth a look at the peer's counters.
  uint large = arena.getLargeBlocksInUse();
  if (ringBlock != nullptr && ringBlock->bytes().size() >= Arena::LARGE_BLOCK) --large;
  if (large > 0 && hasNews()) reclaim();
  return arena.zeroSome(ZEROED_AT_A_TIME);
}

kj::Array<word> Outbox::takeScratch(size_t words) {
  if (scratches.size() > 0) {
    auto result = kj::mv(scratches.back());
    scratches.removeLast();
    return result;
  }
  auto result = kj::heapArray<word>(words);
  memset(result.begin(), 0, words * sizeof(word));
  return result;
}

void Outbox::allowSealed(const SealedLimits& limits) {
  sealedSender = kj::heap<SealedSender>(limits);
}

kj::Maybe<SealedSender&> Outbox::getSealedSender() {
  KJ_IF_MAYBE(s, sealedSender) return **s;
  return nullptr;
}

void Outbox::returnScratch(kj::Array<word>&& scratch, size_t dirtyWords) {
  if (scratches.size() >= 16) return;
  memset(scratch.begin(), 0, dirtyWords * sizeof(word));
  scratches.add(kj::mv(scratch));
}

// =======================================================================================
// Taking back

bool Outbox::hasNews() const {
  if (peerHeader == nullptr) return false;
  if (violation != nullptr || foreignPending.load(std::memory_order_relaxed)) return true;
  // Acquire: pairs with the release store in Inbox::publishConsumed(), as in reclaim().
  if (peerHeader->consumed.load(std::memory_order_acquire) !=
      KJ_ASSERT_NONNULL(ring).getConsumed()) {
    return true;
  }
  KJ_IF_MAYBE(f, freeRing) return f->isReady();
  return false;
}

void Outbox::reclaim() {
  bytesSinceReclaim = 0;
  drainForeignReleases();
  if (peerHeader == nullptr) return;
  KJ_IF_MAYBE(exception, violation) kj::throwFatalException(kj::cp(*exception));

  auto& r = KJ_ASSERT_NONNULL(ring);
  // Acquire: pairs with the release store in Inbox::publishConsumed(). The peer's reads of the
  // lines and of the blocks it copied happened before, so we may write them again.
  r.updateConsumed(peerHeader->consumed.load(std::memory_order_acquire));
  while (!inFlight.empty() && inFlight.front().position <= r.getConsumed()) {
    auto& front = inFlight.front();
    if (front.parcel != nullptr) {
      front.parcel->peerHolds = false;
      releaseIfDone(*front.parcel);
    } else if (front.block != nullptr) {
      arena.free(*front.block, front.dirtyBytes);
    }
    partBytesInFlight -= front.partBytes;
    inFlight.pop_front();
  }

  KJ_IF_MAYBE(f, freeRing) {
    for (;;) {
      KJ_IF_MAYBE(handle, f->tryPop(outstandingHandles)) {
        uint32_t index = *handle;
        uint32_t generation = *handle >> 32;
        KJ_REQUIRE(index < parcels.size() && parcels[index]->taken &&
                   parcels[index]->peerHolds && parcels[index]->generation == generation,
            "peer freed a message that it does not hold", index, generation);
        auto& parcel = *parcels[index];
        parcel.peerHolds = false;
        --outstandingHandles;
        releaseIfDone(parcel);
      } else {
        break;
      }
    }
  }
}

// =======================================================================================
// Figures

uint Outbox::getRegionCount() const { return regions.size(); }

size_t Outbox::getRingBytes() const {
  return KJ_ASSERT_NONNULL(ring).getLineCount() * sizeof(DescriptorLine);
}

size_t Outbox::getRingBytesInUse() const {
  auto& r = KJ_ASSERT_NONNULL(ring);
  return (r.getPosition() - r.getConsumed()) * sizeof(DescriptorLine);
}

}  // namespace capnpshm
