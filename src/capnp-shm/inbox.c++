// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "inbox.h"

#include "fault-point.h"
#include <algorithm>
#include <string.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;
using kj::uint;

namespace {

constexpr uint64_t CONSUMPTION_WORTH_TELLING = 64 * 1024;
// Bytes of blocks, after which the sender is told, so that it can use them while they are warm.

constexpr uint64_t MESSAGES_BETWEEN_CARES = 64;
// Of the pool of buffers.

constexpr uint COPIES_BEFORE_POOL = 12;
// Large ones, for which malloc() does. A new buffer in huge pages costs as much as one or two such
// messages, and is repaid if many follow. Nor should the message that pays for it be the one, about
// the eighth, that waits for the sender's first large region.

void copyPayload(void* target, const void* source, size_t bytes) {
  // The only place where payload is read that an untrusted peer may be rewriting. The barriers
  // keep the compiler from reading the source again later instead of the copy.
  asm volatile("" ::: "memory");
  memcpy(target, source, bytes);
  asm volatile("" ::: "memory");
}

constexpr size_t SLACK_WORDS = 4;
// By which a copy may have to be moved.

word* awayFrom(word* target, const void* source) {
  // Where to copy `source` to, at most SLACK_WORDS behind `target`. If that lies less than 32 bytes
  // behind the source, modulo the size of a page, a processor takes each load for one of what was
  // stored just before; glibc's memcpy() is up to 20 times as slow then (on AMD Zen 3: glibc bug
  // 30994, in Debian 12).
  uintptr_t distance = reinterpret_cast<uintptr_t>(target) - reinterpret_cast<uintptr_t>(source);
  distance %= 4096;
  return distance > 0 && distance < SLACK_WORDS * sizeof(word) ? target + SLACK_WORDS : target;
}

uint64_t loadOnce(const SharedWord& word) {
  // Relaxed: ordered by the acquire load of `magic`, or by that of a descriptor's stamp.
  return word.load(std::memory_order_relaxed);
}

kj::ArrayPtr<const DescriptorLine> findRing(const PeerRegion& region) {
  auto bytes = region.bytes();
  auto& header = *reinterpret_cast<const RegionHeader*>(bytes.begin());
  // Acquire: before the rest of the header. It pairs with no store: the peer has made its region
  // with the header in it.
  KJ_REQUIRE(header.magic.load(std::memory_order_acquire) == REGION_MAGIC,
      "peer's first region has no header");
  uint64_t offset = loadOnce(header.ringOffset);
  uint64_t lines = loadOnce(header.ringLines);
  KJ_REQUIRE(offset % CACHE_LINE == 0 && offset >= sizeof(RegionHeader) &&
             offset <= bytes.size() && lines <= (bytes.size() - offset) / sizeof(DescriptorLine),
      "peer's descriptor ring lies outside its region", offset, lines, bytes.size());
  KJ_REQUIRE(lines == FIRST_RING_LINES,
      "peer's first descriptor ring is not of the size that this version has", lines);
  return kj::arrayPtr(
      reinterpret_cast<const DescriptorLine*>(bytes.begin() + offset), lines);
}

}  // namespace

Inbox::Inbox(kj::Own<Outbox> outboxParam, kj::Own<PeerRegion> firstRegion, uint32_t version,
             const InboxLimits& limits, kj::Own<ForeignWake> foreignWake)
    : outbox(kj::mv(outboxParam)), limits(limits), foreignWake(kj::mv(foreignWake)),
      ring(findRing(*firstRegion)), mapped(kj::atomicRefcounted<MappedTotal>()),
      publishedPosition(ring.getPosition()),
      sealedBudget(kj::atomicRefcounted<SealedBudget>(limits.sealedBytes)) {
  auto bytes = firstRegion->bytes();
  auto& header = *reinterpret_cast<const RegionHeader*>(bytes.begin());
  KJ_REQUIRE(loadOnce(header.version) == version,
      "peer's first region has a header of another version", loadOnce(header.version), version);
  KJ_REQUIRE(loadOnce(header.regionBytes) == bytes.size(),
      "peer's first region has a header with another size", loadOnce(header.regionBytes));
  uint64_t offset = loadOnce(header.freeOffset);
  uint64_t entries = loadOnce(header.freeEntries);
  KJ_REQUIRE(offset % sizeof(SharedWord) == 0 && offset >= sizeof(RegionHeader) &&
             offset <= bytes.size() && entries <= (bytes.size() - offset) / sizeof(SharedWord),
      "peer's free ring lies outside its region", offset, entries, bytes.size());
  peerFreeRing = kj::arrayPtr(
      reinterpret_cast<const SharedWord*>(bytes.begin() + offset), entries);

  firstRegion->countIn(kj::atomicAddRef(*mapped));
  regions.add(kj::mv(firstRegion));
  auto ownFreeRing = outbox->getFreeRing();
  if (ownFreeRing.size() > 0) freeRing = FreeProducer(ownFreeRing, outbox->getHeader().freed);
}

