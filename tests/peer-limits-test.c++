// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hand-made-peer.h"
#include "outbox-pair.h"

#include <capnp/serialize.h>
#include <malloc.h>
#include <sys/socket.h>
#include <thread>
#include <vector>

// What a peer can make this side hold and do, and where that ends: PeerLimits, and the bounds that
// are no option. That honest peers never get there is in hostile-setup-test.c++.

namespace capnpshm {
namespace testing {
namespace {

TEST(PeerLimits, FileDescriptorsAheadAreCountedOneByOne) {
  SharedMemoryOptions options;
  options.peerLimits.fdsAhead = 5;
  HandMadePeer peer(options, 4);
  peer.upgrade();
  peer.writeFds(2);
  peer.writeFds(3);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  peer.writeFds(1);
  peer.expectFailure("see PeerLimits::fdsAhead");
}

TEST(PeerLimits, RecordsWithoutFileDescriptorsCountToo) {
  SharedMemoryOptions options;
  options.peerLimits.fdsAhead = 5;
  HandMadePeer peer(options);
  peer.upgrade();
  for (int i = 0; i < 5; i++) peer.writeFds(0);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  peer.writeFds(0);
  peer.expectFailure("see PeerLimits::fdsAhead");
}

TEST(PeerLimits, OneMessageMayAlwaysHaveItsFileDescriptors) {
  SharedMemoryOptions options;
  options.peerLimits.fdsAhead = 0;
  HandMadePeer peer(options, 4);
  peer.upgrade();
  peer.receiving = nullptr;
  uint64_t root = 0;
  for (int i = 0; i < 3; i++) {
    peer.writeFds(4);
    KJ_ASSERT_NONNULL(peer.ring).publish(
        { DescriptorKind::MESSAGE, 0, 1, 4, 1 }, kj::arrayPtr(&root, 1));
    auto message = KJ_ASSERT_NONNULL(
        peer.connection->receiveIncomingMessage().wait(peer.io.waitScope));
    EXPECT_EQ(4u, message->getAttachedFds().size());
  }
  peer.startReceiving();
  peer.writeFds(1);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  peer.writeFds(1);
  peer.expectFailure("see PeerLimits::fdsAhead");
}

void sendWithFds(HandMadePeer& peer, kj::uint count) {
  auto message = peer.connection->newOutgoingMessage(0);
  message->getBody().initAs<capnp::rpc::Message>().initFinish();
  auto fds = kj::heapArray<int>(count);
  for (auto& fd: fds) fd = peer.region.fd;
  message->setFds(kj::mv(fds));
  message->send();
}

TEST(PeerLimits, AnOfferOfFewFileDescriptorsAheadIsKept) {
  HandMadePeer peer(SharedMemoryOptions(), 4);
  peer.maxFdsAhead = 5u;
  peer.upgrade();
  for (kj::uint count: { 2, 3, 1, 4, 4, 4 }) sendWithFds(peer, count);

  auto expectRecords = [&](std::initializer_list<kj::uint> counts) {
    // And nothing behind them.
    for (auto count: counts) {
      kj::AutoCloseFd fds[4];
      auto message = capnp::readMessage(*peer.pipe.ends[1], fds).wait(peer.io.waitScope);
      auto control = KJ_ASSERT_NONNULL(asControl(message.reader->getRoot<capnp::AnyPointer>()));
      ASSERT_TRUE(control.isFds());
      EXPECT_EQ(count, message.fds.size());
    }
    peer.settle();
    kj::byte more;
    EXPECT_EQ(-1, recv(KJ_ASSERT_NONNULL(peer.pipe.ends[1]->getFd()), &more, 1, MSG_DONTWAIT));
  };
  expectRecords({ 2, 3 });
  peer.header().consumed.store(FIRST_RING_LINES + 1);
  peer.ringBell();
  expectRecords({ 1 });
  // None of these four with any other.
  for (kj::uint consumed: { 3, 4, 5 }) {
    peer.header().consumed.store(FIRST_RING_LINES + consumed);
    peer.ringBell();
    expectRecords({ 4 });
  }
}

TEST(PeerLimits, RegionsBeyondTheLimitAreRefused) {
  SharedMemoryOptions options;
  options.peerLimits.regions = 2;
  HandMadePeer peer(options);
  peer.upgrade();
  EXPECT_EQ(peer.announce(1), protocol::Control::REGION_MAPPED);
  EXPECT_EQ(peer.announce(2), protocol::Control::REGION_MAPPED);
  EXPECT_EQ(peer.announce(3), protocol::Control::REGION_REFUSED);
  uint64_t retired = 1;
  KJ_ASSERT_NONNULL(peer.ring).publish(
      { DescriptorKind::RETIRE, 0, 0, 0, 0 }, kj::arrayPtr(&retired, 1));
  peer.ringBell();
  EXPECT_EQ(peer.announce(4), protocol::Control::REGION_MAPPED);
  EXPECT_EQ(peer.announce(5), protocol::Control::REGION_REFUSED);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
}

TEST(PeerLimits, NoFurtherRegionsAtAll) {
  SharedMemoryOptions options;
  options.peerLimits.regions = 0;
  HandMadePeer peer(options);
  peer.upgrade();
  EXPECT_EQ(peer.announce(1), protocol::Control::REGION_REFUSED);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
}

TEST(PeerLimits, RetiredRegionsCountWhileSomebodyReadsThere) {
  SharedMemoryOptions options;
  options.trustPeer = true;
  options.maxBytes = 2 * REGION_BYTES;
  HandMadePeer peer(options);
  peer.upgrade();
  peer.receiving = nullptr;
  EXPECT_EQ(peer.announce(1), protocol::Control::REGION_MAPPED);
  SegmentEntry entry { 1, 8, REGION_BYTES / 2 };
  uint64_t body[] = { 5, entry.packFirst(), entry.offset };
  KJ_ASSERT_NONNULL(peer.ring).publish({ DescriptorKind::MESSAGE, 0, 1, 0, 0 }, body);
  auto message = peer.connection->receiveIncomingMessage().wait(peer.io.waitScope);
  ASSERT_TRUE(message != nullptr);
  uint64_t retired = 1;
  KJ_ASSERT_NONNULL(peer.ring).publish(
      { DescriptorKind::RETIRE, 0, 0, 0, 0 }, kj::arrayPtr(&retired, 1));
  peer.startReceiving();
  peer.ringBell();
  EXPECT_EQ(peer.announce(2), protocol::Control::REGION_REFUSED);
  message = nullptr;
  EXPECT_EQ(peer.announce(3), protocol::Control::REGION_MAPPED);
  EXPECT_EQ(peer.failure, "");
}

TEST(PeerLimits, BellsForNothingAreBounded) {
  SharedMemoryOptions options;
  options.peerLimits.controlMessages = 64;
  HandMadePeer peer(options);
  peer.upgrade();
  peer.ringBell(60);
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  peer.ringBell(500);
  peer.expectFailure("see PeerLimits::controlMessages");
}

TEST(PeerLimits, BellsThatEndASleepAreNot) {
  SharedMemoryOptions options;
  options.peerLimits.controlMessages = 64;
  options.spinMicroseconds = 0;
  HandMadePeer peer(options);
  peer.upgrade();
  for (int i = 0; i < 1000 && peer.failure == ""; i++) {
    peer.ringBell();
    // It goes to sleep anew after each bell that finds it asleep.
    kj::Promise<void>(kj::NEVER_DONE).poll(peer.io.waitScope);
  }
  EXPECT_EQ(peer.failure, "");
  EXPECT_GE(peer.network.getStats().sleeps, 1000u);
}

TEST(PeerLimits, AnnouncementsForNothingAreBounded) {
  // Though each is answered, and the answer read.
  SharedMemoryOptions options;
  options.peerLimits.controlMessages = 64;
  options.peerLimits.regions = 0;
  HandMadePeer peer(options);
  peer.upgrade();
  for (kj::uint i = 1; i <= 64; i++) {
    ASSERT_EQ(peer.announce(i), protocol::Control::REGION_REFUSED);
  }
  EXPECT_EQ(peer.failure, "");
  for (kj::uint i = 65; i <= 300 && peer.failure == ""; i++) {
    int fd = peer.region.fd;
    peer.writeControl([&](protocol::Control::Builder control) {
      control.initRegion().setId(i);
      control.getRegion().setBytes(REGION_BYTES);
    }, kj::arrayPtr(&fd, 1));
    peer.settle();
    if (peer.failure == "") peer.readControl();
  }
  peer.expectFailure("see PeerLimits::controlMessages");
}

TEST(PeerLimits, TooFewControlMessagesForAnHonestPeerAreRefused) {
  SharedMemoryOptions options;
  options.peerLimits.controlMessages = 63;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { HandMadePeer peer(options); })) {
    EXPECT_EQ(kj::Exception::Type::FAILED, exception->getType());
    EXPECT_NE(nullptr, strstr(exception->getDescription().cStr(), "PeerLimits::controlMessages"));
  } else {
    ADD_FAILURE() << "accepted";
  }
}

TEST(PeerLimits, BellsItDoesNotReadDoNotPileUp) {
  HandMadePeer peer;
  peer.upgrade();
  auto lines = reinterpret_cast<const DescriptorLine*>(
      KJ_ASSERT_NONNULL(peer.peerMemory).bytes().begin() + sizeof(RegionHeader));
  uint64_t position = FIRST_RING_LINES, epoch = 1;
  auto sendAndRing = [&]() {
    // It consumes everything, and asks for a bell each time.
    peer.header().sleepWord.store(++epoch << SLEEP_EPOCH_SHIFT | WANT_DATA);
    peer.send(8);
    kj::Promise<void>(kj::NEVER_DONE).poll(peer.io.waitScope);
    for (;;) {
      auto& line = lines[position % FIRST_RING_LINES];
      if (line.stamp.load() != headStamp(position)) break;
      position += DescriptorHead::unpack(line.words[0].load()).lines;
    }
    peer.header().consumed.store(position);
  };

  // Until the socket is full. Then an answer has to wait, and the next bells behind it.
  for (int i = 0; i < 2000; i++) sendAndRing();
  peer.writeControl([&](protocol::Control::Builder control) {
    control.initRegion().setId(1);
    control.getRegion().setBytes(REGION_BYTES);
  });
  peer.settle();
  for (int i = 0; i < 500; i++) sendAndRing();
  EXPECT_EQ(peer.failure, "");

  uint64_t word = ~uint64_t(0);
  auto read = [&]() {
    return peer.pipe.ends[1]->tryRead(&word, sizeof(word), sizeof(word));
  };
  kj::uint before = 0;
  while (word == ~uint64_t(0)) {
    ASSERT_EQ(sizeof(word), read().wait(peer.io.waitScope));
    ++before;
  }
  EXPECT_GT(before, 50u);
  std::vector<uint64_t> answer(word >> 32);
  peer.pipe.ends[1]->read(answer.data(), answer.size() * sizeof(word)).wait(peer.io.waitScope);
  kj::uint after = 0;
  for (;;) {
    auto next = read();
    if (!next.poll(peer.io.waitScope)) break;
    ASSERT_EQ(sizeof(word), next.wait(peer.io.waitScope));
    ASSERT_EQ(~uint64_t(0), word);
    ++after;
  }
  EXPECT_EQ(1u, after);
}

struct RingOfTheTests {
  // The memory of a peer that publishes whatever the reader says it consumed.

