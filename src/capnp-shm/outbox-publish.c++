// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox.h"

#include "fault-point.h"
#include "message.h"
#include <string.h>
#include <kj/debug.h>

// How an Outbox turns messages into descriptors. Memory and regions are in outbox.c++.

namespace capnpshm {

using capnp::word;
using kj::uint;

namespace {

constexpr uint MAX_RING_LINES = 8192;
constexpr uint MAX_INLINE_WORDS = 20;
constexpr uint TIMES_FULL_BEFORE_GROWTH = 4;
constexpr size_t MIN_PART = 4096;
constexpr size_t MAX_PART = 512 * 1024;
constexpr size_t MAX_PARTS_IN_FLIGHT = 4 * 1024 * 1024;
// Enough for both sides to copy at the same time, and little enough to stay in the caches.
constexpr uint64_t MESSAGES_BETWEEN_RETIREMENTS = 256;

static_assert(bodyCapacity(3) == MAX_INLINE_WORDS, "three lines hold the longest inline message");

}  // namespace

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
      awaitRegion(*region, *block);
      return;
    }
    size_t oldBytes = r.getLineCount() * sizeof(DescriptorLine);
    SegmentEntry target { region->id, uint32_t(bytes / sizeof(word)), block->getOffset() };
    r.jump(target, kj::arrayPtr(
        reinterpret_cast<DescriptorLine*>(block->bytes().begin()), lines));
    faultPoint();
    if (ringBlock != nullptr) {
      inFlight.push_back({ r.getPosition(), nullptr, ringBlock, oldBytes, 0 });
    }
    ringBlock = block;
    timesFull = 0;
  }
}

void Outbox::countPublished() {
  if (++published % MESSAGES_BETWEEN_RETIREMENTS == 0) retireUnused();
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
    ++figures.inlineMessages;
    figures.inlineBytes += totalBytes;
    countPublished();
    return true;
  }

  // What must be copied: segments that are not in shared memory, and the table if it is too long
  // for the descriptor.
  uint tableWords = rest.size() * SegmentEntry::WORDS;
  bool tableInArena = bodyWords + 1 + tableWords > MAX_BODY_WORDS;
  size_t copyWords = tableInArena ? tableWords : 0;
  for (auto& segment: rest) {
    bool inPlace = message.getSealed().find(segment.begin()) != nullptr;
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
      } else if (inFlight.empty() || copyBytes > arena.getCapacity()) {
        // Nothing that the peer consumes will make a larger gap: held blocks are in between, or it
        // is all too small.
        return publishInParts(message, fdCount);
      } else {
        return false;
      }
    }
    auto region = findRegion(copy->getRegion());
    if (region->state != Region::MAPPED) {
      awaitRegion(*region, *copy);
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
    faultPoint();
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
    auto sealed = message.getSealed().find(segment.begin());
    KJ_IF_MAYBE(block, message.findBlock(segment.begin())) {
      if (findRegion(block->getRegion())->state == Region::MAPPED) own = block;
    }
    KJ_IF_MAYBE(number, sealed) {
      entry = { *number, uint32_t(segment.size()), 0 };
      figures.sealedBytes += segment.size() * sizeof(word);
    } else if (own != nullptr) {
      entry = { own->getRegion(), uint32_t(segment.size()), own->getOffset() };
    } else {
      entry = place(segment);
    }
    *table++ = entry.packFirst();
    faultPoint();
    *table++ = entry.offset;
    faultPoint();
  }

  r.publish(head, kj::arrayPtr(body, bodyWords));
  ++figures.referencedMessages;
  figures.referencedBytes += totalBytes;
  if (byHandle) {
    ++outstandingHandles;
  } else {
    inFlight.push_back({ r.getPosition(), parcel, nullptr, 0, 0 });
  }
  countPublished();
  return true;
}

