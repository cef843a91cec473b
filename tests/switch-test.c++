// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hand-made-peer.h"

// What becomes of the messages which a side publishes with its switch, before the peer has said
// that it can read them: they are there when it can, and come again as plain frames if it cannot.

namespace capnpshm {
namespace testing {
namespace {

class SwitchingPeer: public HandMadePeer {
  // A server whose client has switched, and that has not answered that yet.

public:
  explicit SwitchingPeer(SharedMemoryOptions options = SharedMemoryOptions())
      : HandMadePeer(options) {
    startReceiving();
    uint64_t bytes = readOffer();
    writeOffer();
    readSwitch(bytes);
  }

  void sendNumbered(kj::uint number, size_t bytes = 0, bool withFd = false) {
    auto message = connection->newOutgoingMessage(0);
    auto call = message->getBody().initAs<capnp::rpc::Message>().initCall();
    call.setQuestionId(number);
    call.getParams().getContent().initAs<capnp::Data>(bytes);
    if (withFd) {
      auto fds = kj::heapArray<int>(1);
      fds[0] = region.fd;
      message->setFds(kj::mv(fds));
    }
    message->send();
  }

  void expectPlain(kj::uint number, size_t bytes = 0, bool withFd = false) {
    kj::AutoCloseFd fdSpace[1];
    auto message = capnp::readMessage(*pipe.ends[1], fdSpace).wait(io.waitScope);
    auto root = message.reader->getRoot<capnp::rpc::Message>();
    ASSERT_TRUE(root.isCall()) << kj::uint(root.which());
    EXPECT_EQ(number, root.getCall().getQuestionId());
    EXPECT_EQ(bytes, root.getCall().getParams().getContent().getAs<capnp::Data>().size());
    EXPECT_EQ(withFd, message.fds.size() == 1);
  }