  OwnRegion region = createRegion(REGION_BYTES);
  kj::Maybe<DescriptorProducer> producer;
  End reader { EndOptions() };

  RingOfTheTests() {
    auto bytes = region.mapping.bytes();
    auto& header = *reinterpret_cast<RegionHeader*>(bytes.begin());
    header.version.store(PROTOCOL_VERSION);
    header.regionBytes.store(REGION_BYTES);
    header.freeOffset.store(sizeof(RegionHeader));
    header.ringOffset.store(sizeof(RegionHeader));
    header.ringLines.store(FIRST_RING_LINES);
    header.consumed.store(FIRST_RING_LINES);
    header.magic.store(REGION_MAGIC);
    producer = DescriptorProducer(kj::arrayPtr(reinterpret_cast<DescriptorLine*>(
        bytes.begin() + sizeof(RegionHeader)), FIRST_RING_LINES));
    reader.mapPeer(kj::atomicRefcounted<PeerRegion>(
        0, mapPeerRegion(region.fd, REGION_BYTES, REGION_BYTES)));
  }

  void publish(DescriptorHead head, kj::ArrayPtr<const uint64_t> body) {
    auto& p = KJ_ASSERT_NONNULL(producer);
    p.updateConsumed(p.getPosition());
    p.publish(head, body);
  }
  void publishMessage() {
    uint64_t root = 0;
    publish({ DescriptorKind::MESSAGE, 0, 1, 0, 1 }, kj::arrayPtr(&root, 1));
  }
  std::string complaint() {
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() { reader.take(); })) {
      return exception->getDescription().cStr();
    }
    return "none";
  }
};

