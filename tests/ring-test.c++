// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"
#include <capnp-shm/ring.h>

#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <kj/vector.h>
#include <atomic>
#include <deque>
#include <random>
#include <thread>
#include <vector>

namespace capnpshm {
namespace {

struct RingMemory {
  // Zeroed, aligned lines, as a fresh region has them.
  explicit RingMemory(size_t count): count(count), lines(new DescriptorLine[count]()) {}
  ~RingMemory() { delete[] lines; }
  KJ_DISALLOW_COPY(RingMemory);

  size_t count;
  DescriptorLine* lines;
  kj::ArrayPtr<DescriptorLine> asPtr() { return kj::arrayPtr(lines, count); }
};

DescriptorHead message(uint inlineWords = 0) {
  return { DescriptorKind::MESSAGE, 0, 1, 0, uint16_t(inlineWords) };
}

kj::String failure(kj::Function<void()> func) {
  KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { func(); })) {
    return kj::str(e->getDescription());
  }
  return kj::str("no exception");
}

TEST(Ring, EmptyThenOne) {
  RingMemory memory(16);
  DescriptorProducer producer(memory.asPtr());
  DescriptorConsumer consumer(memory.asPtr());
  Descriptor descriptor;
  EXPECT_FALSE(consumer.isReady());
  EXPECT_FALSE(consumer.tryTake(descriptor));

  uint64_t body[] = { 7, 8, 9 };
  producer.publish(message(3), body);
  EXPECT_TRUE(consumer.isReady());
  ASSERT_TRUE(consumer.tryTake(descriptor));
  EXPECT_EQ(1, descriptor.head.lines);
  EXPECT_EQ(3, descriptor.head.inlineWords);
  EXPECT_EQ(9u, descriptor.body[2]);
  EXPECT_FALSE(consumer.tryTake(descriptor));
}

TEST(Ring, RandomTrafficAgainstModel) {
  // Many laps with bodies of all lengths; payload that looks like stamps of any position.
  std::mt19937_64 random(1);
  RingMemory memory(32);
  DescriptorProducer producer(memory.asPtr());
  DescriptorConsumer consumer(memory.asPtr());
  std::deque<std::vector<uint64_t>> model;
  Descriptor descriptor;

  for (int step = 0; step < 200000; step++) {
    if (random() % 2) {
      std::vector<uint64_t> body(random() % (MAX_BODY_WORDS + 1));
      for (auto& word: body) word = headStamp(producer.getPosition() + random() % 64);
      if (producer.hasRoom(linesForBody(body.size()))) {
        producer.publish(message(), kj::arrayPtr(body.data(), body.size()));
        model.push_back(body);
      } else {
        producer.updateConsumed(consumer.getPosition());
      }
    } else if (consumer.tryTake(descriptor)) {
      ASSERT_FALSE(model.empty());
      auto& expected = model.front();
      ASSERT_LE(expected.size(), descriptor.bodyWords);
      for (size_t i = 0; i < expected.size(); i++) ASSERT_EQ(expected[i], descriptor.body[i]);
      model.pop_front();
    } else {
      ASSERT_TRUE(model.empty());
    }
  }
}

TEST(Ring, FullRingKeepsALineForJump) {
  RingMemory memory(16), bigger(64);
  DescriptorProducer producer(memory.asPtr());
  DescriptorConsumer consumer(memory.asPtr());
  uint published = 0;
  while (producer.hasRoom(1)) {
    uint64_t body[] = { published++ };
    producer.publish(message(), body);
  }
  EXPECT_EQ(15u, published);
  producer.jump({ 3, 64 * 8, 4096 }, bigger.asPtr());
  uint64_t last[] = { 99 };
  ASSERT_TRUE(producer.hasRoom(1));
  producer.publish(message(), last);

  Descriptor descriptor;
  for (uint i = 0; i < published; i++) {
    ASSERT_TRUE(consumer.tryTake(descriptor));
    EXPECT_EQ(i, descriptor.body[0]);
  }
  ASSERT_TRUE(consumer.tryTake(descriptor));
  EXPECT_EQ(DescriptorKind::JUMP, descriptor.head.kind);
  auto entry = SegmentEntry::unpack(descriptor.body[0], descriptor.body[1]);
  EXPECT_EQ(3u, entry.region);
  EXPECT_EQ(512u, entry.words);
  EXPECT_EQ(4096u, entry.offset);
  EXPECT_FALSE(consumer.tryTake(descriptor));
  consumer.jump(bigger.asPtr());
  ASSERT_TRUE(consumer.tryTake(descriptor));
  EXPECT_EQ(99u, descriptor.body[0]);
}