Inbox::~Inbox() noexcept(false) {}

const RegionHeader& Inbox::getPeerHeader() const {
  return *reinterpret_cast<const RegionHeader*>(regions[0]->bytes().begin());
}

bool Inbox::addRegion(uint32_t id, kj::Maybe<int> fd, uint64_t bytes) {
  KJ_REQUIRE(id == nextRegionId, "peer announced regions out of order", id, nextRegionId);
  ++nextRegionId;
  uint64_t mappedBytes = mapped->getBytes();
  if (bytes > limits.maxBytes - kj::min(limits.maxBytes, mappedBytes)) return false;
  if (mapped->getRegions() > limits.furtherRegions) return false;  // The first is one of them.
  if (fd == nullptr) return false;
  int number = KJ_ASSERT_NONNULL(fd);
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    auto region = kj::atomicRefcounted<PeerRegion>(
        id, mapPeerRegion(number, bytes, limits.maxBytes));
    region->countIn(kj::atomicAddRef(*mapped));
    regions.add(kj::mv(region));
  })) {
    if (exception->getType() == kj::Exception::Type::OVERLOADED) return false;
    kj::throwFatalException(kj::mv(*exception));
  }
  return true;
}

kj::Array<word> Inbox::newCopy(IncomingMessage& message, size_t words) {
  // Memory to copy `message` to.
  if (words < LARGE_BUFFER_WORDS) return kj::heapArray<word>(words);
  if (words < MAX_MALLOC_WORDS && copiesBeforePool < COPIES_BEFORE_POOL) {
    ++copiesBeforePool;
    return kj::heapArray<word>(words);
  }
  if (pool == nullptr) pool = kj::atomicRefcounted<BufferPool>(limits.maxBytes / 4);
  auto& p = KJ_ASSERT_NONNULL(pool);
  message.returnCopyTo(kj::atomicAddRef(*p));
  return p->take(words);
}

PeerRegion& Inbox::findRegion(uint32_t id) {
  for (auto& region: regions) {
    if (region->id == id) return *region;
  }
  KJ_FAIL_REQUIRE("peer's descriptor refers to a region that is not mapped", id);
}

kj::ArrayPtr<const byte> Inbox::resolve(const SegmentEntry& entry) {
  auto bytes = findRegion(entry.region).bytes();
  uint64_t size = uint64_t(entry.words) * sizeof(word);
  KJ_REQUIRE(entry.offset % sizeof(word) == 0 && entry.offset <= bytes.size() &&
             size <= bytes.size() - entry.offset,
      "peer's descriptor refers to memory outside its region",
      entry.region, entry.offset, entry.words);
  return bytes.slice(entry.offset, entry.offset + size);
}

kj::Maybe<kj::Own<IncomingMessage>> Inbox::tryTake(
    bool fdsArrived, kj::ArrayPtr<SealedFile> sealed) {
  for (;;) {
    if (!held) {
      if (!ring.tryTake(descriptor)) return nullptr;
      // Or a peer that writes as fast as we read would keep us in this loop.
      KJ_REQUIRE(ring.getPosition() - publishedPosition <= ring.getLineCount(),
          "peer published more descriptors than its ring has room for",
          ring.getPosition(), publishedPosition, ring.getLineCount());
    }

    auto& head = descriptor.head;
    KJ_REQUIRE((assembly == nullptr) == (head.kind != DescriptorKind::PART) ||
               head.kind == DescriptorKind::JUMP,
        "peer published descriptors in an impossible order", uint(head.kind));
    if (head.fds > 0 && !fdsArrived) {
      held = true;
      return nullptr;
    }
    held = false;
    if (++messages % MESSAGES_BETWEEN_CARES == 0) {
      KJ_IF_MAYBE(p, pool) (*p)->passed(messages);
    }

    switch (head.kind) {
      case DescriptorKind::MESSAGE:
      case DescriptorKind::MESSAGE_TABLE:
        return takeMessage(head.fds > 0 ? sealed : nullptr);
      case DescriptorKind::BEGIN:
        beginAssembly();
        continue;
      case DescriptorKind::PART:
        if (continueAssembly()) {
          auto result = kj::mv(KJ_ASSERT_NONNULL(assembly).message);
          assembly = nullptr;
          return kj::mv(result);
        }
        // So that the next parts are copied there while we read those that are here.
        if (publishConsumed(false)) freedSomething = true;
        continue;
      case DescriptorKind::JUMP:
        takeJump();
        continue;
      case DescriptorKind::RETIRE:
        takeRetire();
        continue;
    }
    KJ_FAIL_REQUIRE("peer published a descriptor of an unknown kind", uint(head.kind));
  }
}