TEST(PeerLimits, PeerThatTakesButNeverConfirmsCostsNoMemory) {
  HandMadePeer peer;
  peer.startReceiving();
  uint64_t bytes = peer.readOffer();
  peer.writeOffer();
  peer.readSwitch(bytes);
  auto consumer = peer.networksRing();
  peer.answerSwitch();
  size_t before = 0;
  for (uint i = 0; i < 20000; i++) {
    peer.send(8);
    Descriptor descriptor;
    ASSERT_TRUE(consumer.tryTake(descriptor)) << i;
    peer.header().consumed.store(consumer.getPosition());
    if (i == 1000) before = mallinfo2().uordblks;
  }
  // Each would take more than a KiB.
  EXPECT_LT(mallinfo2().uordblks, before + (1 << 20));
  EXPECT_EQ(peer.failure, "");
  peer.writeDeclined();
  peer.settle();
  EXPECT_EQ(0u, peer.network.getStats().outgoing.socketMessages);
}

TEST(PeerLimits, NoMoreIsReadThanWhatARingHolds) {
  // Or a peer that writes as fast as we read could keep us reading, as long as a message may be.
  RingOfTheTests ring;
  for (kj::uint i = 0; i < FIRST_RING_LINES; i++) {
    ring.publishMessage();
    ASSERT_TRUE(ring.reader.take() != nullptr);
  }
  // So much it may, though nothing was said to be consumed.
  ring.publishMessage();
  EXPECT_NE(std::string::npos,
      ring.complaint().find("more descriptors than its ring has room for"));
}

