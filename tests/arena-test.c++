// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"
#include <capnp-shm/arena.h>

#include <gtest/gtest.h>
#include <kj/debug.h>
#include <map>
#include <random>
#include <string.h>
#include <vector>

namespace capnpshm {
namespace {

kj::Array<byte> zeroed(size_t size) {
  auto result = kj::heapArray<byte>(size);
  memset(result.begin(), 0, size);
  return result;
}

TEST(Arena, ReusesTheWarmBlock) {
  auto memory = zeroed(4096);
  Arena arena;
  arena.addRange(0, 512, memory);
  auto& a = KJ_ASSERT_NONNULL(arena.tryAllocate(100));
  EXPECT_EQ(128u, a.bytes().size());
  EXPECT_EQ(512u, a.getOffset());
  auto& b = KJ_ASSERT_NONNULL(arena.tryAllocate(100));
  EXPECT_EQ(640u, b.getOffset());
  EXPECT_EQ(256u, arena.getBytesInUse());
  byte* begin = a.bytes().begin();
  arena.free(a, 0);
  auto& c = KJ_ASSERT_NONNULL(arena.tryAllocate(128));
  EXPECT_EQ(begin, c.bytes().begin());
  arena.free(b, 0);
  arena.free(c, 0);
  EXPECT_TRUE(arena.isUnused(0));
}

TEST(Arena, MergesWhenItMust) {
  auto memory = zeroed(1024);
  Arena arena;
  arena.addRange(0, 0, memory);
  std::vector<Arena::Block*> blocks;
  for (int i = 0; i < 16; i++) {
    blocks.push_back(&KJ_ASSERT_NONNULL(arena.tryAllocate(64)));
    memset(blocks.back()->bytes().begin(), 0xff, 64);
  }
  EXPECT_TRUE(arena.tryAllocate(1) == nullptr);
  for (auto block: blocks) arena.free(*block, 64);
  auto& whole = KJ_ASSERT_NONNULL(arena.tryAllocate(1024));
  for (auto b: whole.bytes()) ASSERT_EQ(0, b);
  arena.free(whole, 1024);
}

TEST(Arena, RandomOperationsAgainstModel) {
  // The model: which byte ranges are taken, and what each block's owner wrote into it.
  for (uint seed = 1; seed <= 8; seed++) {
    std::mt19937_64 random(seed);
    constexpr size_t SIZES[] = { 4096, 65536, 1 << 20 };
    kj::Array<byte> memories[3] = { zeroed(SIZES[0]), zeroed(SIZES[1]), zeroed(SIZES[2]) };
    Arena arena;
    size_t capacity = 0;
    for (uint32_t i = 0; i < 3; i++) {
      arena.addRange(i, 4096 * i, memories[i]);
      capacity += SIZES[i];
    }
    struct Taken { Arena::Block* block; size_t dirty; byte mark; };
    std::map<byte*, Taken> model;
    size_t inUse = 0;

    for (int step = 0; step < (SLOW ? 5000 : 20000); step++) {
      if (random() % 8 == 0) arena.zeroSome(random() % 8192);
      if (random() % 100 < 52) {
        size_t bytes = 1 + random() % (size_t(1) << (random() % 17));
        KJ_IF_MAYBE(block, arena.tryAllocate(bytes)) {
          auto range = block->bytes();
          ASSERT_GE(range.size(), bytes);
          ASSERT_LT(range.size(), bytes + CACHE_LINE);
          auto region = block->getRegion();
          ASSERT_EQ(memories[region].begin() + block->getOffset() - 4096 * region, range.begin());
          ASSERT_LE(range.end(), memories[region].end());
          for (auto b: range) ASSERT_EQ(0, b);

          auto after = model.lower_bound(range.begin());
          if (after != model.end()) { ASSERT_LE(range.end(), after->first); }
          if (after != model.begin()) {
            ASSERT_LE(std::prev(after)->second.block->bytes().end(), range.begin());
          }
          size_t dirty = random() % (range.size() + 1);
          byte mark = 1 + random() % 255;
          memset(range.begin(), mark, dirty);
          model[range.begin()] = Taken { block, dirty, mark };
          inUse += range.size();
        } else {
          // Refused only if there is truly no gap of that size.
          size_t needed = (bytes + 63) / 64 * 64;
          for (auto& memory: memories) {
            byte* position = memory.begin();
            auto i = model.lower_bound(memory.begin());
            for (; i != model.end() && i->first < memory.end(); ++i) {
              ASSERT_LT(size_t(i->first - position), needed);
              position = i->second.block->bytes().end();
            }
            ASSERT_LT(size_t(memory.end() - position), needed);
          }
        }
      } else if (!model.empty()) {
        auto i = model.begin();
        std::advance(i, random() % model.size());
        for (size_t j = 0; j < i->second.dirty; j++) ASSERT_EQ(i->second.mark, i->first[j]);
        inUse -= i->second.block->bytes().size();
        arena.free(*i->second.block, i->second.dirty);
        model.erase(i);
      }
      ASSERT_EQ(inUse, arena.getBytesInUse());
      ASSERT_EQ(capacity, arena.getCapacity());
    }
  }
}

TEST(Arena, BlocksAreCacheLines) {
  alignas(64) static byte memory[1 << 16];
  memset(memory, 0, sizeof(memory));
  Arena arena;
  arena.addRange(7, 1024, memory);
  std::mt19937_64 random(1);
  for (int i = 0; i < 100; i++) {
    KJ_IF_MAYBE(block, arena.tryAllocate(1 + random() % 1000)) {
      EXPECT_EQ(0u, block->getOffset() % CACHE_LINE);
      EXPECT_EQ(0u, block->bytes().size() % CACHE_LINE);
      EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(block->bytes().begin()) % CACHE_LINE);
      EXPECT_EQ(7u, block->getRegion());
    }
  }
  // Ends that are not on a line would share one with a neighbour.
  auto part = kj::arrayPtr(memory, 128);
  EXPECT_THROW(arena.addRange(8, 8, part), kj::Exception);
  EXPECT_THROW(arena.addRange(8, 0, part.slice(0, 100)), kj::Exception);
  EXPECT_THROW(arena.addRange(8, 0, part.slice(0, 0)), kj::Exception);
}

TEST(Arena, ZeroesExactlyWhatWasDirtied) {
  // Marks beyond the dirty bytes, which no user of the arena makes, show what it touches.
  auto memory = zeroed(4096);
  Arena arena;
  arena.addRange(0, 0, memory);
  auto& whole = KJ_ASSERT_NONNULL(arena.tryAllocate(4096));
  memset(memory.begin(), 0xff, 1000);
  arena.free(whole, 1000);
  memset(memory.begin() + 1000, 0xee, 3096);
  auto count = [&](byte value) {
    size_t result = 0;
    for (auto b: memory) result += b == value;
    return result;
  };

  // The first part of a block that is split, then the rest of it: dirt is not zeroed before its
  // place is handed out.
  auto& first = KJ_ASSERT_NONNULL(arena.tryAllocate(640));
  ASSERT_EQ(memory.begin(), first.bytes().begin());
  EXPECT_EQ(640u, count(0));
  EXPECT_EQ(360u, count(0xff));
  EXPECT_EQ(3096u, count(0xee));
  auto& second = KJ_ASSERT_NONNULL(arena.tryAllocate(640));
  ASSERT_EQ(memory.begin() + 640, second.bytes().begin());
  EXPECT_EQ(1000u, count(0));
  EXPECT_EQ(0u, count(0xff));
  EXPECT_EQ(3096u, count(0xee));

  // Nothing was written: nothing is zeroed.
  arena.free(first, 0);
  memset(first.bytes().begin(), 0xdd, 640);
  auto& again = KJ_ASSERT_NONNULL(arena.tryAllocate(640));
  ASSERT_EQ(memory.begin(), again.bytes().begin());
  EXPECT_EQ(640u, count(0xdd));
}

TEST(Arena, ZeroesLargeBlocksAhead) {
  constexpr size_t SIZE = 4 * Arena::LARGE_BLOCK;
  auto memory = zeroed(2 * SIZE);
  Arena arena;
  arena.addRange(0, 0, memory);
  auto& a = KJ_ASSERT_NONNULL(arena.tryAllocate(SIZE));
  auto& b = KJ_ASSERT_NONNULL(arena.tryAllocate(SIZE));
  EXPECT_EQ(2u, arena.getLargeBlocksInUse());
  EXPECT_FALSE(arena.zeroSome(SIZE)) << "they are in use";
  memset(memory.begin(), 0xff, memory.size());
  auto dirt = [&](size_t begin) {
    size_t result = 0;
    for (auto byte: memory.slice(begin, begin + SIZE)) result += byte != 0;
    return result;
  };

  arena.free(a, SIZE);
  EXPECT_EQ(1u, arena.getLargeBlocksInUse());
  EXPECT_TRUE(arena.zeroSome(Arena::LARGE_BLOCK));
  EXPECT_EQ(3 * Arena::LARGE_BLOCK, dirt(0)) << "no more than was asked for";
  for (uint i = 0; i < 3; i++) EXPECT_TRUE(arena.zeroSome(Arena::LARGE_BLOCK));
  EXPECT_FALSE(arena.zeroSome(Arena::LARGE_BLOCK));
  EXPECT_EQ(0u, dirt(0));
  EXPECT_EQ(SIZE, dirt(SIZE)) << "a neighbour in use";

  // What was zeroed is not zeroed again, and what was not, when it is handed out.
  memory[0] = 1;
  auto& again = KJ_ASSERT_NONNULL(arena.tryAllocate(SIZE));
  EXPECT_EQ(1, memory[0]);
  memory[0] = 0;
  arena.free(b, SIZE);
  EXPECT_TRUE(arena.zeroSome(CACHE_LINE));
  KJ_ASSERT_NONNULL(arena.tryAllocate(SIZE));
  EXPECT_EQ(0u, dirt(SIZE));
  EXPECT_FALSE(arena.zeroSome(SIZE)) << "in use again";
  EXPECT_EQ(2u, arena.getLargeBlocksInUse());

  // Small blocks, and those that nobody wrote into, are left alone.
  arena.free(again, 0);
  EXPECT_FALSE(arena.zeroSome(SIZE));
  auto& small = KJ_ASSERT_NONNULL(arena.tryAllocate(Arena::LARGE_BLOCK - CACHE_LINE));
  arena.free(small, small.bytes().size());
  EXPECT_FALSE(arena.zeroSome(SIZE));
}

TEST(Arena, WarmBeforeZeroedIfTwoDoNotFitIntoTheCaches) {
  for (size_t size: { Arena::MAX_PAIRED_BLOCK, Arena::MAX_PAIRED_BLOCK + CACHE_LINE }) {
    auto memory = zeroed(2 * size);
    Arena arena;
    arena.addRange(0, 0, memory);
    auto& zeroedBlock = KJ_ASSERT_NONNULL(arena.tryAllocate(size));
    auto& warm = KJ_ASSERT_NONNULL(arena.tryAllocate(size));
    arena.free(zeroedBlock, 0);
    memset(warm.bytes().begin(), 0xff, size);
    auto warmBytes = warm.bytes().begin();
    arena.free(warm, size);
    auto& next = KJ_ASSERT_NONNULL(arena.tryAllocate(size));
    EXPECT_EQ(size > Arena::MAX_PAIRED_BLOCK, next.bytes().begin() == warmBytes);
    for (auto b: next.bytes()) ASSERT_EQ(0, b);
  }
}

TEST(Arena, WarmBeforeCold) {
  auto memory = zeroed(1 << 20);
  Arena arena;
  arena.addRange(0, 0, memory);

  // Of several that fit, the one freed last.
  Arena::Block* blocks[4];
  for (auto& block: blocks) block = &KJ_ASSERT_NONNULL(arena.tryAllocate(192));
  for (uint i: { 2u, 0u, 3u, 1u }) arena.free(*blocks[i], 192);
  for (uint i: { 1u, 3u, 0u, 2u }) {
    auto& block = KJ_ASSERT_NONNULL(arena.tryAllocate(192));
    EXPECT_EQ(memory.begin() + 192 * i, block.bytes().begin());
  }

  // A workload of a few sizes, in whatever order they come and go, settles in the memory it has
  // touched: at worst, room for the most blocks of each size.
  constexpr size_t SIZES[] = { 64, 192, 448, 1024, 4096 };
  size_t bound = 0;
  for (size_t size: SIZES) bound += 21 * size;
  std::vector<Arena::Block*> taken;
  std::mt19937_64 random(5);
  byte* top = memory.begin();
  for (int i = 0; i < 200000; i++) {
    if (taken.size() < 20 || random() % 2) {
      taken.push_back(&KJ_ASSERT_NONNULL(arena.tryAllocate(SIZES[random() % kj::size(SIZES)])));
      top = kj::max(top, taken.back()->bytes().end());
    }
    if (taken.size() > 20) {
      std::swap(taken[random() % taken.size()], taken.back());
      arena.free(*taken.back(), taken.back()->bytes().size());
      taken.pop_back();
    }
  }
  EXPECT_LT(size_t(top - memory.begin()), bound);
}

TEST(Arena, RangesComeAndGoAgainstModel) {
  // As above, with regions added and retired at random, as an Outbox does.
  for (uint seed = 1; seed <= 6; seed++) {
    std::mt19937_64 random(seed);
    Arena arena;
    struct Range {
      kj::Array<byte> memory;
      uint64_t offset;
      bool removed;
      size_t inUse;
    };
    struct Taken { Arena::Block* block; size_t dirty; byte mark; };
    std::map<uint32_t, Range> ranges;
    std::vector<Taken> taken;
    uint32_t nextRegion = 0;
    size_t capacity = 0, inUse = 0;

    for (int step = 0; step < 6000; step++) {
      uint64_t dice = random() % 1000;
      if (dice % 8 == 0) arena.zeroSome(random() % 8192);
      if (dice < 5 || nextRegion == 0) {
        if (capacity > 1 << 19) continue;
        size_t size = (1 + random() % 1024) * CACHE_LINE;
        uint64_t offset = random() % 100 * CACHE_LINE;
        auto& range = ranges[nextRegion] = Range { zeroed(size), offset, false, 0 };
        arena.addRange(nextRegion++, offset, range.memory);
        capacity += size;
      } else if (dice < 9) {
        auto i = ranges.begin();
        if (i == ranges.end()) continue;
        std::advance(i, random() % ranges.size());
        if (i->second.removed) continue;
        arena.removeRange(i->first);
        i->second.removed = true;
        capacity -= i->second.memory.size();
      } else if (dice < 520) {
        size_t bytes = 1 + random() % (size_t(1) << (random() % 17));
        KJ_IF_MAYBE(block, arena.tryAllocate(bytes)) {
          auto& range = ranges.at(block->getRegion());
          ASSERT_FALSE(range.removed) << "allocated in a retired region";
          auto target = block->bytes();
          ASSERT_EQ(range.memory.begin() + (block->getOffset() - range.offset), target.begin());
          ASSERT_LE(target.end(), range.memory.end());
          ASSERT_EQ((bytes + 63) / 64 * 64, target.size());
          for (auto b: target) ASSERT_EQ(0, b);
          for (auto& other: taken) {
            ASSERT_TRUE(other.block->bytes().end() <= target.begin() ||
                        target.end() <= other.block->bytes().begin());
          }
          size_t dirty = random() % (target.size() + 1);
          byte mark = 1 + random() % 255;
          memset(target.begin(), mark, dirty);
          taken.push_back({ block, dirty, mark });
          range.inUse += target.size();
          inUse += target.size();
        }
      } else if (!taken.empty()) {
        std::swap(taken[random() % taken.size()], taken.back());
        auto last = taken.back();
        taken.pop_back();
        auto bytes = last.block->bytes();
        for (size_t j = 0; j < bytes.size(); j++) {
          ASSERT_EQ(j < last.dirty ? last.mark : 0, bytes[j]);
        }
        auto i = ranges.find(last.block->getRegion());
        i->second.inUse -= bytes.size();
        inUse -= bytes.size();
        arena.free(*last.block, last.dirty);
        // A retired region's memory is unmapped as soon as it is unused: the arena must not touch
        // it any more, which AddressSanitizer tells.
        if (i->second.removed && i->second.inUse == 0) {
          ASSERT_TRUE(arena.isUnused(i->first));
          ranges.erase(i);
        }
      }
      ASSERT_EQ(inUse, arena.getBytesInUse());
      ASSERT_EQ(capacity, arena.getCapacity());
      for (auto& range: ranges) {
        ASSERT_EQ(range.second.inUse == 0, arena.isUnused(range.first));
      }
    }
    EXPECT_GT(nextRegion, 10u);
  }
}

TEST(Arena, RemovedRangeIsForgottenWithItsLastBlock) {
  auto first = zeroed(1024), second = zeroed(1024);
  Arena arena;
  arena.addRange(0, 0, first);
  auto& a = KJ_ASSERT_NONNULL(arena.tryAllocate(512));
  arena.removeRange(0);
  EXPECT_EQ(0u, arena.getCapacity());
  EXPECT_TRUE(arena.tryAllocate(64) == nullptr);
  EXPECT_FALSE(arena.isUnused(0));
  arena.addRange(1, 0, second);
  EXPECT_EQ(1u, KJ_ASSERT_NONNULL(arena.tryAllocate(64)).getRegion());
  arena.free(a, 512);
  EXPECT_TRUE(arena.isUnused(0));
  EXPECT_EQ(64u, arena.getBytesInUse());
}

}  // namespace
}  // namespace capnpshm
