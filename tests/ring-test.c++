// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/ring.h>

#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <kj/vector.h>
#include <deque>
#include <random>

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

TEST(Ring, TwoThreads) {
  // The same memory seen from two threads; ThreadSanitizer checks the memory orders.
  RingMemory memory(16);
  SharedWord consumed{16};
  constexpr uint64_t COUNT = 100000;

  kj::Thread thread([&]() {
    DescriptorProducer producer(memory.asPtr());
    for (uint64_t i = 0; i < COUNT; i++) {
      uint64_t body[14];
      uint size = 1 + i % 14;
      for (uint j = 0; j < size; j++) body[j] = i;
      while (!producer.hasRoom(linesForBody(size))) {
        producer.updateConsumed(consumed.load(std::memory_order_acquire));
      }
      producer.publish(message(), kj::arrayPtr(body, size));
    }
  });

  DescriptorConsumer consumer(memory.asPtr());
  Descriptor descriptor;
  for (uint64_t i = 0; i < COUNT;) {
    if (!consumer.tryTake(descriptor)) continue;
    for (uint j = 0; j < 1 + i % 14; j++) ASSERT_EQ(i, descriptor.body[j]);
    consumed.store(consumer.getPosition(), std::memory_order_release);
    i++;
  }
}

}  // namespace
}  // namespace capnpshm