TEST(Ring, RefusesImpossibleValues) {
  RingMemory memory(16);
  DescriptorProducer producer(memory.asPtr());
  DescriptorConsumer consumer(memory.asPtr());
  Descriptor descriptor;

  memory.lines[0].stamp.store(headStamp(17));
  EXPECT_TRUE(consumer.isReady()) << "a broken ring must wake the reader";
  EXPECT_NE(nullptr, strstr(failure([&]() { consumer.tryTake(descriptor); }).cStr(),
      "impossible stamp"));

  uint64_t body[20] = {};
  producer.publish(message(), body);
  memory.lines[1].stamp.store(headStamp(17));
  EXPECT_NE(nullptr, strstr(failure([&]() { consumer.tryTake(descriptor); }).cStr(),
      "wrong continuation"));
  memory.lines[0].words[0].store(message().pack());
  EXPECT_NE(nullptr, strstr(failure([&]() { consumer.tryTake(descriptor); }).cStr(),
      "impossible length"));

  EXPECT_NE(nullptr, strstr(failure([&]() { producer.updateConsumed(20); }).cStr(),
      "not published"));
  producer.updateConsumed(19);
  EXPECT_NE(nullptr, strstr(failure([&]() { producer.updateConsumed(18); }).cStr(),
      "went backwards"));
}

TEST(Ring, FreeRing) {
  SharedWord entries[8] = {};
  SharedWord freed{0};
  FreeProducer producer(kj::arrayPtr(entries, 8), freed);
  FreeConsumer consumer(kj::arrayPtr(entries, 8), freed);
  EXPECT_FALSE(consumer.isReady());
  for (uint64_t lap = 0; lap < 100; lap++) {
    for (uint64_t i = 0; i < 8; i++) producer.push(lap * 10 + i);
    for (uint64_t i = 0; i < 8; i++) {
      EXPECT_EQ(lap * 10 + i, KJ_ASSERT_NONNULL(consumer.tryPop(8 - i)));
    }
    EXPECT_TRUE(consumer.tryPop(8) == nullptr);
  }
  producer.push(1);
  EXPECT_NE(nullptr, strstr(failure([&]() { consumer.tryPop(0); }).cStr(), "impossible"));
}

TEST(Ring, WrapsAtEveryAlignment) {
  // A descriptor of each length at each place of the ring, so that it also lies across the end,
  // over whatever the lap before left there.
  for (size_t size: { 16, 32, 64 }) {
    for (uint start = 0; start < size; start++) {
      for (uint lines = 1; lines <= MAX_DESCRIPTOR_LINES; lines++) {
        RingMemory memory(size);
        DescriptorProducer producer(memory.asPtr());
        DescriptorConsumer consumer(memory.asPtr());
        Descriptor descriptor;
        auto pass = [&](uint bodyWords, uint64_t seed) {
          uint64_t body[MAX_BODY_WORDS];
          for (uint i = 0; i < bodyWords; i++) body[i] = seed + i;
          ASSERT_TRUE(producer.hasRoom(linesForBody(bodyWords)));
          producer.publish(message(), kj::arrayPtr(body, bodyWords));
          ASSERT_TRUE(consumer.tryTake(descriptor));
          ASSERT_EQ(linesForBody(bodyWords), descriptor.head.lines);
          for (uint i = 0; i < bodyWords; i++) ASSERT_EQ(seed + i, descriptor.body[i]);
          ASSERT_FALSE(consumer.isReady());
          ASSERT_FALSE(consumer.tryTake(descriptor));
          producer.updateConsumed(consumer.getPosition());
        };
        for (uint i = 0; i < start; i++) pass(i % HEAD_BODY_WORDS, i);
        for (uint lap = 0; lap < 3; lap++) {
          pass(bodyCapacity(lines), lap * 1000 + 1);
          // One word less leaves an old word in the last line; it is padding.
          pass(bodyCapacity(lines) - 1, lap * 1000 + 500);
        }
        ASSERT_EQ(size + start + 6 * lines, producer.getPosition());
      }
    }
  }
}

