// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hand-made-peer.h"

#include <capnp-shm/busy-poll.h>
#include <kj/function.h>
#include <unistd.h>

// That a few calls of a connection need no shared memory, and that nothing after them does without:
// until when a client puts off its switch.

namespace capnpshm {
namespace testing {
namespace {

class Pair {
  // Two connected networks in one process, used without an RpcSystem.

public:
  explicit Pair(SharedMemoryOptions options = SharedMemoryOptions())
      : options(options), io(kj::setupAsyncIo()), pipe(io.provider->newCapabilityPipe()),
        client(context(), *pipe.ends[0], 1, Side::CLIENT),
        server(context(), *pipe.ends[1], 1, Side::SERVER) {
    capnp::MallocMessageBuilder message;
    auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
    vatId.setSide(Side::SERVER);
    atClient = KJ_ASSERT_NONNULL(client.connect(vatId));
    atServer = server.accept().wait(io.waitScope);
  }

  using Connection = capnp::TwoPartyVatNetworkBase::Connection;
  using Fill = kj::FunctionParam<void(capnp::rpc::Message::Builder)>;

  static void send(Connection& from, Fill fill) {
    auto message = from.newOutgoingMessage(0);
    fill(message->getBody().initAs<capnp::rpc::Message>());
    message->send();
  }
  void call(Connection& from, size_t bytes = 0) {
    send(from, [&](capnp::rpc::Message::Builder m) {
      m.initCall().getParams().getContent().initAs<capnp::Data>(bytes);
    });
  }
  void answer(size_t bytes = 0) {
    send(*atServer, [&](capnp::rpc::Message::Builder m) {
      m.initReturn().initResults().getContent().initAs<capnp::Data>(bytes);
    });
  }
  void receive(Connection& to) {
    ASSERT_TRUE(to.receiveIncomingMessage().wait(io.waitScope) != nullptr);
  }

  void firstCall() {
    call(*atClient);
    receive(*atServer);
    answer();
    receive(*atClient);
  }
  void expectShared() {
    for (int i = 0; i < 10; i++) kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
    // The server learns it when it reads.
    auto end = atServer->receiveIncomingMessage();
    kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
    for (int i = 0; i < 10; i++) kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
    for (auto network: { &client, &server }) {
      auto stats = network->getStats();
      EXPECT_EQ(Transport::SHARED_MEMORY, stats.outgoing.transport);
      EXPECT_EQ(Transport::SHARED_MEMORY, stats.incoming.transport);
    }
  }
  size_t regions() {
    // Of both sides.
    return client.getStats().regions + server.getStats().regions;
  }
  uint64_t messagesInSharedMemory() {
    auto stats = client.getStats().outgoing;
    return stats.inlineMessages + stats.referencedMessages;
  }