  void expectPublished(DescriptorConsumer& consumer, kj::uint number) {
    // That the next descriptor holds a message, and it is that one.
    Descriptor descriptor;
    ASSERT_TRUE(consumer.tryTake(descriptor)) << number;
    if (descriptor.head.kind == DescriptorKind::JUMP) {
      auto target = SegmentEntry::unpack(descriptor.body[0], descriptor.body[1]);
      consumer.jump(kj::arrayPtr(reinterpret_cast<const DescriptorLine*>(
          KJ_ASSERT_NONNULL(peerMemory).bytes().begin() + target.offset),
          target.words * sizeof(capnp::word) / sizeof(DescriptorLine)));
      ASSERT_TRUE(consumer.tryTake(descriptor)) << number;
    }
    ASSERT_EQ(DescriptorKind::MESSAGE, descriptor.head.kind);
    auto segment = kj::arrayPtr(
        reinterpret_cast<const capnp::word*>(descriptor.body), descriptor.head.inlineWords);
    capnp::SegmentArrayMessageReader reader(kj::arrayPtr(&segment, 1));
    EXPECT_EQ(number, reader.getRoot<capnp::rpc::Message>().getCall().getQuestionId());
    header().consumed.store(consumer.getPosition());
  }
};

TEST(Switch, WhatWasPublishedComesPlainIfThePeerDeclines) {
  SwitchingPeer peer;
  peer.sendNumbered(1);
  peer.sendNumbered(2, 5000);
  peer.sendNumbered(3, 0, true);    // From here on they wait.
  peer.sendNumbered(4, 500000);
  peer.sendNumbered(5);
  auto published = peer.network.getStats();
  EXPECT_EQ(1u, published.outgoing.inlineMessages);
  EXPECT_EQ(1u, published.outgoing.referencedMessages);
  auto end = peer.connection->shutdown().eagerlyEvaluate(nullptr);
  peer.settle();
  EXPECT_FALSE(end.poll(peer.io.waitScope));

  peer.writeDeclined();
  peer.expectPlain(1);
  peer.expectPlain(2, 5000);
  peer.expectPlain(3, 0, true);
  peer.expectPlain(4, 500000);
  peer.expectPlain(5);
  end.wait(peer.io.waitScope);
  char byte;
  EXPECT_EQ(0, peer.pipe.ends[1]->tryRead(&byte, 1, 1).wait(peer.io.waitScope));

  auto stats = peer.network.getStats();
  EXPECT_EQ(Transport::PLAIN, stats.outgoing.transport);
  EXPECT_STREQ("the peer declined: not here", stats.outgoing.plainReason.cStr());
  EXPECT_EQ(5u, stats.outgoing.messages);
  EXPECT_EQ(5u, stats.outgoing.socketMessages);
  EXPECT_EQ(0u, stats.regions);
  EXPECT_EQ(0u, peer.network.getCurrentQueueCount());
  EXPECT_EQ(0u, peer.network.getCurrentQueueSize());
  EXPECT_EQ(peer.failure, "");
}

TEST(Switch, WhatThePeerHasNotTakenComesPlainIfWeDecline) {
  SwitchingPeer peer;
  for (kj::uint i = 1; i <= 3; i++) peer.sendNumbered(i);
  peer.writeSwitch(false);
  EXPECT_EQ(peer.readControl(), protocol::Control::DECLINED);
  peer.sendNumbered(4);
  peer.settle();
  uint64_t onSocket = peer.network.getStats().outgoing.socketMessages;
  EXPECT_EQ(0u, onSocket);
  peer.writeMapped();
  peer.writeTaken(2);
  peer.expectPlain(3);
  peer.expectPlain(4);
  peer.sendNumbered(5);
  peer.expectPlain(5);
  EXPECT_EQ(peer.failure, "");
  peer.writeTaken(0);
  peer.expectFailure("was not asked");
}

TEST(Switch, WhatWasPublishedComesPlainIfBothDecline) {
  SwitchingPeer peer;
  peer.sendNumbered(1);
  peer.writeSwitch(false);
  EXPECT_EQ(peer.readControl(), protocol::Control::DECLINED);
  peer.writeDeclined();
  peer.expectPlain(1);
  EXPECT_EQ(peer.failure, "");
}

TEST(Switch, PeerCannotHaveTakenMoreThanItWasSent) {
  SwitchingPeer peer;
  peer.sendNumbered(1);
  peer.writeSwitch(false);
  EXPECT_EQ(peer.readControl(), protocol::Control::DECLINED);
  peer.writeMapped();
  peer.writeTaken(2);
  peer.expectFailure("which it was not sent");
}

TEST(Switch, PeerThatDeclinesLateLearnsWhatWasTaken) {
  for (kj::uint toTake: { 0, 1, 2 }) {
    SwitchingPeer peer;
    peer.receiving = nullptr;
    auto receive = [&]() {
      return peer.connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
    };
    auto next = receive();
    peer.sendNumbered(1);
    peer.writeHeader();
    for (kj::uint i = 0; i < toTake; i++) peer.publishFinish(10 + i);
    peer.writeSwitch();
    ASSERT_EQ(peer.readControl(), protocol::Control::MAPPED);
    for (kj::uint i = 0; i < toTake; i++) {
      ASSERT_TRUE(next.wait(peer.io.waitScope) != nullptr);
      next = receive();
    }
    peer.sendNumbered(2);
    peer.writeDeclined();
    auto message = peer.read();
    auto control = KJ_ASSERT_NONNULL(asControl(message->getRoot<capnp::AnyPointer>()));
    ASSERT_TRUE(control.isTaken());
    EXPECT_EQ(toTake, control.getTaken());
    peer.expectPlain(1);
    peer.expectPlain(2);
    // Also to who waits since before.
    peer.writeFinish(20);
    auto received = KJ_ASSERT_NONNULL(next.wait(peer.io.waitScope));
    EXPECT_EQ(20u,
        received->getBody().getAs<capnp::rpc::Message>().getFinish().getQuestionId());
    received = nullptr;
    next = receive();
    peer.writeFinish(21);
    EXPECT_TRUE(next.wait(peer.io.waitScope) != nullptr);
    EXPECT_EQ(Transport::PLAIN, peer.network.getStats().incoming.transport);
    EXPECT_EQ(0u, peer.network.getStats().regions);
  }
}

TEST(Switch, WhatWasPublishedComesPlainIfThePeerCanAnswerNoMore) {
  SwitchingPeer peer;
  peer.sendNumbered(1);
  peer.sendNumbered(2);
  peer.pipe.ends[1]->shutdownWrite();
  peer.expectPlain(1);
  peer.expectPlain(2);
  peer.settle();
  EXPECT_TRUE(peer.ended);
  EXPECT_EQ(peer.failure, "");
}

TEST(Switch, WhatWasPublishedIsThereWhenThePeerHasMapped) {
  SwitchingPeer peer;
  constexpr kj::uint COUNT = 200;   // More than its ring has room for.
  for (kj::uint i = 0; i < COUNT; i++) peer.sendNumbered(i);
  EXPECT_LT(peer.network.getStats().outgoing.inlineMessages, COUNT);
  EXPECT_EQ(0u, peer.network.getStats().bellsRung);
  auto consumer = peer.networksRing();
  // The network could not see that we sleep, and rings when it can.
  peer.header().sleepWord.store(uint64_t(1) << SLEEP_EPOCH_SHIFT | WANT_DATA);
  peer.answerSwitch();
  uint64_t bell = 0;
  peer.pipe.ends[1]->read(&bell, sizeof(bell)).wait(peer.io.waitScope);
  EXPECT_EQ(~uint64_t(0), bell);
  peer.writeMapped();
  for (kj::uint i = 0; i < COUNT; i++) {
    peer.expectPublished(consumer, i);
    if (i % 8 == 7) {
      // So that the network finds what we have consumed.
      peer.ringBell();
      peer.settle();
    }
  }
  EXPECT_EQ(0u, peer.network.getStats().outgoing.socketMessages);
  EXPECT_EQ(peer.failure, "");
}

TEST(Switch, WhatAPeerPublishedIsDeliveredThoughItLeftBeforeItHadMapped) {
  for (bool reset: { false, true }) {
    SwitchingPeer peer;
    peer.receiving = nullptr;
    auto next = peer.connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
    peer.writeHeader();
    peer.publishFinish(11);
    peer.writeSwitch();
    if (!reset) {
      EXPECT_EQ(peer.readControl(), protocol::Control::MAPPED);
    } else {
      peer.settle();
    }
    peer.pipe.ends[1] = nullptr;
    auto received = KJ_ASSERT_NONNULL(next.wait(peer.io.waitScope));
    auto finish = received->getBody().getAs<capnp::rpc::Message>().getFinish();
    EXPECT_EQ(11u, finish.getQuestionId());
    peer.startReceiving();
    peer.settle();
    EXPECT_EQ(!reset, peer.ended);
    EXPECT_EQ(reset, peer.failure != "");
  }
}

TEST(Switch, WhoEndedItsMessagesTakesThePeersAsPlainFrames) {
  HandMadePeer peer;
  auto next = peer.connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
  EXPECT_EQ(peer.readControl(), protocol::Control::OFFER);
  peer.connection->shutdown().wait(peer.io.waitScope);
  peer.writeOffer();
  peer.writeSwitch();
  peer.settle();
  char byte;
  EXPECT_EQ(0, peer.pipe.ends[1]->tryRead(&byte, 1, 1).wait(peer.io.waitScope));
  // So we know that it will not map our region.
  peer.writeFinish(5);
  EXPECT_TRUE(next.wait(peer.io.waitScope) != nullptr);
}

TEST(Switch, BothSidesMaySwitchAtOnce) {
  // If their offers crossed.
  SwitchingPeer peer;
  peer.answerSwitch();
  peer.writeMapped();
  peer.settle();
  auto stats = peer.network.getStats();
  EXPECT_EQ(Transport::SHARED_MEMORY, stats.outgoing.transport);
  EXPECT_EQ(Transport::SHARED_MEMORY, stats.incoming.transport);
  EXPECT_EQ(peer.failure, "");
}

TEST(Switch, PeerThatSwitchesFirstIsFollowed) {
  HandMadePeer peer;
  peer.startReceiving();
  uint64_t bytes = peer.readOffer();
  auto call = peer.connection->newOutgoingMessage(0);  // So that it would put it off.
  call->getBody().initAs<capnp::rpc::Message>().initCall();
  call->send();
  peer.read();
  peer.writeOffer();
  peer.writeHeader();
  peer.writeSwitch();
  peer.readSwitch(bytes);
  ASSERT_EQ(peer.readControl(), protocol::Control::MAPPED);
  peer.writeMapped();
  peer.settle();
  EXPECT_EQ(Transport::SHARED_MEMORY, peer.network.getStats().incoming.transport);
  EXPECT_EQ(peer.failure, "");
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