TEST(Ring, StampsOfEarlierLapsAreNeverTaken) {
  // Fill the whole ring with heads, or with as many continuations as it can hold, in two laps; then
  // let the reader come to each of those lines before it is written again.
  for (uint lines: { 1u, 2u, 5u, MAX_DESCRIPTOR_LINES }) {
    RingMemory memory(16);
    DescriptorProducer producer(memory.asPtr());
    DescriptorConsumer consumer(memory.asPtr());
    Descriptor descriptor;
    uint64_t body[MAX_BODY_WORDS];
    uint taken = 0;
    for (uint step = 0; step < 200; step++) {
      // The payload looks like what the reader waits for, now and a lap later.
      for (uint i = 0; i < MAX_BODY_WORDS; i++) {
        body[i] = headStamp(producer.getPosition() + (i % 2 ? 16 : 0) + i / 2);
      }
      uint length = step % 7 == 6 ? 1 : lines;
      producer.publish(message(), kj::arrayPtr(body, bodyCapacity(length)));
      ASSERT_TRUE(consumer.tryTake(descriptor));
      ++taken;
      ASSERT_FALSE(consumer.isReady()) << "at " << consumer.getPosition();
      ASSERT_FALSE(consumer.tryTake(descriptor));
      producer.updateConsumed(consumer.getPosition());
    }
    EXPECT_EQ(200u, taken);
    EXPECT_EQ(producer.getPosition(), consumer.getPosition());
  }

  // Every stamp that an earlier lap may have left means "nothing yet", every other is refused.
  RingMemory memory(16);
  DescriptorConsumer consumer(memory.asPtr(), 160);
  Descriptor descriptor;
  for (uint64_t position = 0; position < 400; position++) {
    for (uint64_t stamp: { headStamp(position), continuationStamp(position) }) {
      if (stamp == headStamp(160)) continue;
      memory.lines[0].stamp.store(stamp);
      if (position < 160) {
        ASSERT_FALSE(consumer.isReady()) << stamp;
        ASSERT_FALSE(consumer.tryTake(descriptor)) << stamp;
      } else {
        ASSERT_TRUE(consumer.isReady()) << stamp;
        ASSERT_THROW(consumer.tryTake(descriptor), kj::Exception) << stamp;
      }
    }
  }
}

TEST(Ring, PositionsBeyondTheRangeOfStamps) {
  // No connection gets there (see headStamp()), but if one did it would lose nothing. Across the
  // place where the stamp's shift loses its first bit, and the next.
  for (uint64_t wrap: { uint64_t(1) << 62, uint64_t(1) << 63 }) {
    std::mt19937_64 random(7);
    RingMemory memory(16);
    DescriptorProducer producer(memory.asPtr(), wrap - 160);
    DescriptorConsumer consumer(memory.asPtr(), wrap - 160);
    std::deque<std::pair<uint64_t, uint>> model;
    Descriptor descriptor;
    uint64_t sequence = 0;
    while (consumer.getPosition() < wrap + 1600) {
      if (random() % 2) {
        uint bodyWords = 1 + random() % MAX_BODY_WORDS;
        if (!producer.hasRoom(linesForBody(bodyWords))) {
          producer.updateConsumed(consumer.getPosition());
          continue;
        }
        std::vector<uint64_t> body(bodyWords, ++sequence);
        producer.publish(message(), kj::arrayPtr(body.data(), bodyWords));
        model.push_back({ sequence, bodyWords });
      } else {
        ASSERT_EQ(!model.empty(), consumer.isReady()) << consumer.getPosition();
        ASSERT_EQ(!model.empty(), consumer.tryTake(descriptor)) << consumer.getPosition();
        if (model.empty()) continue;
        ASSERT_EQ(linesForBody(model.front().second), descriptor.head.lines);
        for (uint i = 0; i < model.front().second; i++) {
          ASSERT_EQ(model.front().first, descriptor.body[i]);
        }
        model.pop_front();
      }
    }
  }

  // Up to there every line has stamps of its own, in the order of positions.
  constexpr uint64_t LAST = (uint64_t(1) << 62) - 1;
  static_assert(headStamp(LAST - 1) < headStamp(LAST), "monotonic");
  static_assert(continuationStamp(LAST - 1) < headStamp(LAST), "monotonic");
  static_assert(headStamp(LAST) != continuationStamp(LAST), "different");
  static_assert(headStamp(LAST) >> 2 == LAST && continuationStamp(LAST) >> 2 == LAST, "whole");
}

