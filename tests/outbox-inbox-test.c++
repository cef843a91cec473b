// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"

#include <gtest/gtest.h>
#include <kj/debug.h>

namespace capnpshm {
namespace testing {
namespace {

size_t baseline(Outbox& outbox) {
  // What an outbox of which nothing is in use has in its arena: the ring, if it has grown.
  return outbox.getRingBytes() > 64 * sizeof(DescriptorLine) ? outbox.getRingBytes() : 0;
}

struct Case {
  const char* name;
  EndOptions options;
  size_t largest;   // Of one piece of data.
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

Case makeCase(const char* name, bool inPlace, size_t first, size_t max, size_t accept,
              size_t largest, kj::uint freeEntries = 512) {
  Case result { name, EndOptions(), largest };
  result.options.inPlace = inPlace;
  result.options.firstRegionBytes = first;
  result.options.maxBytes = max;
  result.options.acceptBytes = accept;
  result.options.freeEntries = freeEntries;
  return result;
}

constexpr size_t K = 1024;

class RandomTraffic: public ::testing::TestWithParam<Case> {
protected:
  struct Direction {
    Direction(End& from, End& to): from(from), to(to) {}

    End& from;
    End& to;
    std::vector<Built> unsent;
    uint64_t nextNumber = 1;
    std::deque<uint64_t> sent;
    struct Held { uint64_t number; kj::Own<IncomingMessage> message; };
    std::vector<Held> held;
  };

  uint64_t seed = 0;
  size_t largest = 0;

  Shape shapeOf(uint64_t number) { return Shape::random(number, seed, largest); }

  bool takeOne(Direction& d, bool hold) {
    KJ_IF_MAYBE(message, d.to.take()) {
      EXPECT_FALSE(d.sent.empty());
      if (d.sent.empty()) return false;
      uint64_t number = d.sent.front();
      d.sent.pop_front();
      EXPECT_TRUE(matches(shapeOf(number), (*message)->getBody())) << "message " << number;
      if (hold) d.held.push_back({ number, kj::mv(*message) });
      return true;
    }
    return false;
  }

  void release(Direction& d, size_t index) {
    // Nobody wrote into it while it was held.
    EXPECT_TRUE(matches(shapeOf(d.held[index].number), d.held[index].message->getBody()));
    std::swap(d.held[index], d.held.back());
    d.held.pop_back();
  }

  template <typename Func>
  void settle(Pair& pair, Direction& d, Func&& onTaken) {
    // The peer takes everything and answers all announcements: then whatever waits is published,
    // whoever else holds what.
    uint idle = 0;
    for (;;) {
      pair.handleLetters();
      uint64_t before = d.from.outbox->getPosition();
      if (d.from.publishWaiting()) {
        while (takeOne(d, onTaken())) {}
        d.to.giveBack();
        break;
      }
      bool took = false;
      while (takeOne(d, onTaken())) took = true;
      d.to.giveBack();
      if (took || d.from.outbox->getPosition() != before || !d.to.mailbox.isEmpty()) {
        idle = 0;
      } else {
        ASSERT_LT(++idle, 8u) << "stuck with " << d.from.waiting.size() << " messages waiting, "
            << d.held.size() << " held, " << d.from.kept.size() << " builders kept, "
            << d.from.outbox->getArenaBytesInUse() << " bytes in use";
      }
    }
    EXPECT_TRUE(d.sent.empty());
    d.from.outbox->reclaim();
  }