kj::Own<IncomingMessage> Inbox::takeMessage(kj::ArrayPtr<SealedFile> sealed) {
  auto& head = descriptor.head;
  uint count = head.segments;
  uint inlineWords = head.inlineWords;
  KJ_REQUIRE(count <= MAX_SEGMENTS, "peer published a message of too many segments", count);
  KJ_REQUIRE(inlineWords <= descriptor.bodyWords && (inlineWords == 0 || count > 0),
      "peer published a descriptor with impossible inline data", inlineWords);
  uint rest = count - (inlineWords > 0 ? 1 : 0);

  capnp::ReaderOptions options;
  options.traversalLimitInWords = limits.traversalLimitInWords;
  options.nestingLimit = limits.nestingLimit;
  auto message = kj::heap<IncomingMessage>(options);
  message->setFdCount(head.fds);

  auto inlineData = kj::arrayPtr(descriptor.body, inlineWords);
  if (rest == 0) {
    message->copyInline(inlineData);
    ++inlineMessages;
    inlineBytes += inlineWords * sizeof(word);
    return message;
  }

  // The table, into private memory.
  auto body = kj::arrayPtr(descriptor.body + inlineWords, descriptor.bodyWords - inlineWords);
  KJ_REQUIRE(body.size() >= 1 + SegmentEntry::WORDS,
      "peer published a descriptor that is too short for its segments", body.size(), rest);
  uint64_t handle = body[0];
  body = body.slice(1, body.size());
  uint tableWords = rest * SegmentEntry::WORDS;
  kj::Array<uint64_t> longTable;
  if (head.kind == DescriptorKind::MESSAGE_TABLE) {
    auto source = resolve(SegmentEntry::unpack(body[0], body[1]));
    KJ_REQUIRE(source.size() == tableWords * sizeof(word),
        "peer published a segment table of the wrong size", source.size(), rest);
    longTable = kj::heapArray<uint64_t>(tableWords);
    copyPayload(longTable.begin(), source.begin(), source.size());
    body = longTable;
  }
  KJ_REQUIRE(body.size() >= tableWords,
      "peer published a descriptor that is too short for its segments", body.size(), rest);

  auto sources = kj::heapArray<kj::ArrayPtr<const byte>>(rest);
  uint64_t restWords = 0, sealedWords = 0;
  kj::Vector<kj::Own<PeerRegion>> used;
  for (uint i = 0; i < rest; i++) {
    auto entry = SegmentEntry::unpack(body[i * 2], body[i * 2 + 1]);
    restWords += entry.words;
    if (entry.isSealed()) {
      sealedWords += entry.words;
      claimSealed(sealed, entry);
      continue;  // Not opened before everything is checked; no source until then.
    }
    sources[i] = resolve(entry);
    if (limits.inPlace) {
      bool known = false;
      for (auto& region: used) known = known || region->id == entry.region;
      if (!known) used.add(kj::atomicAddRef(findRegion(entry.region)));
    }
  }
  KJ_REQUIRE(inlineWords + restWords <= limits.traversalLimitInWords,
      "incoming RPC message exceeds size limit", inlineWords + restWords,
      limits.traversalLimitInWords);

  if (rest > 1) {
    auto sorted = kj::heapArray<kj::ArrayPtr<const byte>>(sources.asPtr());
    std::sort(sorted.begin(), sorted.end(), [](auto& a, auto& b) { return a.begin() < b.begin(); });
    for (uint i = 1; i < rest; i++) {
      KJ_REQUIRE(sorted[i - 1].end() <= sorted[i].begin() || sorted[i].size() == 0,
          "peer published a message whose segments overlap");
    }
  }

  KJ_REQUIRE(freeRing != nullptr || handle == FREE_BY_CONSUMPTION,
      "peer published a message to be freed by handle, but this side has no free ring", handle);
  bool inPlace = limits.inPlace && handle != FREE_BY_CONSUMPTION;
#ifdef CAPNP_SHM_TEST_UNSAFE_READ_IN_PLACE
  // Only in the control run of tests/hostile-live.c++, which must notice.
  constexpr bool copies = false;
#else
  bool copies = !inPlace;
#endif
  auto copy = newCopy(*message,
      inlineWords + (copies ? restWords - sealedWords + rest * SLACK_WORDS : 0));
  memcpy(copy.asBytes().begin(), inlineData.begin(), inlineWords * sizeof(word));
  auto segments = kj::heapArray<kj::ArrayPtr<const word>>(count);
  uint index = 0;
  if (inlineWords > 0) segments[index++] = copy.slice(0, inlineWords);
  word* target = copy.begin() + inlineWords;
  for (uint i = 0; i < rest; i++) {
    auto source = sources[i];
    size_t size = source.size() / sizeof(word);
    auto entry = SegmentEntry::unpack(body[i * 2], body[i * 2 + 1]);
    if (entry.isSealed()) {
      auto segment = sealedBudget->open(sealed[entry.region & ~SEALED_SEGMENT], entry.words);
      segments[index++] = segment->getWords();
      (segment->isCopied() ? copiedBytes : sealedBytes) += entry.words * sizeof(word);
      message->ownSealed(kj::mv(segment));
    } else if (!copies) {
      segments[index++] = kj::arrayPtr(reinterpret_cast<const word*>(source.begin()), size);
    } else {
      target = awayFrom(target, source.begin());
      copyPayload(target, source.begin(), source.size());
      segments[index++] = kj::arrayPtr(target, size);
      target += size;
      copiedBytes += source.size();
    }
  }

  if (inPlace) {
    message->readInPlace(kj::atomicAddRef(*this), handle, kj::mv(used));
  } else if (handle == FREE_BY_CONSUMPTION) {
    consumedBytes += (restWords - sealedWords) * sizeof(word);
  } else {
    release(handle);
  }
  message->ownCopy(kj::mv(copy));
  message->setSegments(kj::mv(segments));
  return message;
}

