// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox.h"

#include "message.h"
#include <string.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;
using kj::uint;

namespace {

constexpr uint INITIAL_RING_LINES = 64;
constexpr uint MAX_RING_LINES = 8192;
constexpr uint MAX_INLINE_WORDS = 20;
constexpr uint TIMES_FULL_BEFORE_GROWTH = 4;
constexpr uint MAX_UNANSWERED = 4;
constexpr uint64_t UNUSED_BEFORE_RETIRE = 4096;  // Messages.

static_assert(bodyCapacity(3) == MAX_INLINE_WORDS, "three lines hold the longest inline message");

size_t roundUpToPages(size_t bytes) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  return (bytes + pageSize - 1) / pageSize * pageSize;
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

// =======================================================================================
// Setting up

Outbox::Outbox(const OutboxLimits& limits): limits(limits) {
  auto memory = createRegion(limits.firstRegionBytes);
  auto bytes = memory.mapping.bytes();
  totalBytes = bytes.size();
  regions.add(kj::heap<Region>(
      Region { 0, Region::LOCAL, bytes.size(), 0, kj::mv(memory) }));

  size_t ringOffset = sizeof(RegionHeader) + limits.freeEntries * sizeof(SharedWord);
  size_t arenaOffset = ringOffset + INITIAL_RING_LINES * sizeof(DescriptorLine);
  KJ_REQUIRE(arenaOffset + 4096 <= bytes.size(), "first region is too small", bytes.size());
  ring = DescriptorProducer(kj::arrayPtr(
      reinterpret_cast<DescriptorLine*>(bytes.begin() + ringOffset), INITIAL_RING_LINES));
  arena.addRange(0, arenaOffset, bytes.slice(arenaOffset, bytes.size()));
}

Outbox::~Outbox() noexcept(false) {}

int Outbox::getFirstRegionFd() const { return regions[0]->memory.fd; }
size_t Outbox::getFirstRegionBytes() const { return regions[0]->bytes; }

RegionHeader& Outbox::getHeader() {
  return *reinterpret_cast<RegionHeader*>(regions[0]->memory.mapping.bytes().begin());
}

kj::ArrayPtr<SharedWord> Outbox::getFreeRing() {
  return kj::arrayPtr(reinterpret_cast<SharedWord*>(&getHeader() + 1), limits.freeEntries);
}

void Outbox::writeHeader(uint32_t version) {
  auto& header = getHeader();
  // Relaxed: published by the release store of the magic.
  auto set = [](SharedWord& word, uint64_t value) {
    word.store(value, std::memory_order_relaxed);
  };
  set(header.version, version);
  set(header.regionBytes, regions[0]->bytes);
  set(header.freeOffset, sizeof(RegionHeader));
  set(header.freeEntries, limits.freeEntries);
  set(header.ringOffset, sizeof(RegionHeader) + limits.freeEntries * sizeof(SharedWord));
  set(header.ringLines, INITIAL_RING_LINES);
  // Where the peer's ring starts, so that its first look at our counter finds no surprise.
  set(header.consumed, INITIAL_RING_LINES);
  // Release: pairs with the acquire load in Inbox's constructor.
  header.magic.store(REGION_MAGIC, std::memory_order_release);
}

void Outbox::start(const RegionHeader& peer, kj::ArrayPtr<const SharedWord> peerFreeRing) {
  peerHeader = &peer;
  if (peerFreeRing.size() > 0) freeRing = FreeConsumer(peerFreeRing, peer.freed);
  regions[0]->state = Region::MAPPED;
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
  size = kj::min(kj::max(size, roundUpToPages(totalBytes)), available / 4096 * 4096);
  if (size < bytes) return false;

  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    auto memory = createRegion(size);
    auto range = memory.mapping.bytes();
    uint32_t id = nextRegionId++;
    regions.add(kj::heap<Region>(Region { id, Region::LOCAL, size, published, kj::mv(memory) }));
    arena.addRange(id, 0, range);
    totalBytes += size;
  })) {
    // The system has no more memory or fds for us; what we have goes on working.
    (void)exception;
    growthAllowed = false;
    return false;
  }
  return true;
}

kj::Maybe<Outbox::Announcement> Outbox::takeAnnouncement() {
  if (unanswered >= MAX_UNANSWERED) return nullptr;
  for (auto& region: regions) {
    if (region->state == Region::LOCAL && region->id != 0) {
      region->state = Region::ANNOUNCED;
      ++unanswered;
      return Announcement { region->id, region->bytes, region->memory.fd.get() };
    }
  }
  return nullptr;
}

void Outbox::regionMapped(uint32_t id) {
  Region* region = findRegion(id);
  KJ_REQUIRE(region != nullptr && region->state == Region::ANNOUNCED,
      "peer says it mapped a region that was not announced to it", id);
  region->state = Region::MAPPED;
  --unanswered;
}