TEST(Ring, FreeRingWrapsAtEveryAlignment) {
  std::mt19937_64 random(3);
  for (size_t size: { 1, 2, 8, 64 }) {
    auto entries = kj::heapArray<SharedWord>(size);
    for (auto& entry: entries) entry.store(0);
    SharedWord freed{0};
    FreeProducer producer(entries, freed);
    FreeConsumer consumer(entries, freed);
    EXPECT_EQ(size, consumer.getCapacity());
    std::deque<uint64_t> model;
    for (uint step = 0; step < 20000; step++) {
      if (random() % 2 && model.size() < size) {
        uint64_t handle = random();
        producer.push(handle);
        model.push_back(handle);
      }
      if (random() % 2) {
        ASSERT_EQ(!model.empty(), consumer.isReady());
        KJ_IF_MAYBE(handle, consumer.tryPop(model.size())) {
          ASSERT_FALSE(model.empty());
          ASSERT_EQ(model.front(), *handle);
          model.pop_front();
        } else {
          ASSERT_TRUE(model.empty());
        }
      }
    }
  }
}

TEST(Ring, FreeRingRefusesImpossibleCounts) {
  SharedWord entries[4] = {};
  SharedWord freed{0};
  FreeProducer producer(kj::arrayPtr(entries, 4), freed);
  FreeConsumer consumer(kj::arrayPtr(entries, 4), freed);
  auto pop = [&](uint64_t outstanding) {
    return failure([&]() { consumer.tryPop(outstanding); });
  };
  for (uint i = 0; i < 3; i++) producer.push(i);
  EXPECT_NE(nullptr, strstr(pop(2).cStr(), "impossible")) << "more than is outstanding";
  EXPECT_EQ(0u, KJ_ASSERT_NONNULL(consumer.tryPop(3)));
  EXPECT_EQ(1u, KJ_ASSERT_NONNULL(consumer.tryPop(2)));

  freed.store(1);
  EXPECT_TRUE(consumer.isReady()) << "a broken ring must be looked at";
  EXPECT_NE(nullptr, strstr(pop(4).cStr(), "impossible")) << "backwards";
  freed.store(~uint64_t(0));
  EXPECT_NE(nullptr, strstr(pop(4).cStr(), "impossible")) << "far ahead";
  freed.store(2 + 5);
  EXPECT_NE(nullptr, strstr(pop(4).cStr(), "impossible")) << "more than a lap ahead";
  freed.store(3);
  EXPECT_EQ(2u, KJ_ASSERT_NONNULL(consumer.tryPop(1)));
  freed.store(3);
  EXPECT_TRUE(consumer.tryPop(0) == nullptr);

  EXPECT_THROW(FreeConsumer(kj::arrayPtr(entries, 3), freed), kj::Exception);
  EXPECT_THROW(FreeProducer(kj::arrayPtr(entries, size_t(0)), freed), kj::Exception);
}

TEST(Ring, RefusesImpossibleSizes) {
  RingMemory memory(32);
  for (size_t size: { 0, 1, 8, 15, 17, 24 }) {
    auto lines = memory.asPtr().slice(0, size);
    EXPECT_THROW(DescriptorProducer producer(lines), kj::Exception) << size;
    EXPECT_THROW(DescriptorConsumer consumer(lines), kj::Exception) << size;
  }
  DescriptorConsumer consumer(memory.asPtr().slice(0, 16));
  for (size_t size: { 0, 8, 16, 24 }) {
    EXPECT_THROW(consumer.jump(memory.asPtr().slice(0, size)), kj::Exception) << size;
  }
  consumer.jump(memory.asPtr());
  EXPECT_EQ(32u, consumer.getLineCount());
}