void Inbox::beginAssembly() {
  auto& head = descriptor.head;
  KJ_REQUIRE(head.segments >= 1 && head.segments <= MAX_SEGMENTS,
      "peer began a message of an impossible number of segments", head.segments);
  auto source = resolve(SegmentEntry::unpack(descriptor.body[1], descriptor.body[2]));
  KJ_REQUIRE(source.size() == head.segments * sizeof(word),
      "peer published a segment table of the wrong size", source.size(), head.segments);
  auto sizes = kj::heapArray<uint64_t>(head.segments);
  copyPayload(sizes.begin(), source.begin(), source.size());
  consumedBytes += source.size();

  uint64_t total = 0;
  for (auto size: sizes) {
    KJ_REQUIRE(size < (uint64_t(1) << 29), "peer began a message with an impossible segment", size);
    total += size;
  }
  KJ_REQUIRE(total > 0 && total <= limits.traversalLimitInWords,
      "incoming RPC message exceeds size limit", total, limits.traversalLimitInWords);

  capnp::ReaderOptions options;
  options.traversalLimitInWords = limits.traversalLimitInWords;
  options.nestingLimit = limits.nestingLimit;
  auto message = kj::heap<IncomingMessage>(options);
  message->setFdCount(head.fds);
  auto memory = newCopy(*message, total);
  auto segments = kj::heapArray<kj::ArrayPtr<const word>>(head.segments);
  size_t position = 0;
  for (uint i = 0; i < head.segments; i++) {
    segments[i] = memory.slice(position, position + sizes[i]);
    position += sizes[i];
  }
  message->setSegments(kj::mv(segments));
  assembly = Assembly { kj::mv(message), kj::mv(memory), total, 0 };
}

bool Inbox::continueAssembly() {
  auto& a = KJ_ASSERT_NONNULL(assembly);
  auto source = resolve(SegmentEntry::unpack(descriptor.body[1], descriptor.body[2]));
  size_t words = source.size() / sizeof(word);
  KJ_REQUIRE(words > 0 && words <= a.size - a.filled,
      "peer published a part that does not fit its message", words, a.filled, a.size);
  copyPayload(a.memory.begin() + a.filled, source.begin(), source.size());
  a.filled += words;
  copiedBytes += source.size();
  consumedBytes += source.size();
  if (a.filled < a.size) return false;
  a.message->ownCopy(kj::mv(a.memory));
  return true;
}

