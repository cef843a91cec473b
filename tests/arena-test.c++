// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

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

    for (int step = 0; step < 20000; step++) {
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
