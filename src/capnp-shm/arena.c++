// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "arena.h"

#include "fault-point.h"
#include <string.h>
#include <kj/debug.h>

namespace capnpshm {

namespace {

constexpr size_t roundUpToLines(size_t bytes) {
  return (bytes + CACHE_LINE - 1) & ~(CACHE_LINE - 1);
}

}  // namespace

Arena::Arena() {
  memset(classes, 0, sizeof(classes));
  memset(nonEmpty, 0, sizeof(nonEmpty));
}

Arena::~Arena() noexcept(false) {}

uint Arena::classOf(size_t size) {
  // The class holds sizes from its own lower bound up to the next class's.
  size_t lines = size / CACHE_LINE;
  if (lines <= EXACT_CLASSES) return lines - 1;
  uint log = 63 - __builtin_clzll(lines);
  uint quarter = (lines >> (log - 2)) & 3;
  // log is at least 5; 32 lines exactly have a class of their own, so quarter 0 of log 5 starts
  // at 33.
  return EXACT_CLASSES + (log - 5) * 4 + quarter;
}

Arena::Block& Arena::newBlock() {
  if (spare.size() > 0) {
    Block& result = *spare.back();
    spare.removeLast();
    result = Block();
    return result;
  }
  return *blocks.add(kj::heap<Block>());
}

void Arena::link(Block& block) {
  uint index = classOf(block.size);
  block.isFree = true;
  block.previous = nullptr;
  block.next = classes[index];
  if (block.next != nullptr) block.next->previous = &block;
  classes[index] = &block;
  nonEmpty[index / 64] |= uint64_t(1) << (index % 64);
}

void Arena::unlink(Block& block) {
  uint index = classOf(block.size);
  if (block.previous == nullptr) {
    classes[index] = block.next;
    if (block.next == nullptr) nonEmpty[index / 64] &= ~(uint64_t(1) << (index % 64));
  } else {
    block.previous->next = block.next;
  }
  if (block.next != nullptr) block.next->previous = block.previous;
  block.previous = block.next = nullptr;
  block.isFree = false;
}

Arena::Range& Arena::rangeOf(uint32_t region) {
  for (auto& range: ranges) {
    if (range.region == region) return range;
  }
  KJ_FAIL_REQUIRE("no such region in the arena", region);
}

bool Arena::isUnused(uint32_t region) const {
  for (auto& range: ranges) {
    if (range.region == region) return range.inUse == 0;
  }
  return true;
}

void Arena::addRange(uint32_t region, uint64_t offset, kj::ArrayPtr<byte> zeroed) {
  KJ_REQUIRE(zeroed.size() > 0 && zeroed.size() % CACHE_LINE == 0 && offset % CACHE_LINE == 0);
  auto& block = newBlock();
  block.start = zeroed.begin();
  block.size = zeroed.size();
  block.offset = offset;
  block.region = region;
  ranges.add(Range { region, zeroed.size(), 0, false, &block });
  capacity += zeroed.size();
  link(block);
}

void Arena::removeRange(uint32_t region) {
  auto& range = rangeOf(region);
  for (Block* block = range.first; block != nullptr; block = block->upper) {
    if (block->isFree) unlink(*block);
  }
  range.removed = true;
  capacity -= range.bytes;
  if (range.inUse == 0) {
    for (Block* block = range.first; block != nullptr; block = block->upper) spare.add(block);
    range = ranges.back();
    ranges.removeLast();
  }
}

Arena::Block* Arena::findFit(size_t size) {
  uint index = classOf(size);

  // In the size's own class the blocks of a class that spans several sizes need not fit. The few
  // most recently freed are worth a look.
  bool takeDirty = size < LARGE_BLOCK || size > MAX_PAIRED_BLOCK;
  Block* dirty = nullptr;
  uint looked = 0;
  for (Block* block = classes[index]; block != nullptr && looked < 8; block = block->next) {
    if (block->size >= size) {
      if (takeDirty || block->dirty <= size / 2) return block;
      if (dirty == nullptr) dirty = block;
    }
    ++looked;
  }

  // Any block of a higher class fits. The lowest such class wastes least.
  for (uint i = (index + 1) / 64; i < kj::size(nonEmpty); i++) {
    uint64_t bits = nonEmpty[i];
    if (i == (index + 1) / 64) bits &= ~uint64_t(0) << ((index + 1) % 64);
    if (bits != 0) {
      Block* block = classes[i * 64 + __builtin_ctzll(bits)];
      if (dirty == nullptr || block->dirty <= size / 2) return block;
      break;
    }
  }
  return dirty;
}

bool Arena::mergeNeighbours() {
  bool merged = false;
  for (auto& range: ranges) {
    if (range.removed) continue;
    for (Block* block = range.first; block != nullptr; block = block->upper) {
      if (!block->isFree || block->upper == nullptr || !block->upper->isFree) continue;
      unlink(*block);
      while (block->upper != nullptr && block->upper->isFree) {
        Block* upper = block->upper;
        unlink(*upper);
        // Keep "zero beyond `dirty`" true without marking bytes that nobody wrote.
        if (upper->dirty > 0) {
          if (block->dirty == block->size) {
            block->dirty += upper->dirty;
          } else {
            memset(upper->start, 0, upper->dirty);
            faultPoint();
          }
        }
        block->size += upper->size;
        block->upper = upper->upper;
        if (block->upper != nullptr) block->upper->lower = block;
        spare.add(upper);
      }
      link(*block);
      merged = true;
    }
  }
  return merged;
}

kj::Maybe<Arena::Block&> Arena::tryAllocate(size_t bytes) {
  KJ_IREQUIRE(bytes > 0);
  size_t size = roundUpToLines(bytes);
  if (size < bytes || size > capacity) return nullptr;

  Block* found = findFit(size);
  if (found == nullptr && mergeNeighbours()) found = findFit(size);
  if (found == nullptr) {
    // Blocks of the very class that the short look did not reach.
    for (Block* block = classes[classOf(size)]; block != nullptr; block = block->next) {
      if (block->size >= size) {
        found = block;
        break;
      }
    }
    if (found == nullptr) return nullptr;
  }

  Block& block = *found;
  unlink(block);
  if (block.size > size) {
    Block& rest = newBlock();
    rest.start = block.start + size;
    rest.size = block.size - size;
    rest.dirty = block.dirty > size ? block.dirty - size : 0;
    rest.offset = block.offset + size;
    rest.region = block.region;
    rest.lower = &block;
    rest.upper = block.upper;
    if (rest.upper != nullptr) rest.upper->lower = &rest;
    block.upper = &rest;
    block.size = size;
    if (block.dirty > size) block.dirty = size;
    link(rest);
  }

  memset(block.start, 0, block.dirty);
  faultPoint();
  block.dirty = 0;
  bytesInUse += size;
  if (size >= LARGE_BLOCK) ++largeInUse;
  rangeOf(block.region).inUse += size;
  return block;
}

bool Arena::zeroSome(size_t limit) {
  for (uint i = 1; i <= REMEMBERED; i++) {
    Block*& entry = freedLately[(freedCount - i) % REMEMBERED];
    if (entry == nullptr) continue;
    if (entry->isFree && entry->dirty > 0) {
      // From the end, since what lies beyond `dirty` is zero.
      size_t rest = entry->dirty - kj::min(entry->dirty, limit);
      memset(entry->start + rest, 0, entry->dirty - rest);
      faultPoint();
      entry->dirty = rest;
      return true;
    }
    entry = nullptr;
  }
  return false;
}

void Arena::free(Block& block, size_t dirtyBytes) {
  KJ_IREQUIRE(!block.isFree && dirtyBytes <= block.size);
  bytesInUse -= block.size;
  auto& range = rangeOf(block.region);
  range.inUse -= block.size;
  block.dirty = dirtyBytes;

  if (block.size >= LARGE_BLOCK) --largeInUse;

  if (!range.removed) {
    link(block);
    if (dirtyBytes >= LARGE_BLOCK) freedLately[freedCount++ % REMEMBERED] = &block;
  } else if (range.inUse == 0) {
    for (Block* b = range.first; b != nullptr; b = b->upper) spare.add(b);
    range = ranges.back();
    ranges.removeLast();
  }
}

}  // namespace capnpshm