void Inbox::takeJump() {
  auto entry = SegmentEntry::unpack(descriptor.body[0], descriptor.body[1]);
  auto bytes = resolve(entry);
  KJ_REQUIRE(entry.offset % CACHE_LINE == 0 && bytes.size() % sizeof(DescriptorLine) == 0,
      "peer's JUMP leads to a misplaced ring", entry.offset, entry.words);
  KJ_REQUIRE(bytes.size() / sizeof(DescriptorLine) <= LARGEST_RING_LINES,
      "peer's JUMP leads to a ring that is too large", bytes.size() / sizeof(DescriptorLine));
  ring.jump(kj::arrayPtr(reinterpret_cast<const DescriptorLine*>(bytes.begin()),
      bytes.size() / sizeof(DescriptorLine)));
  ringRegion = kj::atomicAddRef(findRegion(entry.region));
}

void Inbox::takeRetire() {
  uint64_t id = descriptor.body[0];
  for (size_t i = 1; i < regions.size(); i++) {
    if (regions[i]->id == id) {
      regions[i] = kj::mv(regions.back());
      regions.removeLast();
      return;
    }
  }
  KJ_FAIL_REQUIRE("peer retired a region that is not mapped", id);
}

bool Inbox::publishConsumed(bool force) {
  uint64_t position = held ? ring.getPosition() - descriptor.head.lines : ring.getPosition();
  if (position == publishedPosition) return false;
  if (!force && position - publishedPosition < ring.getLineCount() / 8 &&
      consumedBytes < kj::min(mapped->getBytes() / 8, CONSUMPTION_WORTH_TELLING)) {
    return false;
  }
  // Release: pairs with the acquire loads in Outbox. Our reads of the lines and of the blocks that
  // were copied come before it.
  outbox->getHeader().consumed.store(position, std::memory_order_release);
  faultPoint();
  publishedPosition = position;
  consumedBytes = 0;
  return true;
}

void Inbox::release(uint64_t handle) {
  if (owner.isCurrent()) {
    if (closed) return;
    KJ_ASSERT_NONNULL(freeRing).push(handle);
    freedSomething = true;
    KJ_IF_MAYBE(callback, releaseCallback) (*callback)();
  } else if (!owner.isForked()) {
    {
      std::lock_guard<std::mutex> lock(foreignMutex);
      foreignReleases.add(handle);
      // Relaxed: only a hint; the mutex orders the list itself.
      foreignPending.store(true, std::memory_order_relaxed);
    }
    foreignWake->wake();
  }
}

bool Inbox::takeFreed() {
  // Relaxed: whoever set it wakes us through ForeignWake, whose mutex orders it.
  if (foreignPending.load(std::memory_order_relaxed)) {
    kj::Vector<uint64_t> list;
    {
      std::lock_guard<std::mutex> lock(foreignMutex);
      list = kj::mv(foreignReleases);
      foreignReleases = kj::Vector<uint64_t>();
      foreignPending.store(false, std::memory_order_relaxed);
    }
    for (auto handle: list) {
      if (closed) break;
      KJ_ASSERT_NONNULL(freeRing).push(handle);
      freedSomething = true;
    }
  }
  bool result = freedSomething;
  freedSomething = false;
  return result;
}

void Inbox::onRelease(kj::Function<void()> callback) { releaseCallback = kj::mv(callback); }

void Inbox::close() {
  closed = true;
  releaseCallback = nullptr;
}

// =======================================================================================

IncomingMessage::IncomingMessage(capnp::ReaderOptions options): MessageReader(options) {}

IncomingMessage::~IncomingMessage() noexcept(false) {
  KJ_IF_MAYBE(i, inbox) (*i)->release(handle);
  KJ_IF_MAYBE(p, pool) {
    if (copy != nullptr) (*p)->giveBack(kj::mv(copy));
  }
}

void IncomingMessage::copyInline(kj::ArrayPtr<const uint64_t> data) {
  KJ_IREQUIRE(data.size() <= MAX_BODY_WORDS);
  auto target = kj::arrayPtr(inlineWords, data.size());
  memcpy(target.asBytes().begin(), data.begin(), data.asBytes().size());
  inlineSegment = target;
  words = data.size();
  if (words > 0) segments = kj::arrayPtr(&inlineSegment, 1);
}

void IncomingMessage::setSegments(kj::Array<kj::ArrayPtr<const word>> newSegments) {
  ownSegments = kj::mv(newSegments);
  segments = ownSegments;
  for (auto& segment: segments) words += segment.size();
}

void IncomingMessage::readInPlace(
    kj::Own<Inbox> newInbox, uint64_t newHandle, kj::Vector<kj::Own<PeerRegion>> newRegions) {
  inbox = kj::mv(newInbox);
  handle = newHandle;
  regions = kj::mv(newRegions);
}

kj::ArrayPtr<const word> IncomingMessage::getSegment(uint id) {
  if (id < segments.size()) return segments[id];
  return nullptr;
}

}  // namespace capnpshm
