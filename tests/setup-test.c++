// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/rpc-shm.h>

#include <capnp-shm/handshake.h>
#include <capnp/message.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize-async.h>
#include <gtest/gtest.h>
#include <kj/async-io.h>
#include <kj/debug.h>

// The set-up of a connection against a peer that is written here by hand, frame by frame.

namespace capnpshm {
namespace {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using capnp::rpc::twoparty::Side;

class HandMadePeer {
  // A network and, at the other end of its socket, whatever the test writes.

public:
  explicit HandMadePeer(Side side)
      : io(kj::setupAsyncIo()), pipe(io.provider->newCapabilityPipe()),
        network(*pipe.ends[0], 1, side) {
    if (side == Side::CLIENT) {
      capnp::MallocMessageBuilder message;
      auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
      vatId.setSide(Side::SERVER);
      connection = KJ_ASSERT_NONNULL(network.connect(vatId));
    } else {
      connection = network.accept().wait(io.waitScope);
    }
  }

  void write(capnp::MessageBuilder& message) {
    capnp::writeMessage(*pipe.ends[1], message).wait(io.waitScope);
  }

  void writeOfferWithoutFd() {
    // As it looks behind a proxy that strips file descriptors.
    ControlMessage message;
    auto offer = message.get().initOffer();
    offer.setMinVersion(1);
    offer.setMaxVersion(1);
    offer.setNonce(1234);
    offer.setRegionBytes(32768);
    write(message.getMessage());
  }

  void writeFinish(kj::uint questionId) {
    capnp::MallocMessageBuilder message;
    message.initRoot<capnp::rpc::Message>().initFinish().setQuestionId(questionId);
    write(message);
  }

  kj::Own<capnp::MessageReader> read() {
    return capnp::readMessage(*pipe.ends[1]).wait(io.waitScope);
  }

  kj::uint receiveFinish() {
    // Of the message which the network delivers next.
    auto message = KJ_ASSERT_NONNULL(connection->receiveIncomingMessage().wait(io.waitScope));
    auto reader = message->getBody().getAs<capnp::rpc::Message>();
    KJ_REQUIRE(reader.isFinish(), "the application got another message", uint(reader.which()));
    return reader.getFinish().getQuestionId();
  }

  kj::AsyncIoContext io;
  kj::CapabilityPipe pipe;
  SharedMemoryVatNetwork network;
  kj::Own<Connection> connection;
};

TEST(Setup, WhatWasUnderWayWhenItDeclinedDoesNotReachTheApplication) {
  HandMadePeer peer(Side::CLIENT);

  // A server maps the client's region, and answers. The client cannot use the server's.
  peer.writeOfferWithoutFd();
  ControlMessage mapped;
  mapped.get().setMapped();
  peer.write(mapped.getMessage());
  peer.writeFinish(7);

  EXPECT_EQ(peer.receiveFinish(), 7u);
  auto first = peer.read();
  EXPECT_TRUE(KJ_ASSERT_NONNULL(asControl(first->getRoot<capnp::AnyPointer>())).isOffer());
  auto second = peer.read();
  EXPECT_TRUE(KJ_ASSERT_NONNULL(asControl(second->getRoot<capnp::AnyPointer>())).isDeclined());
  EXPECT_EQ(peer.network.getStats().incoming.transport, Transport::PLAIN);
}

TEST(Setup, TwoClientsMayBothDecline) {
  HandMadePeer peer(Side::CLIENT);
  peer.writeOfferWithoutFd();
  ControlMessage declined;
  declined.get().setDeclined("as it is");
  peer.write(declined.getMessage());
  peer.writeFinish(8);
  EXPECT_EQ(peer.receiveFinish(), 8u);
  EXPECT_EQ(peer.network.getStats().incoming.transport, Transport::PLAIN);
}

}  // namespace
}  // namespace capnpshm