TEST(PeerLimits, NoRingIsTooLargeToBeReadAtOnce) {
  for (size_t lines: { LARGEST_RING_LINES, 2 * LARGEST_RING_LINES }) {
    RingOfTheTests ring;
    size_t bytes = lines * sizeof(DescriptorLine);
    auto further = createRegion(bytes);
    ASSERT_TRUE(ring.reader.inbox->addRegion(1, further.fd.get(), bytes));
    SegmentEntry entry { 1, kj::uint(bytes / sizeof(uint64_t)), 0 };
    uint64_t body[] = { entry.packFirst(), entry.offset };
    ring.publish({ DescriptorKind::JUMP, 0, 0, 0, 0 }, body);
    auto complaint = ring.complaint();
    if (lines == LARGEST_RING_LINES) {
      EXPECT_EQ("none", complaint);
    } else {
      EXPECT_NE(std::string::npos, complaint.find("a ring that is too large")) << complaint;
    }
  }
}

void expectOthersGoOn(HandMadePeer& peer, const std::vector<uint64_t>& words) {
  // While `words` come on the socket all the time.
  std::atomic<bool> stop{false};
  std::thread flooder([&]() {
    int socket = KJ_ASSERT_NONNULL(peer.pipe.ends[1]->getFd());
    while (!stop) {
      for (size_t sent = 0, bytes = words.size() * sizeof(uint64_t); sent < bytes && !stop;) {
        ssize_t n = send(socket, reinterpret_cast<const kj::byte*>(words.data()) + sent,
            bytes - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) std::this_thread::yield();
        sent += n < 0 ? 0 : n;
      }
    }
  });
  KJ_DEFER({ stop = true; flooder.join(); });
  auto& timer = peer.io.provider->getTimer();
  auto tick = [&]() { timer.afterDelay(1 * kj::MILLISECONDS).wait(peer.io.waitScope); };
  auto flooded = [&]() { return peer.network.getStats().incoming.socketBytes > 10000; };
  for (int i = 0; i < 10000 && !flooded(); i++) tick();
  for (int i = 0; i < 20; i++) tick();
  EXPECT_TRUE(flooded());
  EXPECT_EQ(peer.failure, "");
}