  void step(Pair& pair, Direction& d, Random& random) {
    switch (random.below(10)) {
      case 0: case 1: case 2:
        if (d.unsent.size() < 12) d.unsent.push_back(d.from.newMessage(shapeOf(d.nextNumber++)));
        break;
      case 3: case 4:
        // In another order than they were built.
        if (!d.unsent.empty()) {
          std::swap(d.unsent[random.below(d.unsent.size())], d.unsent.back());
          if (random.percent(90)) {
            d.sent.push_back(d.unsent.back().number);
            d.from.keepBuilders = random.percent(25);
            d.from.waiting.push_back(kj::mv(d.unsent.back()));
            d.from.publishWaiting();
          }
          d.unsent.pop_back();
        }
        break;
      case 5: case 6:
        takeOne(d, d.held.size() < 40 && random.percent(40));
        break;
      case 7:
        if (!d.held.empty()) release(d, random.below(d.held.size()));
        if (!d.from.kept.empty() && random.percent(50)) {
          std::swap(d.from.kept[random.below(d.from.kept.size())], d.from.kept.back());
          d.from.kept.pop_back();
        }
        break;
      case 8:
        d.to.inbox->publishConsumed(random.percent(50));
        d.to.inbox->takeFreed();
        d.from.publishWaiting();
        break;
      case 9:
        if (random.percent(30)) {
          if (random.percent(50)) d.from.handleLetter(); else d.to.handleLetter();
        }
        if (random.percent(4)) settle(pair, d, [&]() { return random.percent(20); });
        break;
    }
    ASSERT_LE(d.from.outbox->getRegionBytes(), d.from.options.maxBytes);
  }
};

TEST_P(RandomTraffic, ArrivesByteForByte) {
  auto& param = GetParam();
  largest = param.largest;
  for (seed = 1; seed <= (SLOW ? 3 : 12); seed++) {
    Random random(seed);
    Pair pair(param.options);
    Direction directions[] = { { pair.a, pair.b }, { pair.b, pair.a } };
    for (uint i = 0; i < (SLOW ? 4000 : 20000); i++) {
      step(pair, directions[random.below(2)], random);
      if (HasFatalFailure() || HasFailure()) FAIL() << "seed " << seed << ", step " << i;
    }
    for (auto& d: directions) {
      settle(pair, d, [&]() { return false; });
      if (HasFailure()) FAIL() << "seed " << seed << ", at the end";
      while (!d.held.empty()) release(d, d.held.size() - 1);
      d.from.kept.clear();
      d.unsent.clear();
      d.to.giveBack();
      d.from.outbox->reclaim();
      EXPECT_EQ(baseline(*d.from.outbox), d.from.outbox->getArenaBytesInUse()) << "seed " << seed;
      EXPECT_EQ(0u, d.from.outbox->getRingBytesInUse());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, RandomTraffic, ::testing::Values(
    makeCase("Copy", false, 32 * K, 1024 * K, 65536 * K, 300 * K),
    makeCase("InPlace", true, 32 * K, 1024 * K, 65536 * K, 300 * K),
    makeCase("CopySmall", false, 32 * K, 64 * K, 65536 * K, 200 * K),
    makeCase("InPlaceSmall", true, 32 * K, 64 * K, 65536 * K, 200 * K),
    makeCase("CopyOneRegion", false, 16 * K, 16 * K, 65536 * K, 40 * K),
    makeCase("InPlaceOneRegion", true, 16 * K, 16 * K, 65536 * K, 40 * K),
    makeCase("CopyRefused", false, 32 * K, 1024 * K, 100 * K, 200 * K),
    makeCase("InPlaceRefused", true, 32 * K, 1024 * K, 100 * K, 200 * K),
    makeCase("InPlaceAllRefused", true, 32 * K, 1024 * K, 32 * K, 200 * K),
    makeCase("InPlaceFewHandles", true, 32 * K, 1024 * K, 65536 * K, 200 * K, 8)),
    [](const ::testing::TestParamInfo<Case>& info) { return info.param.name; });

// =======================================================================================

EndOptions inPlaceOptions() {
  EndOptions result;
  result.inPlace = true;
  return result;
}

TEST(OutboxInbox, OneMessageHeldWhileAMillionPass) {
  // In-place: the held one keeps its block, and nothing grows because of it.
  Pair pair(inPlaceOptions());
  constexpr uint64_t COUNT = SLOW ? 20000 : 1000000;
  auto shapeOf = [](uint64_t number) {
    return number % 2 ? Shape::inlined(number) : Shape::ofBytes(number, 200 + number % 1000);
  };

  auto held = Shape::ofBytes(0, 3000);
  ASSERT_TRUE(pair.a.send(held));
  auto message = KJ_ASSERT_NONNULL(pair.b.take());
  size_t bytes = 0;
  for (uint64_t i = 1; i <= COUNT; i++) {
    ASSERT_TRUE(pair.a.send(shapeOf(i))) << i;
    pair.handleLetters();
    {
      auto next = KJ_ASSERT_NONNULL(pair.b.take());
      if (i % 64 == 0) { ASSERT_TRUE(matches(shapeOf(i), next->getBody())); }
    }
    pair.b.giveBack();
    if (i == COUNT / 10) bytes = pair.a.outbox->getRegionBytes();
  }
  EXPECT_EQ(bytes, pair.a.outbox->getRegionBytes());
  EXPECT_TRUE(matches(held, message->getBody()));
  message = nullptr;
  pair.b.giveBack();
  pair.a.outbox->reclaim();
  EXPECT_EQ(baseline(*pair.a.outbox), pair.a.outbox->getArenaBytesInUse());
}

TEST(OutboxInbox, WhatThePeerIsDoneWithIsZeroedAhead) {
  // So that the next message of its size need not wait for it.
  for (bool inPlace: { false, true }) {
    auto options = inPlace ? inPlaceOptions() : EndOptions();
    options.firstRegionBytes = 1 << 20;
    Pair pair(options);
    constexpr size_t BYTES = 200000;
    ASSERT_TRUE(pair.a.send(Shape::ofBytes(1, BYTES)));
    EXPECT_FALSE(pair.a.outbox->prepare()) << "the peer reads it";
    KJ_ASSERT_NONNULL(pair.b.take());
    pair.b.giveBack();
    uint count = 0;
    while (pair.a.outbox->prepare()) { ASSERT_LT(++count, 100u); }
    EXPECT_GT(count, 1u) << "a little at a time";
    EXPECT_EQ(baseline(*pair.a.outbox), pair.a.outbox->getArenaBytesInUse());
    ASSERT_TRUE(pair.a.send(Shape::ofBytes(2, BYTES)));
    auto message = KJ_ASSERT_NONNULL(pair.b.take());
    EXPECT_TRUE(matches(Shape::ofBytes(2, BYTES), message->getBody()));
  }
}

TEST(OutboxInbox, FreeHandlesRunOut) {
  // With as many messages held as there are handles, the rest is copied and goes on.
  Pair pair(inPlaceOptions());
  std::vector<kj::Own<IncomingMessage>> held;
  for (uint64_t i = 0; i < 512; i++) {
    if (!pair.a.send(Shape::ofBytes(i, 200))) {
      pair.handleLetters();
      ASSERT_TRUE(pair.a.publishWaiting());
    }
    held.push_back(KJ_ASSERT_NONNULL(pair.b.take()));
    pair.b.giveBack();
    pair.handleLetters();
  }
  EXPECT_EQ(0u, pair.b.inbox->getCopiedBytes());
  size_t inUse = pair.a.outbox->getArenaBytesInUse();
  std::vector<kj::Own<IncomingMessage>> more;
  for (uint64_t i = 512; i < 2000; i++) {
    ASSERT_TRUE(pair.a.send(Shape::ofBytes(i, 200))) << i;
    more.push_back(KJ_ASSERT_NONNULL(pair.b.take()));
    pair.b.giveBack();
  }
  EXPECT_GT(pair.b.inbox->getCopiedBytes(), 1488u * 200);
  pair.a.outbox->reclaim();
  EXPECT_EQ(inUse, pair.a.outbox->getArenaBytesInUse());
  for (uint64_t i = 0; i < 512; i++) {
    EXPECT_TRUE(matches(Shape::ofBytes(i, 200), held[i]->getBody()));
  }
  for (uint64_t i = 512; i < 2000; i++) {
    EXPECT_TRUE(matches(Shape::ofBytes(i, 200), more[i - 512]->getBody()));
  }

  // When handles come back they are used again.
  uint64_t copied = pair.b.inbox->getCopiedBytes();
  held.clear();
  pair.b.giveBack();
  ASSERT_TRUE(pair.a.send(Shape::ofBytes(1, 200)));
  auto last = KJ_ASSERT_NONNULL(pair.b.take());
  EXPECT_EQ(copied, pair.b.inbox->getCopiedBytes());
}

TEST(OutboxInbox, HeldMessagesStallNothing) {
  // The peer holds everything it can get; messages of every size still pass.
  size_t ACCEPTED[] = { 32 * K, 64 * K, 65536 * K };
  size_t LIMITS[] = { 32 * K, 64 * K, 1024 * K };
  for (auto accepted: ACCEPTED) {
    for (auto limit: LIMITS) {
      EndOptions options = inPlaceOptions();
      options.maxBytes = limit;
      options.acceptBytes = accepted;
      Pair pair(options);
      pair.a.keepBuilders = true;
      std::vector<kj::Own<IncomingMessage>> held;
      auto pass = [&](const Shape& shape) {
        if (!pair.a.send(shape)) {
          for (uint i = 0; i < 100000 && !pair.a.publishWaiting(); i++) {
            pair.handleLetters();
            KJ_IF_MAYBE(m, pair.b.take()) held.push_back(kj::mv(*m));
            pair.b.giveBack();
          }
          ASSERT_TRUE(pair.a.waiting.empty()) << "accepted " << accepted << ", limit " << limit
              << ", held " << held.size() << ", message " << shape.number;
        }
        KJ_IF_MAYBE(m, pair.b.take()) held.push_back(kj::mv(*m));
        pair.b.giveBack();
        pair.handleLetters();
        ASSERT_TRUE(matches(shape, held.back()->getBody()));
      };
      for (uint64_t i = 0; i < 1000 && !HasFatalFailure(); i++) pass(Shape::ofBytes(i, 2000));
      if (!HasFatalFailure()) pass(Shape::ofBytes(1000, limit));
      if (!HasFatalFailure()) pass(Shape::foreign(1001, 500, 8));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(OutboxInbox, MessageInPartsNeedsLittleSharedMemory) {
  // However large it is: what is copied through small memory stays in the caches.
  EndOptions options;
  options.maxBytes = 64 << 20;
  options.acceptBytes = 64 << 20;
  Pair pair(options);
  auto shape = Shape::ofBytes(1, 100 << 20);
  ASSERT_FALSE(pair.a.send(shape));
  uint turns = 0;
  kj::Maybe<kj::Own<IncomingMessage>> message;
  while (message == nullptr) {
    ASSERT_LT(++turns, 1000u);
    pair.handleLetters();
    message = pair.b.take();
    pair.b.giveBack();
    pair.a.publishWaiting();
  }
  EXPECT_TRUE(matches(shape, KJ_ASSERT_NONNULL(message)->getBody()));
  EXPECT_LE(pair.a.outbox->getRegionBytes(), size_t(16) << 20);
  pair.a.outbox->reclaim();
  EXPECT_EQ(baseline(*pair.a.outbox), pair.a.outbox->getArenaBytesInUse());
}

void receiveThroughTheReserve(const Shape& shape, uint maxRounds) {
  // The first region is full of messages under construction, but for a small gap, and the peer
  // refuses every other one.
  EndOptions options;
  options.acceptBytes = options.firstRegionBytes;
  Pair pair(options);
  std::vector<Built> unsent;
  while (pair.a.outbox->getRegionCount() == 1) {
    unsent.push_back(pair.a.newMessage(Shape::ofBytes(1000 + unsent.size(), 2500)));
  }
  ASSERT_FALSE(pair.a.send(shape));
  uint rounds = 0;
  kj::Maybe<kj::Own<IncomingMessage>> message;
  while (message == nullptr) {
    ASSERT_LT(++rounds, maxRounds);
    pair.handleLetters();
    pair.a.publishWaiting();
    message = pair.b.take();
    pair.b.giveBack();
  }
  EXPECT_TRUE(matches(shape, KJ_ASSERT_NONNULL(message)->getBody()));
}

TEST(OutboxInbox, PartsDoNotGoThroughTinyGaps) {
  receiveThroughTheReserve(Shape::ofBytes(1, 300000), 300000 / 2000);
}

TEST(OutboxInbox, PartsSpanSegments) {
  receiveThroughTheReserve(Shape::foreign(1, 480, 16), 20);
}

TEST(OutboxInbox, LargeCopiesReuseWarmMemory) {
  EndOptions options;
  options.maxBytes = 64 << 20;
  Pair pair(options);
  auto receive = [&](uint64_t number) {
    auto shape = Shape::ofBytes(number, 2 << 20);
    if (!pair.a.send(shape)) {
      pair.handleLetters();
      EXPECT_TRUE(pair.a.publishWaiting());
    }
    auto message = KJ_ASSERT_NONNULL(pair.b.take());
    EXPECT_TRUE(matches(shape, message->getBody()));
    pair.b.giveBack();
    return message;
  };
  auto addressOf = [](IncomingMessage& message) {
    auto list = message.getBody().getAs<capnp::List<capnp::Data>>();
    return list[0].begin();
  };
  // For a few of them malloc() does. What is kept begins where a huge page could; malloc() has that
  // too by chance.
  auto isInHugePages = [](const byte* payload) {
    return reinterpret_cast<uintptr_t>(payload) % (2 << 20) < 256;
  };
  uint inHugePages = 0;
  for (uint64_t i = 0; i < 12; i++) inHugePages += isInHugePages(addressOf(*receive(i)));
  EXPECT_LT(inHugePages, 6u);
  const byte* first = addressOf(*receive(12));
  EXPECT_TRUE(isInHugePages(first));
  auto second = receive(13);
  EXPECT_EQ(first, addressOf(*second));
  EXPECT_NE(first, addressOf(*receive(14))) << "while a message has it, it is that message's";
}

TEST(OutboxInbox, CopiesDoNotLieJustBehindTheirSources) {
  // Both map their regions at page borders, so that the offset within a page of what was sent is
  // that of what was copied.
  Pair pair { EndOptions() };
  std::vector<kj::Array<byte>> holes;
  Random random(1);
  auto addressOf = [](auto&& body) {
    auto data = body.template getAs<capnp::List<capnp::Data>>()[0];
    return reinterpret_cast<uintptr_t>(data.begin());
  };
  for (uint64_t i = 0; i < 3000; i++) {
    auto shape = Shape::ofBytes(i, 4096 + random.below(4096));
    pair.a.waiting.push_back(pair.a.newMessage(shape));
    uintptr_t source = addressOf(pair.a.waiting.back().message->getBody());
    if (!pair.a.publishWaiting()) {
      pair.handleLetters();
      ASSERT_TRUE(pair.a.publishWaiting());
    }
    auto message = KJ_ASSERT_NONNULL(pair.b.take());
    ASSERT_TRUE(matches(shape, message->getBody()));
    uintptr_t distance = (addressOf(message->getBody()) - source) % 4096;
    ASSERT_TRUE(distance == 0 || distance >= 32) << distance << " of message " << i;
    pair.b.giveBack();
    // So that malloc() has something else for the next.
    if (holes.size() > 100) holes.erase(holes.begin() + random.below(holes.size()));
    holes.push_back(kj::heapArray<byte>(16 * (1 + random.below(500))));
  }
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