TEST(Ring, TwoThreads) {
  // The same memory seen from two threads, through laps at every alignment and two JUMPs.
  // ThreadSanitizer checks the memory orders.
  constexpr uint64_t COUNT = EMULATED ? 20000 : SLOW ? 60000 : 400000;
  RingMemory memories[3] = { RingMemory(16), RingMemory(32), RingMemory(64) };
  SharedWord consumed{16};
  auto shapeOf = [](uint64_t i) { return uint(i * 2654435761 >> 7) % (MAX_BODY_WORDS + 1); };

  kj::Thread thread([&]() {
    DescriptorProducer producer(memories[0].asPtr());
    uint jumps = 0;
    auto waitForRoom = [&](uint lines) {
      for (uint spins = 0; !producer.hasRoom(lines); spins++) {
        producer.updateConsumed(consumed.load(std::memory_order_acquire));
        if (spins % 64 == 63) std::this_thread::yield();
      }
    };
    for (uint64_t i = 0; i < COUNT; i++) {
      if (i == COUNT / 3 * (jumps + 1) && jumps < 2) {
        ++jumps;
        producer.jump({ jumps, 0, 0 }, memories[jumps].asPtr());
      }
      uint size = shapeOf(i);
      uint64_t body[MAX_BODY_WORDS];
      for (uint j = 0; j < size; j++) body[j] = i * 64 + j;
      waitForRoom(linesForBody(size));
      auto head = message();
      head.fds = i;
      producer.publish(head, kj::arrayPtr(body, size));
    }
  });

  KJ_DEFER(consumed.store(~uint64_t(0)));  // Or the producer would not end if a check fails.
  DescriptorConsumer consumer(memories[0].asPtr());
  Descriptor descriptor;
  uint spins = 0;
  for (uint64_t i = 0; i < COUNT;) {
    if (!consumer.tryTake(descriptor)) {
      if (++spins % 64 == 0) std::this_thread::yield();
    } else if (descriptor.head.kind == DescriptorKind::JUMP) {
      consumer.jump(memories[SegmentEntry::unpack(descriptor.body[0], 0).region].asPtr());
    } else {
      uint size = shapeOf(i);
      ASSERT_EQ(uint16_t(i), descriptor.head.fds);
      ASSERT_EQ(linesForBody(size), descriptor.head.lines);
      for (uint j = 0; j < size; j++) ASSERT_EQ(i * 64 + j, descriptor.body[j]);
      i++;
    }
    // A line of the old ring is not written again once the producer has gone on to the next.
    consumed.store(consumer.getPosition(), std::memory_order_release);
  }
  EXPECT_EQ(64u, consumer.getLineCount());
  EXPECT_FALSE(consumer.isReady());
}

TEST(Ring, FreeRingTwoThreads) {
  // Blocks go round: the sender writes one, the reader reads it and frees its handle.
  constexpr uint64_t COUNT = EMULATED ? 20000 : SLOW ? 30000 : 300000;
  constexpr uint BLOCKS = 8;
  SharedWord entries[BLOCKS] = {};
  SharedWord freed{0};
  RingMemory memory(16);
  uint64_t blocks[BLOCKS] = {};  // Not atomic: ThreadSanitizer tells if both sides own one at once.
  std::atomic<bool> failed{false};

  kj::Thread thread([&]() {
    KJ_ON_SCOPE_FAILURE(failed = true);
    DescriptorConsumer consumer(memory.asPtr());
    FreeProducer frees(kj::arrayPtr(entries, BLOCKS), freed);
    Descriptor descriptor;
    for (uint64_t i = 0; i < COUNT;) {
      if (!consumer.tryTake(descriptor)) {
        if (failed) return;
        std::this_thread::yield();
        continue;
      }
      KJ_ASSERT(blocks[descriptor.body[0]] == i, i);
      frees.push(descriptor.body[0]);
      ++i;
    }
  });

  bool complete = false;
  KJ_DEFER(if (!complete) failed = true);
  DescriptorProducer producer(memory.asPtr());
  FreeConsumer frees(kj::arrayPtr(entries, BLOCKS), freed);
  std::vector<uint64_t> available;
  for (uint64_t i = 0; i < BLOCKS; i++) available.push_back(i);
  for (uint64_t i = 0; i < COUNT; i++) {
    for (;;) {
      KJ_IF_MAYBE(handle, frees.tryPop(BLOCKS - available.size())) {
        ASSERT_LT(*handle, BLOCKS);
        available.push_back(*handle);
      } else if (available.empty()) {
        ASSERT_FALSE(failed);
        std::this_thread::yield();
      } else {
        break;
      }
    }
    // The last one, or at times the first, so that handles change places.
    if (i % 3 == 0) std::swap(available.front(), available.back());
    uint64_t body[] = { available.back() };
    available.pop_back();
    blocks[body[0]] = i;
    if (!producer.hasRoom(1)) {
      // As many blocks are free as descriptors were consumed.
      producer.updateConsumed(producer.getPosition() - (BLOCKS - available.size() - 1));
    }
    ASSERT_TRUE(producer.hasRoom(1));
    producer.publish(message(), body);
  }
  complete = true;
}

}  // namespace
}  // namespace capnpshm