  SharedMemoryOptions options;
  kj::AsyncIoContext io;
  kj::CapabilityPipe pipe;
  SharedMemoryVatNetwork client;
  SharedMemoryVatNetwork server;
  kj::Own<Connection> atClient;
  kj::Own<Connection> atServer;

private:
  SharedMemoryContext context() { return { &io.unixEventPort, options }; }
};

TEST(FirstCall, NeedsNoSharedMemory) {
  Pair pair;
  pair.firstCall();
  // Agreed it is.
  EXPECT_EQ(Transport::SHARED_MEMORY, pair.client.getStats().outgoing.transport);
  // What ends it does not count.
  Pair::send(*pair.atClient, [](capnp::rpc::Message::Builder m) { m.initFinish(); });
  Pair::send(*pair.atClient, [](capnp::rpc::Message::Builder m) { m.initRelease(); });
  EXPECT_EQ(0u, pair.regions());
  // Nor does the end of the connection.
  Pair::send(*pair.atClient, [](capnp::rpc::Message::Builder m) { m.initAbort(); });
  EXPECT_EQ(0u, pair.regions());
  pair.atClient = nullptr;
  EXPECT_EQ(0u, pair.regions());
}

TEST(FirstCall, IsLookedForBeforeSleeping) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  Pair pair;
  pair.firstCall();
  EXPECT_EQ(0u, pair.regions());
  EXPECT_GT(TurnEnd::forThisLoop()->getLooks(), 0u) << "its socket is all that there is so far";
}

TEST(FirstCall, WhoSleepsWithTheAnswerShares) {
  Pair pair;
  pair.firstCall();
  EXPECT_EQ(0u, pair.regions());
  pair.expectShared();
}

TEST(FirstCall, WhoHasEndedItsMessagesSharesNoMore) {
  Pair pair;
  pair.firstCall();
  auto end = pair.atClient->shutdown();
  auto receiving = pair.atClient->receiveIncomingMessage();
  for (int i = 0; i < 10; i++) kj::Promise<void>(kj::NEVER_DONE).poll(pair.io.waitScope);
  EXPECT_EQ(0u, pair.regions());
}

TEST(FirstCall, WhoSleepsWithoutTheAnswerDoesNotYet) {
  Pair pair;
  pair.call(*pair.atClient);
  pair.receive(*pair.atServer);
  auto receiving = pair.atClient->receiveIncomingMessage();
  for (int i = 0; i < 10; i++) ASSERT_FALSE(receiving.poll(pair.io.waitScope));
  EXPECT_EQ(Transport::SHARED_MEMORY, pair.client.getStats().outgoing.transport);
  EXPECT_EQ(0u, pair.regions());
  pair.answer();
  receiving.wait(pair.io.waitScope);
  EXPECT_EQ(0u, pair.regions());
  pair.expectShared();
}

SharedMemoryOptions withPlainCalls(kj::uint count) {
  SharedMemoryOptions result;
  result.plainCalls = count;
  return result;
}

TEST(FirstCall, IsFollowedByFewOthersOnTheSocket) {
  for (kj::uint few: { 1u, 2u, SharedMemoryOptions().plainCalls }) {
    Pair pair(withPlainCalls(few));
    for (kj::uint i = 0; i < few; i++) pair.firstCall();
    EXPECT_EQ(0u, pair.regions());
    pair.call(*pair.atClient);
    EXPECT_EQ(1u, pair.messagesInSharedMemory()) << few;
    pair.receive(*pair.atServer);
    pair.expectShared();
  }
}

TEST(FirstCall, AnswerSharesIfNoneIsToBePlain) {
  Pair pair(withPlainCalls(0));
  pair.firstCall();
  EXPECT_EQ(1u, pair.client.getStats().regions);
  pair.expectShared();
}

TEST(FirstCall, IsNotFollowedByOthersOnTheSocketAfterAPause) {
  Pair pair;
  pair.firstCall();
  pair.firstCall();
  EXPECT_EQ(0u, pair.regions());
  pair.expectShared();
  uint64_t before = pair.messagesInSharedMemory();
  pair.call(*pair.atClient);
  EXPECT_EQ(before + 1, pair.messagesInSharedMemory());
}

TEST(FirstCall, IsNotFollowedByLargeOnesOnTheSocket) {
  // Though they were built in private memory, as those are that give no hint.
  Pair pair;
  pair.firstCall();
  pair.call(*pair.atClient, 2048);
  EXPECT_EQ(1u, pair.messagesInSharedMemory());
  pair.receive(*pair.atServer);
  pair.expectShared();
}

TEST(FirstCall, IsNotFollowedByOthersOnTheSocketIfItsAnswerIsLarge) {
  Pair pair;
  pair.call(*pair.atClient);
  pair.receive(*pair.atServer);
  pair.answer(2048);
  pair.receive(*pair.atClient);
  EXPECT_EQ(1u, pair.client.getStats().regions);
  pair.expectShared();
}

TEST(FirstCall, IsNotFollowedByOthersOnTheSocketIfOneIsEnough) {
  Pair pair(withPlainCalls(1));
  pair.firstCall();
  uint64_t onSocket = pair.client.getStats().outgoing.socketMessages;
  pair.call(*pair.atClient);
  EXPECT_EQ(1u, pair.messagesInSharedMemory());
  EXPECT_EQ(onSocket, pair.client.getStats().outgoing.socketMessages);
  pair.receive(*pair.atServer);
  pair.expectShared();
}

TEST(FirstCall, IsNotFollowedByOthersOnTheSocketWhileItIsPending) {
  Pair pair(withPlainCalls(1));
  pair.call(*pair.atClient);
  pair.receive(*pair.atServer);
  auto receiving = pair.atClient->receiveIncomingMessage().eagerlyEvaluate(nullptr);
  ASSERT_FALSE(receiving.poll(pair.io.waitScope));
  pair.call(*pair.atClient);
  EXPECT_EQ(1u, pair.messagesInSharedMemory());
  pair.receive(*pair.atServer);
  pair.answer();
  receiving.wait(pair.io.waitScope);
  pair.expectShared();
}

TEST(FirstCall, LargeRequestAfterItIsBuiltInSharedMemory) {
  Pair pair;
  pair.firstCall();
  auto message = pair.atClient->newOutgoingMessage(512);
  message->getBody().initAs<capnp::rpc::Message>().initCall().getParams().getContent()
      .initAs<capnp::Data>(2048);
  message->send();
  EXPECT_EQ(1u, pair.messagesInSharedMemory());
  EXPECT_EQ(0u, pair.client.getStats().outgoing.copiedBytes);
  pair.receive(*pair.atServer);
  pair.expectShared();
}

TEST(FirstCall, ManyAtOnceShareWithTheFirstAnswer) {
  // They were sent before it was known that there could be shared memory.
  Pair pair(withPlainCalls(3));
  for (int i = 0; i < 4; i++) {
    pair.call(*pair.atClient);
    pair.receive(*pair.atServer);
  }
  EXPECT_EQ(0u, pair.regions());
  pair.answer();
  pair.receive(*pair.atClient);
  EXPECT_EQ(1u, pair.regions());
  pair.expectShared();
}

TEST(FirstCall, AFewAtOnceDoNot) {
  Pair pair(withPlainCalls(3));
  for (int i = 0; i < 3; i++) {
    pair.call(*pair.atClient);
    pair.receive(*pair.atServer);
  }
  for (int i = 0; i < 3; i++) {
    pair.answer();
    pair.receive(*pair.atClient);
    EXPECT_EQ(0u, pair.regions());
  }
  pair.expectShared();
}

TEST(FirstCall, PeerThatCallsBackShares) {
  Pair pair;
  pair.call(*pair.atClient);
  pair.receive(*pair.atServer);
  pair.call(*pair.atServer);
  pair.receive(*pair.atClient);
  EXPECT_EQ(1u, pair.regions());
  pair.expectShared();
}

TEST(FirstCall, IsFollowedByOnesWhileWeWaitForThePort) {
  // What reads the socket already, though not at this moment, is the only one that does.
  Pair pair(withPlainCalls(2));
  for (int i = 0; i < 2; i++) {
    pair.call(*pair.atClient);
    pair.receive(*pair.atServer);
  }
  pair.answer();
  pair.receive(*pair.atClient);
  EXPECT_EQ(0u, pair.regions());
  auto turnEnd = TurnEnd::forThisLoop();
  while (!turnEnd->mustYield()) turnEnd->count(0);
  auto receiving = pair.atClient->receiveIncomingMessage().eagerlyEvaluate(nullptr);
  kj::evalLater([]() {}).wait(pair.io.waitScope);
  EXPECT_TRUE(turnEnd->mustYield());
  pair.call(*pair.atClient);
  EXPECT_EQ(1u, pair.messagesInSharedMemory());
  pair.receive(*pair.atServer);
  pair.answer();
  receiving.wait(pair.io.waitScope);
  pair.expectShared();
}

TEST(FirstCall, LargeOneAfterItNeedsNoFurtherRegion) {
  // Unless spins cannot make up for one.
  for (bool spins: { true, false }) {
    SharedMemoryOptions options;
    if (!spins) options.spinMicroseconds = 0;
    Pair pair(options);
    pair.firstCall();
    pair.call(*pair.atClient, 30000);
    pair.receive(*pair.atServer);
    EXPECT_EQ(spins ? 1u : 2u, pair.client.getStats().regions);
  }
}

TEST(FirstCall, LargeOneAfterItNeedsARegionIfWeSleepMeanwhile) {
  HandMadePeer peer;
  peer.upgrade();
  peer.send(60000);
  peer.settle();
  for (int i = 0; i < 3; i++) {
    EXPECT_EQ(1u, peer.network.getStats().regions) << i;
    peer.ringBell();
    peer.settle();
  }
  EXPECT_EQ(2u, peer.network.getStats().regions);
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