void Outbox::regionRefused(uint32_t id) {
  Region* region = findRegion(id);
  KJ_REQUIRE(region != nullptr && region->state == Region::ANNOUNCED,
      "peer refuses a region that was not announced to it", id);
  region->state = Region::REFUSED;
  --unanswered;
  growthAllowed = false;
  arena.removeRange(id);
}

void Outbox::retireUnused() {
  for (size_t i = 1; i < regions.size(); i++) {
    auto& region = *regions[i];
    if (!arena.isUnused(region.id)) {
      region.lastUsed = published;
    // A peer may keep the fds of retired regions, so no more is retired than the limit itself.
    } else if ((region.state == Region::MAPPED || region.state == Region::REFUSED) &&
               published - region.lastUsed >= UNUSED_BEFORE_RETIRE &&
               retiredBytes + region.bytes <= limits.maxBytes) {
      auto& r = KJ_ASSERT_NONNULL(ring);
      if (region.state == Region::MAPPED) {
        if (!r.hasRoom(1)) return;
        uint64_t body[] = { region.id };
        r.publish({ DescriptorKind::RETIRE, 0, 0, 0, 0 }, body);
        arena.removeRange(region.id);
      }
      retiredBytes += region.bytes;
      totalBytes -= region.bytes;
      regions[i] = kj::mv(regions.back());
      regions.removeLast();
      return;
    }
  }
}

// =======================================================================================
// Building

bool Outbox::mayHold(size_t bytes) {
  // Whether memory may be given to those who can keep it as long as they like.
  return arena.getBytesInUse() + bytes <= limits.maxBytes / 4 * 3;
}

kj::Maybe<Arena::Block&> Outbox::allocateOrGrow(size_t bytes) {
  KJ_IF_MAYBE(block, arena.tryAllocate(bytes)) return *block;
  if (!tryGrow(bytes)) return nullptr;
  return arena.tryAllocate(bytes);
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
  } else {
    std::lock_guard<std::mutex> lock(foreignMutex);
    foreignReleases.add(&parcel);
    // Relaxed: only a hint; the mutex orders the list itself.
    foreignPending.store(true, std::memory_order_relaxed);
  }
}

bool Outbox::hasForeignReleases() const {
  return foreignPending.load(std::memory_order_relaxed);
}

