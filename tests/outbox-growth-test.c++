// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"

#include <gtest/gtest.h>
#include <kj/debug.h>

// When an Outbox does without a new region, and how messages travel then; see
// Outbox::isWorthGrowing().

namespace capnpshm {
namespace testing {
namespace {

constexpr size_t LARGE = 64 * 1024;

EndOptions optionsWith(size_t growAtOnceBytes, bool inPlace = false) {
  EndOptions options;
  options.maxBytes = 64 << 20;
  options.inPlace = inPlace;
  options.growAtOnceBytes = growAtOnceBytes;
  return options;
}

void pass(Pair& pair, const Shape& shape) {
  // One message from `a` to `b`, however many turns it takes.
  bool published = pair.a.send(shape);
  for (uint turn = 0; turn < 1000; turn++) {
    KJ_IF_MAYBE(message, pair.b.take()) {
      EXPECT_TRUE(published);
      EXPECT_TRUE(matches(shape, (*message)->getBody()));
      break;
    }
    pair.b.giveBack();
    pair.handleLetters();
    if (!published) published = pair.a.publishWaiting();
  }
  EXPECT_TRUE(published);
  pair.b.giveBack();
}

TEST(OutboxGrowth, WaitsForTheNinthMessage) {
  for (bool inPlace: { false, true }) {
    Pair pair(optionsWith(8 << 20, inPlace));
    for (uint i = 0; i < 8; i++) {
      pass(pair, Shape::ofBytes(i, LARGE));
      EXPECT_EQ(1u, pair.a.outbox->getRegionCount()) << i;
    }
    EXPECT_GE(pair.a.outbox->getFigures().copiedBytes, 8 * LARGE) << "they went in parts";
    pass(pair, Shape::ofBytes(8, LARGE));
    EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
    uint64_t copied = pair.a.outbox->getFigures().copiedBytes;
    pass(pair, Shape::ofBytes(9, LARGE));
    EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
    EXPECT_LT(pair.a.outbox->getFigures().copiedBytes, copied + LARGE) << "built in the region";
  }
}

TEST(OutboxGrowth, SmallerMessagesCountLess) {
  // What was short before pays for a region of the size that is short now.
  Pair pair(optionsWith(8 << 20));
  pass(pair, Shape::ofBytes(0, 4 * LARGE));
  EXPECT_EQ(1u, pair.a.outbox->getRegionCount());
  pass(pair, Shape::ofBytes(1, LARGE / 2));
  EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
}

TEST(OutboxGrowth, DoesNotWaitForWhatIsLargeEnough) {
  Pair pair(optionsWith(LARGE));
  pass(pair, Shape::ofBytes(0, LARGE));
  EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
}

TEST(OutboxGrowth, DoesNotWaitForMoreThanThatInAll) {
  Pair pair(optionsWith(LARGE + LARGE / 2));
  pass(pair, Shape::ofBytes(0, LARGE));
  EXPECT_EQ(1u, pair.a.outbox->getRegionCount());
  pass(pair, Shape::ofBytes(1, LARGE));
  EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
}

TEST(OutboxGrowth, SleepsEndIt) {
  Pair pair(optionsWith(8 << 20));
  auto shape = Shape::ofBytes(0, 4 * LARGE);
  ASSERT_FALSE(pair.a.send(shape));
  for (uint i = 0; i < 3; i++) {
    ASSERT_TRUE(pair.b.take() == nullptr);
    pair.b.giveBack();
    EXPECT_FALSE(pair.a.publishWaiting());
    EXPECT_EQ(1u, pair.a.outbox->getRegionCount());
    pair.a.outbox->sleptForRoom();
  }
  ASSERT_TRUE(pair.b.take() == nullptr);
  pair.b.giveBack();
  EXPECT_FALSE(pair.a.publishWaiting());
  EXPECT_EQ(2u, pair.a.outbox->getRegionCount());
  pair.handleLetters();
  EXPECT_TRUE(pair.a.publishWaiting()) << "it is large enough for the rest";
  EXPECT_TRUE(matches(shape, KJ_ASSERT_NONNULL(pair.b.take())->getBody()));
}

TEST(OutboxGrowth, OneMessageAsksManyTimesAndCountsOnce) {
  Pair pair(optionsWith(8 << 20));
  auto shape = Shape::ofBytes(0, LARGE);
  ASSERT_FALSE(pair.a.send(shape));
  for (uint i = 0; i < 100; i++) {
    EXPECT_FALSE(pair.a.publishWaiting());
    EXPECT_EQ(1u, pair.a.outbox->getRegionCount());
  }
}

TEST(OutboxGrowth, PartsAreReadWhileFurtherOnesAreWritten) {
  Pair pair(optionsWith(8 << 20));
  ASSERT_FALSE(pair.a.send(Shape::ofBytes(0, LARGE)));
  EXPECT_GE(pair.a.outbox->getRingBytesInUse() / sizeof(DescriptorLine), 5u)
      << "the beginning and several parts, not one that fills all room";
  ASSERT_FALSE(pair.a.outbox->hasNews());
  ASSERT_TRUE(pair.b.take() == nullptr);
  EXPECT_TRUE(pair.a.outbox->hasNews()) << "room before the message is complete";
  EXPECT_TRUE(pair.b.inbox->takeFreed()) << "of which a sleeping peer must be told";
  EXPECT_FALSE(pair.b.inbox->takeFreed());
  uint64_t position = pair.a.outbox->getPosition();
  EXPECT_FALSE(pair.a.publishWaiting());
  EXPECT_GT(pair.a.outbox->getPosition(), position);
}

TEST(OutboxGrowth, WhatCanNeverFitDoesNotWaitForRoom) {
  // The peer has not consumed a small message yet.
  Pair pair(optionsWith(8 << 20));
  pair.a.send(Shape::ofBytes(0, 1000));
  uint64_t position = pair.a.outbox->getPosition();
  ASSERT_FALSE(pair.a.send(Shape::ofBytes(1, LARGE)));
  EXPECT_GT(pair.a.outbox->getPosition(), position) << "it has begun";
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
