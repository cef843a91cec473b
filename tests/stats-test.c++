// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/rpc-shm.h>

#include <unistd.h>
#include <capnp/message.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize.h>
#include <gtest/gtest.h>
#include <kj/async-io.h>
#include <kj/debug.h>

// That getStats() counts what crosses the socket, so that "no message bytes after the switch" is a
// statement which could be false.

namespace capnpshm {
namespace {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using capnp::rpc::twoparty::Side;

class Pair {
  // Two connected networks in one process, used without an RpcSystem.

public:
  Pair()
      : io(kj::setupAsyncIo()), pipe(io.provider->newCapabilityPipe()),
        client(context(), *pipe.ends[0], 1, Side::CLIENT),
        server(context(), *pipe.ends[1], 1, Side::SERVER) {
    capnp::MallocMessageBuilder message;
    auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
    vatId.setSide(Side::SERVER);
    atClient = KJ_ASSERT_NONNULL(client.connect(vatId));
    atServer = server.accept().wait(io.waitScope);
  }

  void exchange(kj::uint count, size_t textSize) {
    // Sends messages to and fro, each with a text of that size.
    for (kj::uint i = 0; i < count; i++) {
      send(*atClient, textSize);
      ASSERT_TRUE(atServer->receiveIncomingMessage().wait(io.waitScope) != nullptr);
      send(*atServer, textSize);
      ASSERT_TRUE(atClient->receiveIncomingMessage().wait(io.waitScope) != nullptr);
    }
  }

  kj::AsyncIoContext io;
  kj::CapabilityPipe pipe;
  SharedMemoryVatNetwork client;
  SharedMemoryVatNetwork server;
  kj::Own<Connection> atClient;
  kj::Own<Connection> atServer;

private:
  SharedMemoryContext context() { return { &io.unixEventPort, SharedMemoryOptions() }; }

  static void send(Connection& connection, size_t textSize) {
    auto message = connection.newOutgoingMessage(0);
    auto reason = message->getBody().initAs<capnp::rpc::Message>().initResolve().initException()
        .initReason(textSize);
    memset(reason.begin(), 'x', textSize);
    message->send();
  }
};

TEST(Stats, BothEndsCountTheSameOnTheSocket) {
  Pair pair;
  pair.exchange(10, 100);
  auto client = pair.client.getStats();
  auto server = pair.server.getStats();

  EXPECT_EQ(client.outgoing.transport, Transport::SHARED_MEMORY);
  EXPECT_EQ(client.incoming.transport, Transport::SHARED_MEMORY);
  EXPECT_EQ(client.outgoing.messages, 10u);
  EXPECT_GT(client.outgoing.socketMessages, 0u);
  EXPECT_LT(client.outgoing.socketMessages, 10u);

  auto expectSame = [](const DirectionStats& sent, const DirectionStats& received) {
    EXPECT_EQ(sent.messages, received.messages);
    EXPECT_EQ(sent.bytes, received.bytes);
    EXPECT_EQ(sent.socketMessages, received.socketMessages);
    EXPECT_EQ(sent.socketMessageBytes, received.socketMessageBytes);
    EXPECT_EQ(sent.inlineMessages, received.inlineMessages);
    EXPECT_EQ(sent.inlineBytes, received.inlineBytes);
    EXPECT_EQ(sent.referencedMessages, received.referencedMessages);
    EXPECT_EQ(sent.referencedBytes, received.referencedBytes);
    EXPECT_EQ(received.messages, received.socketMessages + received.inlineMessages +
        received.referencedMessages);
    // A frame of one segment has a header of one word.
    EXPECT_EQ(received.bytes, received.socketMessageBytes - 8 * received.socketMessages +
        received.inlineBytes + received.referencedBytes);
    EXPECT_GE(received.socketBytes, received.socketMessageBytes);
    EXPECT_LE(received.socketBytes, sent.socketBytes);
  };
  expectSame(client.outgoing, server.incoming);
  expectSame(server.outgoing, client.incoming);
}

TEST(Stats, NoMessageBytesAfterTheSwitch) {
  Pair pair;
  pair.exchange(3, 100);
  auto before = pair.client.getStats();
  ASSERT_EQ(before.outgoing.transport, Transport::SHARED_MEMORY);
  ASSERT_EQ(before.incoming.transport, Transport::SHARED_MEMORY);

  pair.exchange(100, 50000);
  auto after = pair.client.getStats();
  EXPECT_EQ(after.outgoing.messages, before.outgoing.messages + 100);
  EXPECT_EQ(after.outgoing.socketMessageBytes, before.outgoing.socketMessageBytes);
  EXPECT_EQ(after.incoming.socketMessageBytes, before.incoming.socketMessageBytes);
  EXPECT_EQ(after.outgoing.socketMessageBytesAfterSwitch, 0u);
  EXPECT_EQ(after.incoming.socketMessageBytesAfterSwitch, 0u);
  // Control messages and bells do cross it: far less than one message of this size a round.
  EXPECT_LT(after.outgoing.socketBytes - before.outgoing.socketBytes, 50000u);
}

TEST(Stats, PlainFrameAfterTheSwitchIsCountedAndRefused) {
  Pair pair;
  pair.exchange(3, 100);
  ASSERT_EQ(pair.server.getStats().incoming.transport, Transport::SHARED_MEMORY);

  // The client's process breaks the protocol behind its library's back.
  capnp::MallocMessageBuilder message;
  message.initRoot<capnp::rpc::Message>().initFinish().setQuestionId(1);
  auto frame = capnp::messageToFlatArray(message);
  auto bytes = frame.asBytes();
  int fd = KJ_ASSERT_NONNULL(pair.pipe.ends[0]->getFd());
  ASSERT_EQ(write(fd, bytes.begin(), bytes.size()), ssize_t(bytes.size()));

  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    pair.atServer->receiveIncomingMessage().wait(pair.io.waitScope);
  })) {
    EXPECT_NE(nullptr, strstr(exception->getDescription().cStr(),
        "plain message after it had switched")) << exception->getDescription().cStr();
  } else {
    ADD_FAILURE() << "the frame was accepted";
  }
  EXPECT_EQ(pair.server.getStats().incoming.socketMessageBytesAfterSwitch, bytes.size());
}

}  // namespace
}  // namespace capnpshm
