// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"

#include <gtest/gtest.h>
#include <kj/debug.h>

// How an Outbox gets more memory when it is short of it, and gives it back.

namespace capnpshm {
namespace testing {
namespace {

TEST(OutboxRegions, RingGrowsAndGivesTheOldOneBack) {
  // The peer takes nothing for long, again and again: JUMP leads to ever larger rings.
  EndOptions options;
  Pair pair(options);
  uint64_t sent = 0, taken = 0;
  size_t bytes = 0;
  uint jumps = 0;
  for (uint round = 0; round < 400; round++) {
    for (uint i = 0; i < 300; i++) {
      auto shape = sent % 8 == 0 ? Shape::ofBytes(sent, 300) : Shape::inlined(sent);
      ++sent;
      pair.a.send(shape);
      pair.handleLetters();
      if (pair.a.outbox->getRingBytes() != bytes) ++jumps;
      bytes = pair.a.outbox->getRingBytes();
    }
    while (taken < sent) {
      pair.a.publishWaiting();
      pair.handleLetters();
      KJ_IF_MAYBE(message, pair.b.take()) {
        auto shape = taken % 8 == 0 ? Shape::ofBytes(taken, 300) : Shape::inlined(taken);
        ASSERT_TRUE(matches(shape, (*message)->getBody())) << taken;
        ++taken;
      } else {
        pair.b.giveBack();
      }
    }
    pair.b.giveBack();
  }
  EXPECT_GE(jumps, 3u) << "or the test tests nothing";
  EXPECT_GE(bytes, 1024 * sizeof(DescriptorLine));
  pair.a.outbox->reclaim();
  EXPECT_EQ(bytes, pair.a.outbox->getArenaBytesInUse());
}

TEST(OutboxRegions, UnusedRegionsAreRetired) {
  // After a burst, calls of any kind give the memory back sooner or later.
  for (bool inPlace: { false, true }) {
    for (uint byReferenceEvery: { 1u, 2u, 0u }) {
      EndOptions options;
      options.inPlace = inPlace;
      options.maxBytes = 4 << 20;
      Pair pair(options);
      for (uint i = 0; i < 4; i++) pair.a.waiting.push_back(
          pair.a.newMessage(Shape::ofBytes(i, 300000)));
      for (uint i = 0; i < 4;) {
        pair.a.publishWaiting();
        pair.handleLetters();
        KJ_IF_MAYBE(message, pair.b.take()) {
          ASSERT_TRUE(matches(Shape::ofBytes(i, 300000), (*message)->getBody()));
          ++i;
        }
        pair.b.giveBack();
      }
      ASSERT_GT(pair.a.outbox->getRegionCount(), 2u);
      for (uint64_t i = 0; i < 20000; i++) {
        bool small = byReferenceEvery == 0 || i % byReferenceEvery != 0;
        auto shape = small ? Shape::inlined(i) : Shape::ofBytes(i, 300);
        ASSERT_TRUE(pair.a.send(shape));
        ASSERT_TRUE(matches(shape, KJ_ASSERT_NONNULL(pair.b.take())->getBody()));
        pair.b.giveBack();
      }
      // Not all: a region in which the small messages live now stays.
      EXPECT_LE(pair.a.outbox->getRegionCount(), byReferenceEvery == 0 ? 1u : 2u)
          << "in place: " << inPlace << ", by reference every " << byReferenceEvery;
    }
  }
}

TEST(OutboxRegions, RareBurstsDoNotMakeAndRetireRegionsForEver) {
  EndOptions options;
  options.maxBytes = 64 << 20;
  Pair pair(options);
  uint made = 0;
  size_t before = 0;
  for (uint64_t burst = 0; burst < 20; burst++) {
    pair.a.waiting.push_back(pair.a.newMessage(Shape::ofBytes(burst, 300000)));
    for (bool arrived = false; !arrived;) {
      pair.a.publishWaiting();
      pair.handleLetters();
      arrived = pair.b.take() != nullptr;
      pair.b.giveBack();
    }
    if (pair.a.outbox->getRegionBytes() > before) ++made;
    for (uint64_t i = 0; i < 10000; i++) {
      ASSERT_TRUE(pair.a.send(Shape::inlined(i)));
      ASSERT_TRUE(pair.b.take() != nullptr);
      pair.b.giveBack();
    }
    before = pair.a.outbox->getRegionBytes();
  }
  EXPECT_GT(made, 1u);
  EXPECT_LT(made, 10u);
}

TEST(OutboxRegions, RegionsAreAnnouncedInOrder) {
  // Also when retiring another one has moved them about in the outbox's list.
  EndOptions options;
  options.maxBytes = 256 << 20;
  options.acceptBytes = 256 << 20;
  Pair pair(options);
  auto sizeOf = [](uint number) {
    // Too large for what is left of a region that was made for two of the one before.
    size_t result = 40000;
    for (uint i = 0; i < number; i++) result *= 3;
    return result;
  };
  auto exchange = [&](const Shape& shape) {
    pair.a.waiting.push_back(pair.a.newMessage(shape));
    for (;;) {
      pair.a.publishWaiting();
      pair.handleLetters();
      KJ_IF_MAYBE(message, pair.b.take()) {
        ASSERT_TRUE(matches(shape, (*message)->getBody()));
        pair.b.giveBack();
        return;
      }
    }
  };
  exchange(Shape::ofBytes(0, 50000));
  ASSERT_EQ(pair.a.outbox->getRegionCount(), 2u);

  // More new regions than may be unanswered.
  std::vector<Built> held;
  for (uint i = 1; i <= 6; i++) {
    held.push_back(pair.a.newMessage(Shape::ofBytes(i, sizeOf(i))));
    ASSERT_EQ(pair.a.outbox->getRegionCount(), i + 2);
  }
  for (uint i = 0; i < 6000; i++) {
    ASSERT_TRUE(pair.a.send(Shape::inlined(i)));
    ASSERT_TRUE(pair.b.take() != nullptr);
    pair.b.giveBack();
  }
  ASSERT_EQ(pair.a.outbox->getRegionCount(), 7u);  // The unused one was retired.
  for (auto& built: held) pair.a.waiting.push_back(kj::mv(built));
  for (uint i = 1; i <= 6;) {
    pair.a.publishWaiting();
    pair.handleLetters();
    KJ_IF_MAYBE(message, pair.b.take()) {
      ASSERT_TRUE(matches(Shape::ofBytes(i, sizeOf(i)), (*message)->getBody()));
      ++i;
    }
    pair.b.giveBack();
  }
}

TEST(OutboxRegions, RegionThatNothingNeedsIsNotAnnounced) {
  EndOptions options;
  options.maxBytes = 4 << 20;
  Pair pair(options);
  size_t before = pair.a.outbox->getRegionBytes();
  pair.a.newMessage(Shape::ofBytes(1, 300000));  // And dropped.
  ASSERT_GT(pair.a.outbox->getRegionBytes(), before);
  for (uint i = 0; i < 6000; i++) {
    ASSERT_TRUE(pair.a.send(Shape::inlined(i)));
    ASSERT_TRUE(pair.b.take() != nullptr);
    pair.b.giveBack();
  }
  EXPECT_TRUE(pair.b.mailbox.isEmpty());
  EXPECT_EQ(pair.a.outbox->getRegionBytes(), before);

  auto shape = Shape::ofBytes(2, 300000);
  EXPECT_FALSE(pair.a.send(shape));
  pair.handleLetters();
  EXPECT_TRUE(pair.a.publishWaiting());
  EXPECT_TRUE(matches(shape, KJ_ASSERT_NONNULL(pair.b.take())->getBody()));
}

TEST(OutboxRegions, BurstsOverAndOver) {
  // Growth and retirement in turns; what is retired counts, so that it does not go on for ever.
  EndOptions options;
  options.maxBytes = 1 << 20;
  Pair pair(options);
  uint64_t number = 0;
  for (uint round = 0; round < 12; round++) {
    for (uint i = 0; i < 3; i++) {
      auto shape = Shape::ofBytes(++number, 200000);
      pair.a.waiting.push_back(pair.a.newMessage(shape));
      for (bool taken = false; !taken;) {
        pair.a.publishWaiting();
        pair.handleLetters();
        KJ_IF_MAYBE(message, pair.b.take()) {
          ASSERT_TRUE(matches(shape, (*message)->getBody()));
          taken = true;
        }
        pair.b.giveBack();
      }
    }
    for (uint i = 0; i < 6000; i++) {
      auto shape = Shape::ofBytes(++number, 300);
      ASSERT_TRUE(pair.a.send(shape));
      ASSERT_TRUE(matches(shape, KJ_ASSERT_NONNULL(pair.b.take())->getBody()));
      pair.b.giveBack();
    }
    ASSERT_LE(pair.a.outbox->getRegionBytes(), options.maxBytes);
  }
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