void Outbox::drainForeignReleases() {
  if (!hasForeignReleases()) return;
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

void Outbox::returnScratch(kj::Array<word>&& scratch, size_t dirtyWords) {
  if (scratches.size() >= 16) return;
  memset(scratch.begin(), 0, dirtyWords * sizeof(word));
  scratches.add(kj::mv(scratch));
}

// =======================================================================================
// Taking back

bool Outbox::hasNews() const {
  if (peerHeader == nullptr) return false;
  // Acquire: pairs with the release store in Inbox::publishConsumed(), as in reclaim().
  if (peerHeader->consumed.load(std::memory_order_acquire) !=
      KJ_ASSERT_NONNULL(ring).getConsumed()) {
    return true;
  }
  KJ_IF_MAYBE(f, freeRing) return f->isReady();
  return false;
}

void Outbox::reclaim() {
  drainForeignReleases();
  if (peerHeader == nullptr) return;

  auto& r = KJ_ASSERT_NONNULL(ring);
  // Acquire: pairs with the release store in Inbox::publishConsumed(). The peer's reads of the
  // lines and of the blocks it copied happened before, so we may write them again.
  r.updateConsumed(peerHeader->consumed.load(std::memory_order_acquire));
  while (!inFlight.empty() && inFlight.front().position <= r.getConsumed()) {
    auto& front = inFlight.front();
    if (front.parcel != nullptr) {
      front.parcel->peerHolds = false;
      releaseIfDone(*front.parcel);
    } else {
      arena.free(*front.block, front.dirtyBytes);
    }
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
// Publishing

bool Outbox::ringHasRoom(uint bodyWords) {
  auto& r = KJ_ASSERT_NONNULL(ring);
  uint lines = linesForBody(bodyWords);
  if (r.hasRoom(lines)) return true;
  reclaim();
  if (r.hasRoom(lines)) return true;
  if (++timesFull >= TIMES_FULL_BEFORE_GROWTH) {
    tryGrowRing();
    return r.hasRoom(lines);
  }
  return false;
}

void Outbox::tryGrowRing() {
  auto& r = KJ_ASSERT_NONNULL(ring);
  size_t lines = r.getLineCount() * 4;
  if (lines > MAX_RING_LINES) return;
  size_t bytes = lines * sizeof(DescriptorLine);
  if (!mayHold(bytes)) return;
  KJ_IF_MAYBE(block, allocateOrGrow(bytes)) {
    Region* region = findRegion(block->getRegion());
    if (region->state != Region::MAPPED) {
      // The region is on its way; next time.
      arena.free(*block, 0);
      return;
    }
    SegmentEntry target { region->id, uint32_t(bytes / sizeof(word)), block->getOffset() };
    r.jump(target, kj::arrayPtr(
        reinterpret_cast<DescriptorLine*>(block->bytes().begin()), lines));
    timesFull = 0;
  }
}

bool Outbox::tryPublish(OutgoingMessage& message, uint fdCount) {
  if (progress.active) return publishInParts(message, fdCount);

  auto segments = message.getSegments();
  KJ_REQUIRE(segments.size() <= MAX_SEGMENTS, "message has too many segments", segments.size());
  auto& r = KJ_ASSERT_NONNULL(ring);

  bool firstInline = segments.size() > 0 && segments[0].size() <= MAX_INLINE_WORDS;
  uint inlineWords = firstInline ? segments[0].size() : 0;
  auto rest = segments.slice(firstInline ? 1 : 0, segments.size());

  uint64_t body[MAX_BODY_WORDS];
  uint bodyWords = 0;
  for (uint i = 0; i < inlineWords; i++) {
    memcpy(&body[bodyWords++], segments[0].begin() + i, sizeof(word));
  }

  size_t totalBytes = 0;
  for (auto& segment: segments) totalBytes += segment.size() * sizeof(word);
  DescriptorHead head { DescriptorKind::MESSAGE, 0, uint16_t(segments.size()), uint16_t(fdCount),
                        uint16_t(inlineWords) };

  if (rest.size() == 0) {
    if (!ringHasRoom(bodyWords)) return false;
    r.publish(head, kj::arrayPtr(body, bodyWords));
    ++published;
    ++figures.inlineMessages;
    figures.inlineBytes += totalBytes;
    return true;
  }

  // What must be copied: segments that are not in shared memory, and the table if it is too long
  // for the descriptor.
  uint tableWords = rest.size() * SegmentEntry::WORDS;
  bool tableInArena = bodyWords + 1 + tableWords > MAX_BODY_WORDS;
  size_t copyWords = tableInArena ? tableWords : 0;
  for (auto& segment: rest) {
    bool inPlace = false;
    KJ_IF_MAYBE(block, message.findBlock(segment.begin())) {
      auto region = findRegion(block->getRegion());
      if (region != nullptr && region->state == Region::MAPPED) {
        inPlace = true;
      } else if (region != nullptr && region->state != Region::REFUSED) {
        return false;  // Until the peer has answered.
      }
    }
    if (!inPlace) copyWords += segment.size();
  }

  if (!ringHasRoom(bodyWords + 1 + (tableInArena ? SegmentEntry::WORDS : tableWords))) {
    return false;
  }

  Arena::Block* copy = nullptr;
  if (copyWords > 0) {
    size_t copyBytes = copyWords * sizeof(word);
    if (copyBytes > limits.maxBytes / 4) return publishInParts(message, fdCount);
    KJ_IF_MAYBE(block, allocateOrGrow(copyBytes)) {
      copy = block;
    } else {
      reclaim();
      KJ_IF_MAYBE(block2, arena.tryAllocate(copyBytes)) {
        copy = block2;
      } else if (inFlight.empty()) {
        // Nothing that the peer consumes will make a larger gap: held blocks are in between.
        return publishInParts(message, fdCount);
      } else {
        return false;
      }
    }
    auto region = findRegion(copy->getRegion());
    if (region->state != Region::MAPPED) {
      arena.free(*copy, 0);
      return false;
    }
  }

  // From here on nothing fails.
  Parcel* parcel;
  KJ_IF_MAYBE(p, message.getParcel()) {
    parcel = p;
  } else {
    parcel = &newParcel();
  }
  parcel->copy = copy;
  parcel->copiedBytes = copyWords * sizeof(word);
  parcel->peerHolds = true;

  size_t capacity = 0;
  KJ_IF_MAYBE(f, freeRing) capacity = f->getCapacity();
  bool byHandle = outstandingHandles < capacity && mayHold(0);
  body[bodyWords++] = byHandle
      ? uint64_t(parcel->index) | uint64_t(parcel->generation) << 32 : FREE_BY_CONSUMPTION;

  byte* copyPosition = copy == nullptr ? nullptr : copy->bytes().begin();
  uint64_t copyOffset = copy == nullptr ? 0 : copy->getOffset();
  uint32_t copyRegion = copy == nullptr ? 0 : copy->getRegion();
  auto place = [&](kj::ArrayPtr<const word> words) {
    SegmentEntry entry { copyRegion, uint32_t(words.size()), copyOffset };
    memcpy(copyPosition, words.begin(), words.size() * sizeof(word));
    copyPosition += words.size() * sizeof(word);
    copyOffset += words.size() * sizeof(word);
    figures.copiedBytes += words.size() * sizeof(word);
    return entry;
  };

  uint64_t* table = body + bodyWords;
  if (tableInArena) {
    head.kind = DescriptorKind::MESSAGE_TABLE;
    SegmentEntry entry { copyRegion, tableWords, copyOffset };
    body[bodyWords++] = entry.packFirst();
    body[bodyWords++] = entry.offset;
    table = reinterpret_cast<uint64_t*>(copyPosition);
    copyPosition += tableWords * sizeof(word);
    copyOffset += tableWords * sizeof(word);
  } else {
    bodyWords += tableWords;
  }

  for (auto& segment: rest) {
    SegmentEntry entry;
    Arena::Block* own = nullptr;
    KJ_IF_MAYBE(block, message.findBlock(segment.begin())) {
      if (findRegion(block->getRegion())->state == Region::MAPPED) own = block;
    }
    if (own != nullptr) {
      entry = { own->getRegion(), uint32_t(segment.size()), own->getOffset() };
    } else {
      entry = place(segment);
    }
    *table++ = entry.packFirst();
    *table++ = entry.offset;
  }

  r.publish(head, kj::arrayPtr(body, bodyWords));
  ++published;
  ++figures.referencedMessages;
  figures.referencedBytes += totalBytes;
  if (byHandle) {
    ++outstandingHandles;
  } else {
    inFlight.push_back({ r.getPosition(), parcel, nullptr, 0 });
  }
  if (published % 256 == 0) retireUnused();
  return true;
}

bool Outbox::publishInParts(OutgoingMessage& message, uint fdCount) {
  auto& r = KJ_ASSERT_NONNULL(ring);
  auto segments = message.getSegments();

  auto allocateMapped = [&](size_t bytes, size_t least) -> Arena::Block* {
    // As much as there is, from `bytes` down to `least`.
    for (;;) {
      KJ_IF_MAYBE(block, allocateOrGrow(bytes)) {
        auto region = findRegion(block->getRegion());
        if (region->state == Region::MAPPED) return block;
        arena.free(*block, 0);
        return nullptr;
      }
      if (bytes == least) return nullptr;
      bytes = kj::max(bytes / 2 / CACHE_LINE * CACHE_LINE, least);
    }
  };

  uint64_t body[1 + SegmentEntry::WORDS];
  body[0] = FREE_BY_CONSUMPTION;
  auto publish = [&](DescriptorHead head, Arena::Block& block, size_t words) {
    SegmentEntry entry { block.getRegion(), uint32_t(words), block.getOffset() };
    body[1] = entry.packFirst();
    body[2] = entry.offset;
    r.publish(head, kj::arrayPtr(body, kj::size(body)));
    inFlight.push_back({ r.getPosition(), nullptr, &block, words * sizeof(word) });
    figures.copiedBytes += words * sizeof(word);
  };

  reclaim();
  if (!ringHasRoom(kj::size(body))) return false;

  if (!progress.active) {
    size_t bytes = segments.size() * sizeof(word);
    Arena::Block* block = allocateMapped(bytes, bytes);
    if (block == nullptr) return false;
    auto table = reinterpret_cast<uint64_t*>(block->bytes().begin());
    for (size_t i = 0; i < segments.size(); i++) table[i] = segments[i].size();
    publish({ DescriptorKind::BEGIN, 0, uint16_t(segments.size()), uint16_t(fdCount), 0 },
        *block, segments.size());
    progress = Progress { true, 0, 0 };
  }

  while (progress.segment < segments.size()) {
    auto& segment = segments[progress.segment];
    if (progress.word == segment.size()) {
      ++progress.segment;
      progress.word = 0;
      continue;
    }
    if (!ringHasRoom(kj::size(body))) return false;
    size_t rest = (segment.size() - progress.word) * sizeof(word);
    size_t wanted = kj::min(rest, kj::max(limits.maxBytes / 16, size_t(4096)));
    Arena::Block* block = allocateMapped(wanted, kj::min(wanted, CACHE_LINE));
    if (block == nullptr) return false;
    size_t words = kj::min(wanted, block->bytes().size()) / sizeof(word);
    words = kj::min(words, segment.size() - progress.word);
    memcpy(block->bytes().begin(), segment.begin() + progress.word, words * sizeof(word));
    publish({ DescriptorKind::PART, 0, 0, 0, 0 }, *block, words);
    progress.word += words;
  }

  progress = Progress();
  ++published;
  ++figures.referencedMessages;
  for (auto& segment: segments) figures.referencedBytes += segment.size() * sizeof(word);
  return true;
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