TEST(PeerLimits, AFloodOnTheControlSocketLeavesTheLoopToOthers) {
  // Where no limit ends it.
  SharedMemoryOptions options;
  options.peerLimits.controlMessages = kj::maxValue;
  HandMadePeer peer(options);
  peer.upgrade();
  expectOthersGoOn(peer, std::vector<uint64_t>(4096, ~uint64_t(0)));
}

kj::Promise<void> receiveAll(HandMadePeer& peer) {
  return peer.connection->receiveIncomingMessage().then(
      [&peer](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&&) { return receiveAll(peer); });
}

TEST(PeerLimits, AFloodOfPlainFramesLeavesTheLoopToOthers) {
  HandMadePeer peer;
  peer.receiving = receiveAll(peer).eagerlyEvaluate(
      [&](kj::Exception&& exception) { peer.failure = kj::str(exception); });
  capnp::MallocMessageBuilder message;
  message.initRoot<capnp::rpc::Message>().initFinish();
  auto frame = capnp::messageToFlatArray(message);
  std::vector<uint64_t> words(1000 * frame.size());
  for (size_t i = 0; i < 1000; i++) {
    memcpy(&words[i * frame.size()], frame.begin(), frame.asBytes().size());
  }
  expectOthersGoOn(peer, words);
}

TEST(PeerLimits, WhatIsGivenUpForGoodIsBounded) {
  // Bursts make regions, and quiet between them gives them up, as long as that is allowed.
  auto regionsMade = [](size_t retiredBytes) {
    EndOptions options;
    options.maxBytes = 1 << 20;
    options.retiredBytes = retiredBytes;
    Pair pair(options);
    uint64_t number = 0;
    size_t retired = 0;
    for (int round = 0; round < 3; round++) {
      auto shape = Shape::ofBytes(++number, 200000);
      pair.a.waiting.push_back(pair.a.newMessage(shape));
      for (bool taken = false; !taken;) {
        pair.a.publishWaiting();
        pair.handleLetters();
        taken = pair.b.take() != nullptr;
        pair.b.giveBack();
      }
      for (int i = 0; i < 12000; i++) {
        size_t before = pair.a.outbox->getRegionBytes();
        KJ_ASSERT(pair.a.send(Shape::inlined(++number)));
        KJ_ASSERT(pair.b.take() != nullptr);
        pair.b.giveBack();
        retired += before - kj::min(before, pair.a.outbox->getRegionBytes());
      }
    }
    return retired;
  };
  size_t unlimited = regionsMade(kj::maxValue);
  EXPECT_GT(unlimited, 200000u);
  EXPECT_LE(unlimited, size_t(1) << 20);
  EXPECT_EQ(0u, regionsMade(0));
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
