// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hand-made-peer.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

// Setting up, and what is no error there or is one, against a hand-made peer. Peers that break the
// rules in other ways are in hostile-*-test.c++.

namespace capnpshm {
namespace testing {
namespace {

kj::uint receiveFinish(HandMadePeer& peer,
    kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> next) {
  auto message = KJ_ASSERT_NONNULL(next.wait(peer.io.waitScope));
  auto reader = message->getBody().getAs<capnp::rpc::Message>();
  KJ_REQUIRE(reader.isFinish(), "the application got another message", kj::uint(reader.which()));
  return reader.getFinish().getQuestionId();
}

kj::uint receiveFinish(HandMadePeer& peer) {
  // Of the message which the network delivers next.
  return receiveFinish(peer, peer.connection->receiveIncomingMessage());
}

TEST(Setup, WhatWasUnderWayWhenItDeclinedDoesNotReachTheApplication) {
  SharedMemoryOptions options;
  options.trustPeer = true;
  HandMadePeer peer(options);
  peer.trustsPeer = true;
  auto next = peer.connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
  EXPECT_EQ(peer.readControl(), protocol::Control::OFFER);
  peer.writeOffer();
  EXPECT_EQ(peer.readControl(), protocol::Control::SWITCH);
  // A server maps the client's region, and answers. The client cannot use the server's.
  peer.writeSwitch(false);
  peer.writeMapped();
  peer.writeControl([](protocol::Control::Builder control) { control.setBell(); });
  peer.writeFinish(7);

  EXPECT_EQ(receiveFinish(peer, kj::mv(next)), 7u);
  EXPECT_EQ(peer.readControl(), protocol::Control::DECLINED);
  EXPECT_EQ(peer.network.getStats().incoming.transport, Transport::PLAIN);
}

TEST(Setup, TwoClientsMayBothDecline) {
  HandMadePeer peer;
  auto next = peer.connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
  peer.writeOffer();
  peer.writeSwitch(false);
  peer.writeControl([](protocol::Control::Builder control) { control.setDeclined("so do I"); });
  peer.writeFinish(8);
  EXPECT_EQ(receiveFinish(peer, kj::mv(next)), 8u);
  EXPECT_EQ(peer.network.getStats().incoming.transport, Transport::PLAIN);
}

TEST(Setup, FirstRegionBeyondMaxBytesIsDeclined) {
  SharedMemoryOptions options;
  options.maxBytes = REGION_BYTES;
  HandMadePeer peer(options);
  peer.writeOffer(2 * REGION_BYTES);
  peer.writeFinish(9);
  EXPECT_EQ(receiveFinish(peer), 9u);
  EXPECT_EQ(peer.readControl(), protocol::Control::OFFER);
  EXPECT_EQ(peer.readControl(), protocol::Control::DECLINED);
  auto reason = peer.network.getStats().incoming.plainReason;
  EXPECT_NE(nullptr, strstr(reason.cStr(), "65536")) << reason.cStr();
}

TEST(Setup, SecondOfferIsRefused) {
  HandMadePeer peer;
  peer.startReceiving();
  peer.writeOffer();
  peer.writeOffer();
  peer.expectFailure("offered shared memory twice");
}

TEST(Setup, FirstRingOfAnotherSizeIsRefused) {
  HandMadePeer peer;
  peer.upgrade(2 * FIRST_RING_LINES);
  peer.expectFailure("first descriptor ring is not of the size");
}

TEST(Setup, ShutdownEndsAPlainStream) {
  // Under AddressSanitizer also that it refers to nothing that is gone when it is waited for.
  HandMadePeer peer;
  peer.connection->shutdown().wait(peer.io.waitScope);
  EXPECT_EQ(peer.readControl(), protocol::Control::OFFER);
  char byte;
  EXPECT_EQ(0, peer.pipe.ends[1]->tryRead(&byte, 1, 1).wait(peer.io.waitScope));
}

TEST(Setup, ShutdownLeavesTheSocketOpenForBellsUntilNobodyReceives) {
  HandMadePeer peer;
  peer.upgrade();
  peer.connection->shutdown().wait(peer.io.waitScope);
  EXPECT_EQ(peer.readControl(), protocol::Control::END);

  char byte;
  auto end = peer.pipe.ends[1]->tryRead(&byte, 1, 1);
  EXPECT_FALSE(end.poll(peer.io.waitScope));
  peer.receiving = nullptr;
  peer.connection = nullptr;
  EXPECT_EQ(0, end.wait(peer.io.waitScope));
}

TEST(Setup, ShutdownAfterThePeerIsGoneIsNoError) {
  // There is nobody to whom the end of our messages could be said.
  HandMadePeer peer;
  peer.upgrade();
  peer.pipe.ends[1] = nullptr;
  peer.settle();
  peer.connection->shutdown().wait(peer.io.waitScope);
}

TEST(Setup, EndIsTheEnd) {
  HandMadePeer peer;
  peer.upgrade();
  peer.writeControl([](protocol::Control::Builder control) { control.setEnd(); });
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  EXPECT_TRUE(peer.ended);
}

TEST(Setup, EndIsTheEndAlsoIfThePeerReadsNoMore) {
  // Its socket is closed with a bell in it, so that ours is reset.
  HandMadePeer peer;
  peer.upgrade();
  peer.receiving = nullptr;
  peer.header().sleepWord.store(5);
  peer.send(100);
  peer.settle();
  peer.writeControl([](protocol::Control::Builder control) { control.setEnd(); });
  peer.pipe.ends[1] = nullptr;
  EXPECT_TRUE(peer.connection->receiveIncomingMessage().wait(peer.io.waitScope) == nullptr);
}

TEST(Setup, ResetDoesNotLoseWhatWasPublished) {
  HandMadePeer peer;
  peer.upgrade();
  peer.receiving = nullptr;
  peer.header().sleepWord.store(5);
  peer.send(100);
  peer.settle();  // So that there is a bell that the peer does not read.

  peer.publishFinish(11);
  // Behind this bell it finds the socket reset.
  uint64_t bell = ~uint64_t(0);
  peer.pipe.ends[1]->write(&bell, sizeof(bell)).wait(peer.io.waitScope);
  peer.pipe.ends[1] = nullptr;
  peer.settle();
  EXPECT_EQ(receiveFinish(peer), 11u);
  peer.startReceiving();
  peer.settle();
  EXPECT_NE(peer.failure, "");
}

TEST(Setup, EndStaysCleanWhateverBecomesOfTheSocket) {
  HandMadePeer peer;
  peer.upgrade();
  peer.writeControl([](protocol::Control::Builder control) { control.setEnd(); });
  peer.settle();
  EXPECT_TRUE(peer.ended);
  // The peer leaves without having read all, which resets the connection.
  peer.connection->shutdown().wait(peer.io.waitScope);
  peer.pipe.ends[1] = nullptr;
  peer.settle();
  peer.ended = false;
  peer.startReceiving();
  peer.settle();
  EXPECT_TRUE(peer.ended);
  EXPECT_EQ(peer.failure, "");
}

TEST(Setup, NoDescriptorsForWhoWantsNone) {
  // Though there is room for one with each frame, for the fd of a region.
  HandMadePeer peer(SharedMemoryOptions(), 0);
  peer.upgrade();
  peer.receiving = nullptr;
  int fd = peer.region.fd;
  peer.writeControl([](protocol::Control::Builder control) { control.setFds(1); },
      kj::arrayPtr(&fd, 1));
  uint64_t root = 0;
  KJ_ASSERT_NONNULL(peer.ring).publish(
      { DescriptorKind::MESSAGE, 0, 1, 1, 1 }, kj::arrayPtr(&root, 1));
  auto message = KJ_ASSERT_NONNULL(
      peer.connection->receiveIncomingMessage().wait(peer.io.waitScope));
  EXPECT_EQ(0u, message->getAttachedFds().size());
}

TEST(HostilePeer, SecondEndIsRefused) {
  HandMadePeer peer;
  peer.upgrade();
  auto writeEnd = [&]() {
    peer.writeControl([](protocol::Control::Builder control) { control.setEnd(); });
  };
  writeEnd();
  peer.settle();
  EXPECT_TRUE(peer.ended);
  writeEnd();
  peer.settle();
  peer.startReceiving();
  peer.expectFailure("ended its messages twice");
}

TEST(HostilePeer, EndBeforeTheAgreementIsRefused) {
  HandMadePeer peer;
  peer.startReceiving();
  peer.writeControl([](protocol::Control::Builder control) { control.setEnd(); });
  peer.expectFailure("before shared memory was agreed");
}

TEST(HostilePeer, FileDescriptorsTooFarAheadAreRefused) {
  HandMadePeer peer;
  peer.upgrade();
  int fd = peer.region.fd;
  auto writeFds = [&]() {
    peer.writeControl([](protocol::Control::Builder control) { control.setFds(1); },
        kj::arrayPtr(&fd, 1));
  };
  for (kj::uint i = 0; i < MAX_FDS_AHEAD; i++) writeFds();
  peer.settle();
  EXPECT_EQ(peer.failure, "");
  writeFds();
  peer.expectFailure("too far ahead");
}

TEST(HostilePeer, FreeHandleWithoutFreeRingIsRefused) {
  HandMadePeer peer;
  peer.upgrade();
  SegmentEntry entry { 0, 8, REGION_BYTES / 2 };
  uint64_t body[] = { 5, entry.packFirst(), entry.offset };
  KJ_ASSERT_NONNULL(peer.ring).publish({ DescriptorKind::MESSAGE, 0, 1, 0, 0 }, body);
  uint64_t bell = ~uint64_t(0);
  peer.pipe.ends[1]->write(&bell, sizeof(bell)).wait(peer.io.waitScope);
  peer.expectFailure("no free ring");
}

TEST(HostilePeer, BadCounterDoesNotThrowFromSend) {
  HandMadePeer peer;
  peer.upgrade();
  // Until messages wait for room.
  for (int i = 0; i < 200; i++) peer.send(100);
  ASSERT_GT(peer.network.getStats().heapWaits, 0u);
  peer.header().consumed.store(uint64_t(1) << 40);
  EXPECT_NO_THROW(peer.send(100));
  peer.expectFailure("consumed descriptors that were not published");
}

TEST(HostilePeer, AnswerBeforeTheAnnouncementGetsNoOtherDescriptor) {
  // It was closed at the answer, and its number, which something else had by then, was sent.
  SharedMemoryOptions options;
  options.spinMicroseconds = 0;  // So that it makes a region at once.
  HandMadePeer peer(options);
  int smallest = 1;
  peer.pipe.ends[0]->setsockopt(SOL_SOCKET, SO_SNDBUF, &smallest, sizeof(smallest));
  peer.upgrade();
  // Bells that nobody reads fill the socket, so that the announcement has to wait.
  for (uint64_t epoch = 1; epoch <= 15; epoch++) {
    peer.header().sleepWord.store(epoch << SLEEP_EPOCH_SHIFT | WANT_DATA);
    peer.send(8);
    peer.io.waitScope.poll();
  }
  auto messagesOnly = peer.network.getStats().outgoing.socketBytes;
  peer.send(60000);
  peer.io.waitScope.poll();
  ASSERT_GT(peer.network.getStats().outgoing.socketBytes, messagesOnly);
  peer.writeControl([](protocol::Control::Builder control) { control.setRegionMapped(1); });
  peer.settle();
  ASSERT_EQ(peer.failure, "");
  kj::Vector<kj::AutoCloseFd> others;
  for (int i = 0; i < 4; i++) {
    int number;
    KJ_SYSCALL(number = open("/dev/null", O_RDONLY | O_CLOEXEC));
    others.add(kj::AutoCloseFd(number));
  }

  uint64_t header;
  kj::AutoCloseFd fd;
  do {
    auto n = peer.pipe.ends[1]->tryReadWithFds(&header, 8, 8, &fd, 1).wait(peer.io.waitScope);
    ASSERT_EQ(n.byteCount, 8u);
  } while (header == ~uint64_t(0));
  capnp::word body[64];
  size_t words = header >> 32;
  peer.pipe.ends[1]->read(body, words * sizeof(capnp::word)).wait(peer.io.waitScope);
  kj::ArrayPtr<const capnp::word> segment = kj::arrayPtr(body, words);
  capnp::SegmentArrayMessageReader message(kj::arrayPtr(&segment, 1));
  auto control = KJ_ASSERT_NONNULL(asControl(message.getRoot<capnp::AnyPointer>()));
  ASSERT_TRUE(control.isRegion());
  uint64_t bytes = control.getRegion().getBytes();
  EXPECT_NO_THROW(mapPeerRegion(fd, bytes, bytes));
}

TEST(HostilePeer, AnswersToAnnouncementsDoNotPileUp) {
  HandMadePeer peer;
  peer.upgrade();
  for (kj::uint i = 1; i <= 5; i++) {
    // Without an fd, so refused. An honest peer reads the answers.
    peer.writeControl([&](protocol::Control::Builder control) {
      control.initRegion().setId(i);
      control.getRegion().setBytes(REGION_BYTES);
    });
    EXPECT_EQ(peer.readControl(), protocol::Control::REGION_REFUSED);
  }
  EXPECT_EQ(peer.failure, "");
  for (kj::uint i = 6; i < 5000 && peer.failure == ""; i++) {
    peer.writeControl([&](protocol::Control::Builder control) {
      control.initRegion().setId(i);
      control.getRegion().setBytes(REGION_BYTES);
    });
    // Not so many at once that this write could block for good, now that nobody reads.
    if (i % 16 == 0) peer.settle();
  }
  peer.expectFailure("more regions than it may");
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