bool Outbox::publishInParts(OutgoingMessage& message, uint fdCount) {
  // Until we see what the peer consumes, and may have further regions, there is nothing to go on
  // with.
  if (peerHeader == nullptr) return false;
  auto& r = KJ_ASSERT_NONNULL(ring);

  struct Place {
    kj::ArrayPtr<byte> bytes;  // Empty if there is none.
    Arena::Block* block;       // Null for the reserve.
  };
  size_t needed = message.sizeInWords() * sizeof(word);
  auto findPlace = [&](size_t bytes, size_t least) -> Place {
    // As much as there is, from `bytes` down to `least`.
    for (;;) {
      KJ_IF_MAYBE(block, allocateOrGrow(bytes, needed)) {
        auto region = findRegion(block->getRegion());
        if (region->state == Region::MAPPED) return { block->bytes(), block };
        awaitRegion(*region, *block);
        return { nullptr, nullptr };
      }
      if (bytes == least) break;
      bytes = kj::max(bytes / 2 / CACHE_LINE * CACHE_LINE, least);
    }
    // If the peer has consumed everything, those who hold the memory may hold it for ever.
    if (inFlight.empty()) return { reserve, nullptr };
    return { nullptr, nullptr };
  };

  uint64_t body[1 + SegmentEntry::WORDS];
  body[0] = FREE_BY_CONSUMPTION;
  auto publish = [&](DescriptorHead head, Place place, size_t words) {
    SegmentEntry entry { 0, uint32_t(words), 0 };
    if (place.block == nullptr) {
      entry.offset = reserve.begin() - regions[0]->memory.mapping.bytes().begin();
    } else {
      entry.region = place.block->getRegion();
      entry.offset = place.block->getOffset();
    }
    body[1] = entry.packFirst();
    body[2] = entry.offset;
    r.publish(head, kj::arrayPtr(body, kj::size(body)));
    inFlight.push_back({
        r.getPosition(), nullptr, place.block, words * sizeof(word), words * sizeof(word) });
    partBytesInFlight += words * sizeof(word);
    figures.copiedBytes += words * sizeof(word);
  };

  reclaim();
  if (!ringHasRoom(kj::size(body))) return false;

  if (!progress.active) {
    auto segments = message.getSegments();
    size_t bytes = segments.size() * sizeof(word);
    auto place = findPlace(bytes, bytes);
    if (place.bytes == nullptr) return false;
    auto table = reinterpret_cast<uint64_t*>(place.bytes.begin());
    for (size_t i = 0; i < segments.size(); i++) {
      table[i] = segments[i].size();
      faultPoint();
    }
    publish({ DescriptorKind::BEGIN, 0, uint16_t(segments.size()), uint16_t(fdCount), 0 },
        place, segments.size());
    progress = Progress { true, kj::heapArray(segments), 0, 0, 0 };
    for (auto& segment: segments) progress.wordsLeft += segment.size();
  }

  auto segments = progress.segments.asPtr();
  while (progress.wordsLeft > 0) {
    if (!ringHasRoom(kj::size(body))) return false;
    size_t rest = progress.wordsLeft * sizeof(word);
    size_t most = kj::min(limits.maxBytes / 16, MAX_PART);
    // So that one can be filled while the one before is being read.
    if (!isWorthGrowing(needed)) most = kj::min(most, totalBytes / 8);
    size_t wanted = kj::min(rest, kj::max(most, MIN_PART));
    if (partBytesInFlight + wanted > MAX_PARTS_IN_FLIGHT && !inFlight.empty()) return false;
    // Not through any gap, however small: the reserve is larger, as soon as it is free.
    auto place = findPlace(wanted, kj::min(wanted, reserve.size() / 2));
    if (place.bytes == nullptr) return false;
    size_t words = kj::min(wanted, place.bytes.size()) / sizeof(word);
    copyNextPart(kj::arrayPtr(reinterpret_cast<word*>(place.bytes.begin()), words));
    publish({ DescriptorKind::PART, 0, 0, 0, 0 }, place, words);
  }

  ++figures.referencedMessages;
  for (auto& segment: segments) figures.referencedBytes += segment.size() * sizeof(word);
  progress = Progress();
  countPublished();
  return true;
}

void Outbox::copyNextPart(kj::ArrayPtr<word> part) {
  // Fills it, from as many segments as that takes: one by one, hundreds of small ones would each
  // wait for the reserve to be free again.
  progress.wordsLeft -= part.size();
  while (part.size() > 0) {
    auto& segment = progress.segments[progress.segment];
    auto rest = segment.slice(progress.word, segment.size());
    if (rest.size() == 0) {
      ++progress.segment;
      progress.word = 0;
      continue;
    }
    size_t words = kj::min(rest.size(), part.size());
    memcpy(part.begin(), rest.begin(), words * sizeof(word));
    faultPoint();
    progress.word += words;
    part = part.slice(words, part.size());
  }
}

}  // namespace capnpshm
