// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"

#include <gtest/gtest.h>
#include <kj/async-io.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <sys/wait.h>

namespace capnpshm {
namespace testing {
namespace {

using capnp::word;

class CountingSender final: public MessageSender {
public:
  void sendMessage(OutgoingMessage& message) override {
    ++count;
    last = &message;
  }
  uint count = 0;
  OutgoingMessage* last = nullptr;
};

bool isSame(const Shape& shape, OutgoingMessage& message) {
  // Whether what is in the message's segments is what was built.
  capnp::SegmentArrayMessageReader reader(message.getSegments());
  return matches(shape, reader.getRoot<capnp::AnyPointer>());
}

void onThread(kj::Function<void()> func) { kj::Thread thread(kj::mv(func)); }

TEST(OutgoingMessage, WithoutOutboxOnTheHeap) {
  CountingSender sender;
  for (uint firstSegmentWords: { 0u, 1u, 50u, 5000u }) {
    for (size_t bytes: { 0, 8, 1000, 100000 }) {
      auto shape = Shape::ofBytes(bytes, bytes);
      auto message = kj::atomicRefcounted<OutgoingMessage>(sender, firstSegmentWords);
      EXPECT_EQ(0u, message->getSegments().size()) << "nothing was written";
      EXPECT_EQ(0u, message->sizeInWords());
      std::vector<kj::Array<word>> foreign;
      build(shape, message->getBody(), foreign);
      EXPECT_TRUE(isSame(shape, *message));
      EXPECT_TRUE(message->getParcel() == nullptr);
      for (auto& segment: message->getSegments()) {
        EXPECT_TRUE(message->findBlock(segment.begin()) == nullptr);
      }
      uint before = sender.count;
      message->send();
      EXPECT_EQ(before + 1, sender.count);
      EXPECT_EQ(message.get(), sender.last);
    }
  }
}

TEST(OutgoingMessage, SizeIsWhatWasWritten) {
  CountingSender sender;
  Pair pair((EndOptions()));
  for (bool shared: { false, true }) {
    auto message = shared
        ? kj::atomicRefcounted<OutgoingMessage>(kj::atomicAddRef(*pair.a.outbox), sender, 0)
        : kj::atomicRefcounted<OutgoingMessage>(sender, 0);
    message->getBody().initAs<capnp::Data>(800);
    EXPECT_EQ(101u, message->sizeInWords());
    // A hint that was too large is no size.
    auto hinted = shared
        ? kj::atomicRefcounted<OutgoingMessage>(kj::atomicAddRef(*pair.a.outbox), sender, 600)
        : kj::atomicRefcounted<OutgoingMessage>(sender, 600);
    hinted->getBody().initAs<capnp::Data>(8);
    EXPECT_EQ(2u, hinted->sizeInWords());
    EXPECT_EQ(1u, hinted->getSegments().size());
  }
}

TEST(OutgoingMessage, FdsAreKept) {
  CountingSender sender;
  auto message = kj::atomicRefcounted<OutgoingMessage>(sender, 0);
  EXPECT_EQ(0u, message->getFds().size());
  message->setFds(kj::heapArray<int>({ 4, 2 }));
  ASSERT_EQ(2u, message->getFds().size());
  EXPECT_EQ(2, message->getFds()[1]);
}

TEST(OutgoingMessage, SmallOnesStayPrivate) {
  Pair pair((EndOptions()));
  auto& outbox = *pair.a.outbox;
  for (uint firstSegmentWords: { 0u, 1u, uint(OutgoingMessage::SCRATCH_WORDS) }) {
    auto shape = Shape::ofBytes(1, 500);
    shape.firstSegmentWords = firstSegmentWords;
    auto built = pair.a.newMessage(shape);
    EXPECT_TRUE(isSame(shape, *built.message));
    ASSERT_EQ(1u, built.message->getSegments().size());
    EXPECT_TRUE(built.message->getParcel() == nullptr);
    EXPECT_TRUE(built.message->findBlock(built.message->getSegments()[0].begin()) == nullptr);
    EXPECT_EQ(0u, outbox.getArenaBytesInUse());
  }
}

TEST(OutgoingMessage, LargeOnesAreInSharedMemory) {
  Pair pair((EndOptions()));
  auto& outbox = *pair.a.outbox;
  {
    // By the hint, as a single segment.
    auto shape = Shape::ofBytes(1, 4000);
    shape.firstSegmentWords = 600;
    auto built = pair.a.newMessage(shape);
    EXPECT_TRUE(isSame(shape, *built.message));
    auto segments = built.message->getSegments();
    ASSERT_EQ(1u, segments.size());
    auto& block = KJ_ASSERT_NONNULL(built.message->findBlock(segments[0].begin()));
    EXPECT_EQ(reinterpret_cast<const byte*>(segments[0].begin()), block.bytes().begin());
    EXPECT_EQ(1u, KJ_ASSERT_NONNULL(built.message->getParcel()).uses.size());
    EXPECT_EQ(block.bytes().size(), outbox.getArenaBytesInUse());
  }
  EXPECT_EQ(0u, outbox.getArenaBytesInUse()) << "dropped unsent";

  // Without a hint, a private first segment and the rest shared.
  auto shape = Shape::ofBytes(2, 6000);
  auto built = pair.a.newMessage(shape);
  EXPECT_TRUE(isSame(shape, *built.message));
  auto segments = built.message->getSegments();
  ASSERT_GE(segments.size(), 2u);
  EXPECT_TRUE(built.message->findBlock(segments[0].begin()) == nullptr);
  for (size_t i = 1; i < segments.size(); i++) {
    EXPECT_TRUE(built.message->findBlock(segments[i].begin()) != nullptr) << i;
  }
}

TEST(OutgoingMessage, ManySegments) {
  // Foreign memory is a segment each; those are nobody's blocks.
  Pair pair((EndOptions()));
  for (size_t count: { 1, 30, 500 }) {
    auto shape = Shape::foreign(count, count, 40);
    auto built = pair.a.newMessage(shape);
    EXPECT_TRUE(isSame(shape, *built.message));
    EXPECT_GE(built.message->getSegments().size(), count + 1);
    uint foreign = 0;
    for (auto& segment: built.message->getSegments()) {
      for (auto& memory: built.foreign) {
        if (segment.begin() != memory.begin()) continue;
        ++foreign;
        EXPECT_TRUE(built.message->findBlock(segment.begin()) == nullptr);
      }
    }
    EXPECT_EQ(count, foreign);
  }
}

TEST(OutgoingMessage, WhereMemoryIsShortTheHeapIsUsed) {
  EndOptions options;
  options.firstRegionBytes = options.maxBytes = 16 << 10;
  Pair pair(options);
  auto& outbox = *pair.a.outbox;
  {
    std::vector<Built> all;
    uint onHeap = 0;
    for (uint i = 0; i < 20; i++) {
      auto shape = Shape::ofBytes(i, 2000);
      all.push_back(pair.a.newMessage(shape));
      auto& message = *all.back().message;
      EXPECT_TRUE(isSame(shape, message));
      auto last = message.getSegments().back();
      if (message.findBlock(last.begin()) == nullptr) ++onHeap;
    }
    EXPECT_GT(onHeap, 0u);
    EXPECT_LT(onHeap, 20u);
    EXPECT_LE(outbox.getArenaBytesInUse(), options.maxBytes);
  }
  EXPECT_EQ(0u, outbox.getArenaBytesInUse());
}

TEST(OutgoingMessage, MemoryIsZeroedForTheNext) {
  // A builder relies on zeroed memory. Scratch and blocks alike, used in part, in whole, or dropped
  // half-built.
  EndOptions options;
  options.firstRegionBytes = options.maxBytes = 64 << 10;
  Pair pair(options);
  CountingSender sender;
  Random random(4);
  std::deque<kj::Own<OutgoingMessage>> alive;
  uint reused = 0;
  std::vector<const word*> seen;
  for (uint i = 0; i < 5000; i++) {
    uint firstSegmentWords = random.percent(50) ? 0 : random.below(400);
    alive.push_back(kj::atomicRefcounted<OutgoingMessage>(
        kj::atomicAddRef(*pair.a.outbox), sender, firstSegmentWords));
    auto body = alive.back()->getBody();
    uint pieces = random.below(5);
    auto list = body.initAs<capnp::List<capnp::Data>>(pieces);
    for (uint j = 0; j < pieces; j++) {
      auto data = list.init(j, random.below(random.percent(80) ? 200 : 3000));
      for (auto b: data) ASSERT_EQ(0, b) << i;
      memset(data.begin(), 1 + random.below(255), data.size());
      // What is given back within a message is dirt beyond its end, or was zeroed.
      if (random.percent(10)) list.disown(j);
    }
    for (auto& segment: alive.back()->getSegments()) {
      for (auto begin: seen) reused += begin == segment.begin();
      if (seen.size() < 20) seen.push_back(segment.begin());
    }
    while (alive.size() > random.below(20)) {
      std::swap(alive.front(), alive[random.below(alive.size())]);
      alive.pop_front();
    }
  }
  EXPECT_GT(reused, 1000u) << "or it shows nothing";
  alive.clear();
  EXPECT_EQ(0u, pair.a.outbox->getArenaBytesInUse());
}

// =======================================================================================
// Threads, and the end of others

TEST(OutgoingMessage, BuiltOnAnotherThread) {
  Pair pair((EndOptions()));
  CountingSender sender;
  auto shape = Shape::ofBytes(1, 5000);
  auto message = kj::atomicRefcounted<OutgoingMessage>(
      kj::atomicAddRef(*pair.a.outbox), sender, 700);
  std::vector<kj::Array<word>> foreign;
  onThread([&]() { build(shape, message->getBody(), foreign); });
  EXPECT_TRUE(isSame(shape, *message));
  EXPECT_TRUE(message->getParcel() == nullptr) << "the arena belongs to one thread";
  EXPECT_EQ(0u, pair.a.outbox->getArenaBytesInUse());

  // It is sent all the same.
  auto number = message->getSegments().size();
  EXPECT_TRUE(pair.a.outbox->tryPublish(*message, 0));
  auto received = KJ_ASSERT_NONNULL(pair.b.take());
  EXPECT_TRUE(matches(shape, received->getBody()));
  EXPECT_GE(number, 1u);
}

TEST(OutgoingMessage, BegunHereGoneOnThere) {
  // The first segment in shared memory, the rest by another thread.
  Pair pair((EndOptions()));
  CountingSender sender;
  auto message = kj::atomicRefcounted<OutgoingMessage>(
      kj::atomicAddRef(*pair.a.outbox), sender, 200);
  auto list = message->getBody().initAs<capnp::List<capnp::Data>>(2);
  memset(list.init(0, 1000).begin(), 1, 1000);
  size_t inUse = pair.a.outbox->getArenaBytesInUse();
  EXPECT_GT(inUse, 1000u);
  onThread([&]() { memset(list.init(1, 3000).begin(), 2, 3000); });
  EXPECT_EQ(inUse, pair.a.outbox->getArenaBytesInUse());
  EXPECT_TRUE(pair.a.outbox->tryPublish(*message, 0));
  auto received = KJ_ASSERT_NONNULL(pair.b.take());
  auto read = received->getBody().getAs<capnp::List<capnp::Data>>();
  EXPECT_EQ(1000u, read[0].size());
  EXPECT_EQ(1, read[0][999]);
  EXPECT_EQ(3000u, read[1].size());
  EXPECT_EQ(2, read[1][2999]);
}

TEST(OutgoingMessage, DestroyedOnAnotherThread) {
  auto io = kj::setupAsyncIo();
  auto wake = kj::atomicRefcounted<ForeignWake>();
  auto outbox = kj::atomicRefcounted<Outbox>(
      OutboxLimits { 32 << 10, 1 << 20, 0 }, kj::atomicAddRef(*wake), PROTOCOL_VERSION);
  CountingSender sender;
  for (uint i = 0; i < (SLOW ? 20u : 200u); i++) {
    auto message = kj::atomicRefcounted<OutgoingMessage>(kj::atomicAddRef(*outbox), sender, 300);
    memset(message->getBody().initAs<capnp::Data>(2000).begin(), 0xff, 2000);
    EXPECT_GT(outbox->getArenaBytesInUse(), 2000u);
    auto woken = wake->next();
    EXPECT_FALSE(woken.poll(io.waitScope));
    onThread([message = kj::mv(message)]() mutable { message = nullptr; });
    // Not on that thread, but the loop is told that there is something to take back.
    EXPECT_GT(outbox->getArenaBytesInUse(), 2000u);
    woken.wait(io.waitScope);
    outbox->reclaim();
    EXPECT_EQ(0u, outbox->getArenaBytesInUse());

    // And it was noted how much of it is dirty.
    auto next = kj::atomicRefcounted<OutgoingMessage>(kj::atomicAddRef(*outbox), sender, 300);
    for (auto b: next->getBody().initAs<capnp::Data>(2100)) ASSERT_EQ(0, b);
  }
  wake->close();
}

TEST(OutgoingMessage, OutlivesTheOutboxsOtherOwners) {
  for (bool foreign: { false, true }) {
    auto pair = kj::heap<Pair>(EndOptions());
    auto shape = Shape::ofBytes(1, 5000);
    auto built = pair->a.newMessage(shape);
    EXPECT_TRUE(built.message->getParcel() != nullptr);
    pair->a.outbox->stop();
    pair = nullptr;
    EXPECT_TRUE(isSame(shape, *built.message));
    // It can be built further, though what the peer wrote is no longer mapped.
    auto larger = Shape::ofBytes(2, 300000);
    build(larger, built.message->getBody(), built.foreign);
    EXPECT_TRUE(isSame(larger, *built.message));
    if (foreign) {
      onThread([message = kj::mv(built.message)]() mutable { message = nullptr; });
    }
  }
}

TEST(OutgoingMessage, InertInAForkChild) {
  Pair pair((EndOptions()));
  auto built = pair.a.newMessage(Shape::ofBytes(1, 5000));
  size_t inUse = pair.a.outbox->getArenaBytesInUse();
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    // Its memory is not mapped here; touching it would end the child by a signal.
    built.message = nullptr;
    _exit(pair.a.outbox->getArenaBytesInUse() == inUse ? 0 : 1);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  EXPECT_EQ(0, status);
  EXPECT_TRUE(pair.a.outbox->tryPublish(*built.message, 0));
  EXPECT_TRUE(matches(Shape::ofBytes(1, 5000), KJ_ASSERT_NONNULL(pair.b.take())->getBody()));
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
