// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

#include <algorithm>
#include <random>

// Messages from their construction to their end: order, lifetimes, queue figures, shutdown, and the
// time of the upgrade.

namespace capnpshm {
namespace conformance {
namespace {

class Delivery: public RawConformance {
protected:
  kj::Promise<int64_t> add(Root::Client root, int64_t a, int64_t b) {
    auto request = root.addRequest();
    request.setA(a);
    request.setB(b);
    return request.send().then([](capnp::Response<Sum>&& r) { return r.getValue(); });
  }

  kj::Promise<int64_t> nextOf(Root::Client root) {
    return root.sequenceRequest().send().then(
        [](capnp::Response<Sum>&& r) { return r.getValue(); });
  }

  kj::Promise<capnp::Response<Root::FillResults>> fill(
      Root::Client root, size_t bytes, uint8_t seed) {
    auto request = root.fillRequest();
    request.setBytes(bytes);
    request.setSeed(seed);
    return request.send();
  }

  static size_t sizeOf(uint n) {
    // Sizes of every kind, in no order.
    constexpr size_t SIZES[] = { 8, 700, 40, 30000, 0, 100, 5000, 160, 1100, 90000, 16, 2500 };
    return SIZES[n * 7 % kj::size(SIZES)] + n % 5;
  }

  void expectMemoryBack(RawLink& raw, kj::Function<void()> work) {
    // After some work, both sides have as much of their shared memory in use as before.
    auto inUse = [&](End& end) -> size_t {
      KJ_IF_MAYBE(stats, end.network.getStats()) {
        // A ring that has grown lies in the same memory as the blocks.
        return stats->arenaBytesInUse - stats->ringBytes * (stats->ringBytes > 8192);
      }
      return 0;
    };
    auto look = [&]() {
      // A side takes back what the other has freed when it allocates.
      for (uint i = 0; i < 8; i++) {
        newMessage(*raw.client, 0, 9000);
        newMessage(*raw.server, 0, 9000);
        settle(raw);
      }
    };
    look();
    size_t client = inUse(*raw.link.client);
    size_t server = inUse(*raw.link.server);
    work();
    look();
    EXPECT_EQ(client, inUse(*raw.link.client));
    EXPECT_EQ(server, inUse(*raw.link.server));
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, Delivery, testing::ValuesIn(allModes()), modeName);

// =======================================================================================
// Order and lifetimes

TEST_P(Delivery, ManyUnderConstructionAtOnce) {
  // Built in one order, sent in another, some never.
  auto raw = connectRaw();
  settle(*raw);
  expectMemoryBack(*raw, [&]() {
    constexpr uint COUNT = 400;
    std::mt19937 random(7);
    std::vector<Outgoing> messages;
    for (uint i = 0; i < COUNT; i++) {
      messages.push_back(raw->client->newOutgoingMessage(i % 3 == 0 ? i : 0));
    }
    std::vector<uint> order;
    for (uint i = 0; i < COUNT; i++) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random);
    for (auto i: order) fillMessage(*messages[i], i, sizeOf(i));

    std::shuffle(order.begin(), order.end(), random);
    std::vector<uint> sent;
    for (auto i: order) {
      if (i % 4 != 1) {
        messages[i]->send();
        sent.push_back(i);
      }
      if (i % 2 == 0) messages[i] = Outgoing();
    }
    for (auto i: sent) ASSERT_TRUE(isMessage(*next(*raw->server), i, sizeOf(i)));
  });
}

TEST_P(Delivery, RequestsSentInAnotherOrder) {
  auto link = connect(state);
  auto root = link->client->root();
  EXPECT_EQ(3, await(add(root, 1, 2)));
  std::vector<capnp::Request<Root::EchoParams, Root::EchoResults>> requests;
  for (uint i = 0; i < 200; i++) {
    requests.push_back(root.echoRequest());
    fillPattern(requests.back().initData(sizeOf(i)), i);
  }
  std::vector<kj::Promise<capnp::Response<Root::EchoResults>>> promises;
  for (uint i = 200; i-- > 0;) {
    if (i % 5 != 2) promises.push_back(requests[i].send());
    requests.pop_back();
  }
  size_t p = 0;
  for (uint i = 200; i-- > 0;) {
    if (i % 5 == 2) continue;
    auto response = await(kj::mv(promises[p++]));
    EXPECT_EQ(sizeOf(i), response.getData().size());
    EXPECT_TRUE(isPattern(response.getData(), i)) << i;
  }
}

TEST_P(Delivery, ChangedAfterSend) {
  // The sender goes on writing to messages that it has sent, and makes them grow. What arrives of
  // those is its own fault, but nothing else may suffer.
  auto raw = connectRaw();
  settle(*raw);
  expectMemoryBack(*raw, [&]() {
    constexpr uint COUNT = 48;
    auto change = [](capnp::OutgoingRpcMessage& message) {
      auto call = message.getBody().getAs<capnp::rpc::Message>().getCall();
      auto data = call.getParams().getContent().getAs<capnp::Data>();
      memset(data.begin(), 'x', data.size());
    };
    auto grow = [](capnp::OutgoingRpcMessage& message, size_t bytes) {
      auto call = message.getBody().getAs<capnp::rpc::Message>().getCall();
      memset(call.getParams().getContent().initAs<capnp::Data>(bytes).begin(), 'y', bytes);
    };
    for (auto received: { false, true }) {
      std::vector<Outgoing> kept;
      std::vector<Incoming> read;
      for (uint i = 0; i < COUNT; i++) {
        kept.push_back(newMessage(*raw->client, i, sizeOf(i)));
        kept.back()->send();
        if (received) {
          read.push_back(next(*raw->server));
          EXPECT_TRUE(isMessage(*read.back(), i, sizeOf(i)));
        }
        change(*kept.back());
        for (size_t bytes: { 10, 500, 3000, 60000 }) grow(*kept.back(), bytes);
        sendMessage(*raw->client, 1000 + i, sizeOf(i + 3));
        if (received) {
          EXPECT_TRUE(isMessage(*next(*raw->server), 1000 + i, sizeOf(i + 3)));
        }
      }
      if (received) {
        // A side that does not trust its peer reads a copy.
        if (!mode().server.trust) {
          for (uint i = 0; i < COUNT; i++) EXPECT_TRUE(isMessage(*read[i], i, sizeOf(i)));
        }
        continue;
      }
      for (uint i = 0; i < COUNT; i++) {
        next(*raw->server);
        EXPECT_TRUE(isMessage(*next(*raw->server), 1000 + i, sizeOf(i + 3)));
      }
    }
  });
}

TEST_P(Delivery, GrownWhileHalfSent) {
  // A message larger than the memory there is goes in parts, of which some are still to come.
  LinkOptions options;
  options.maxBytes = 64 * 1024;
  auto raw = connectRaw(options);
  settle(*raw);
  auto message = newMessage(*raw->client, 1, 400000);
  message->send();
  auto call = message->getBody().getAs<capnp::rpc::Message>().getCall();
  for (size_t bytes: { 8, 1000, 30000, 900000 }) {
    call.getParams().getContent().initAs<capnp::Data>(bytes);
  }
  for (uint i = 0; i < 50; i++) sendMessage(*raw->client, 2 + i, sizeOf(i));
  next(*raw->server);
  for (uint i = 0; i < 50; i++) EXPECT_TRUE(isMessage(*next(*raw->server), 2 + i, sizeOf(i)));
}

TEST_P(Delivery, ResponsesHeldWhileThousandsPass) {
  auto link = connect(state);
  auto root = link->client->root();
  constexpr uint HELD = 60;
  uint passing = SLOW ? 300 : 3000;
  std::vector<capnp::Response<Root::FillResults>> held;
  for (uint i = 0; i < HELD; i++) held.push_back(await(fill(root, sizeOf(i), i)));
  for (uint round = 0; round < 3; round++) {
    for (uint i = 0; i < passing; i += 50) {
      auto promises = kj::heapArrayBuilder<kj::Promise<int64_t>>(50);
      for (uint j = 0; j < 50; j++) promises.add(add(root, i, j));
      auto big = fill(root, sizeOf(i), i);
      auto values = await(kj::joinPromises(promises.finish()));
      for (uint j = 0; j < 50; j++) ASSERT_EQ(i + j, values[j]);
      ASSERT_TRUE(isPattern(await(kj::mv(big)).getData(), uint8_t(i)));
    }
    for (uint i = 0; i < held.size(); i++) {
      EXPECT_EQ(sizeOf(i), held[i].getData().size());
      EXPECT_TRUE(isPattern(held[i].getData(), uint8_t(i))) << i;
    }
    // Every other one is replaced.
    for (uint i = round % 2; i < held.size(); i += 2) held[i] = await(fill(root, sizeOf(i), i));
  }
}

TEST_P(Delivery, MessagesOutliveConnectionNetworkAndPeer) {
  for (uint order = 0; order < 4; order++) {
    std::vector<Incoming> received;
    std::vector<Outgoing> built;
    constexpr uint COUNT = 24;
    {
      auto raw = connectRaw();
      settle(*raw);
      for (uint i = 0; i < COUNT; i++) {
        sendMessage(*raw->client, i, sizeOf(i));
        received.push_back(next(*raw->server));
        built.push_back(newMessage(*raw->client, 100 + i, sizeOf(i)));
        if (i % 2 == 0) {
          built.back()->send();
          EXPECT_TRUE(isMessage(*next(*raw->server), 100 + i, sizeOf(i)));
        }
      }
      raw->link.check();
      auto destroy = [&](bool client) {
        (client ? raw->client : raw->server) = nullptr;
        if (client) raw->link.destroyClient();
        else raw->link.destroyServer();
        for (uint i = 0; i < COUNT; i++) EXPECT_TRUE(isMessage(*received[i], i, sizeOf(i)));
      };
      if (order % 2 == 0) {
        // A message of a connection whose network is still there can be begun, too.
        destroy(false);
        built.push_back(newMessage(*raw->client, 0, 30000));
        destroy(true);
      } else {
        destroy(true);
        destroy(false);
      }
    }
    for (uint i = 0; i < COUNT; i++) EXPECT_TRUE(isMessage(*received[i], i, sizeOf(i)));
    for (auto& message: built) fillMessage(*message, 7, 20000);  // Building goes on.
    if (order < 2) {
      received.clear();
      built.clear();
    } else {
      built.clear();
      received.clear();
    }
  }
}

TEST_P(Delivery, ResponsesAndRequestsOutliveTheirConnection) {
  std::vector<capnp::Response<Root::FillResults>> held;
  kj::Maybe<capnp::Request<Root::EchoParams, Root::EchoResults>> request;
  kj::Maybe<Root::Client> root;
  {
    auto link = connect(state);
    root = link->client->root();
    auto& r = KJ_ASSERT_NONNULL(root);
    for (uint i = 0; i < 24; i++) held.push_back(await(fill(r, sizeOf(i), i)));
    request = r.echoRequest();
    link->destroyServer();
    link->destroyClient();
  }
  for (uint i = 0; i < held.size(); i++) {
    EXPECT_EQ(sizeOf(i), held[i].getData().size());
    EXPECT_TRUE(isPattern(held[i].getData(), i)) << i;
  }
  auto& r = KJ_ASSERT_NONNULL(request);
  fillPattern(r.initData(50000), 1);
  EXPECT_FAILS(DISCONNECTED, "", r.send().ignoreResult());
  EXPECT_FAILS(DISCONNECTED, "", add(KJ_ASSERT_NONNULL(root), 1, 2));
}

// =======================================================================================
// Queue figures, shutdown

class FakeClock final: public kj::MonotonicClock {
public:
  kj::TimePoint now() const override { return time; }
  kj::TimePoint time = kj::origin<kj::TimePoint>() + 1000 * kj::SECONDS;
};

TEST_P(Delivery, QueueCountsUntilTheEndOfTheTurn) {
  auto raw = connectRaw();
  auto& network = raw->link.client->network;
  for (uint round = 0; round < 3; round++) {  // The first before the upgrade.
    turn();
    EXPECT_EQ(0, network.getCurrentQueueCount());
    EXPECT_EQ(0, network.getCurrentQueueSize());
    auto message = newMessage(*raw->client, round, 1000);
    size_t bytes = message->sizeInWords() * sizeof(capnp::word);
    message->send();
    EXPECT_EQ(1, network.getCurrentQueueCount());
    EXPECT_EQ(bytes, network.getCurrentQueueSize());
    newMessage(*raw->client, round, 1000)->send();
    EXPECT_EQ(2, network.getCurrentQueueCount());
    EXPECT_EQ(2 * bytes, network.getCurrentQueueSize());
    turn();
    if (mode().stream != StreamKind::IN_PROCESS) {  // Which has no buffer.
      EXPECT_EQ(0, network.getCurrentQueueCount());
      EXPECT_EQ(0, network.getCurrentQueueSize());
    }
    for (uint i = 0; i < 2; i++) EXPECT_TRUE(isMessage(*next(*raw->server), round, 1000));
    settle(*raw);
  }
}

TEST_P(Delivery, QueueCountsCallsToo) {
  auto link = connect(state);
  auto root = link->client->root();
  EXPECT_EQ(3, await(add(root, 1, 2)));
  turn();
  auto promise = add(root, 3, 4);
  EXPECT_LT(0, link->client->network.getCurrentQueueCount());
  EXPECT_LT(0, link->client->network.getCurrentQueueSize());
  EXPECT_EQ(0, link->client->network.getCurrentQueueSize() % 8);
  EXPECT_EQ(7, await(kj::mv(promise)));
  turn();
  EXPECT_EQ(0, link->client->network.getCurrentQueueCount());
}

TEST_P(Delivery, WaitTimeOfOutgoingMessages) {
  FakeClock clock;
  LinkOptions options { 0, capnp::ReaderOptions(), clock, 64 * 1024 };
  auto raw = connectRaw(options);
  auto& network = raw->link.client->network;
  settle(*raw);
  EXPECT_EQ(0 * kj::SECONDS, network.getOutgoingMessageWaitTime());
  sendMessage(*raw->client, 1, 100);
  EXPECT_EQ(0 * kj::SECONDS, network.getOutgoingMessageWaitTime());
  clock.time += 5 * kj::SECONDS;
  EXPECT_EQ(5 * kj::SECONDS, network.getOutgoingMessageWaitTime());
  EXPECT_TRUE(isMessage(*next(*raw->server), 1, 100));
  turn();
  EXPECT_EQ(0 * kj::SECONDS, network.getOutgoingMessageWaitTime());

  // After a pause, its time begins with the message (0.9.2 itself counts from the one before).
  clock.time += 50 * kj::SECONDS;
  sendMessage(*raw->client, 2, 100);
  if (isOurs(mode(), mode().client)) {
    EXPECT_EQ(0 * kj::SECONDS, network.getOutgoingMessageWaitTime());
  }
  EXPECT_TRUE(isMessage(*next(*raw->server), 2, 100));
  turn();

  // What does not fit into shared memory waits as long as the peer does not read.
  constexpr size_t LARGE = SLOW ? 1 << 20 : 12 << 20;
  sendMessage(*raw->client, 3, LARGE);
  turn();
  sendMessage(*raw->client, 4, 100);
  turn();
  // (A sealed segment needs no room there.)
  if (mode().client.kind == EndMode::CONTEXT && !mode().client.sealed) {
    EXPECT_EQ(2, network.getCurrentQueueCount());
    clock.time += 7 * kj::SECONDS;
    EXPECT_EQ(7 * kj::SECONDS, network.getOutgoingMessageWaitTime());
  }
  EXPECT_TRUE(isMessage(*next(*raw->server), 3, LARGE));
  EXPECT_TRUE(isMessage(*next(*raw->server), 4, 100));
  turn();
  EXPECT_EQ(0 * kj::SECONDS, network.getOutgoingMessageWaitTime());
}

TEST_P(Delivery, SendAfterShutdown) {
  for (auto early: { true, false }) {
    auto raw = connectRaw();
    if (early) {
      raw->link.client->expectNothing();
      raw->link.server->expectNothing();
    } else {
      settle(*raw);
    }
    sendMessage(*raw->client, 1, 3000);
    auto done = raw->client->shutdown();
    auto message = newMessage(*raw->client, 2, 3000);
    KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { message->send(); })) {
      EXPECT_EQ(uint(kj::Exception::Type::FAILED), uint(e->getType()));
      EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), "already shut down"));
    } else {
      ADD_FAILURE() << "a message was sent after shutdown()";
    }
    EXPECT_TRUE(isMessage(*next(*raw->server), 1, 3000));
    auto end = await(receive(*raw->server));
    EXPECT_TRUE(end == nullptr);
    await(kj::mv(done));
  }
}

// =======================================================================================
// The time of the upgrade

TEST_P(Delivery, CallsDuringTheUpgradeArriveInOrderOnce) {
  for (uint pause = 0; pause < 24; pause += SLOW ? 4 : 1) {
    ServerState atServer, atClient;
    auto link = connect(capnp::Capability::Client(kj::heap<RootImpl>(atServer)), LinkOptions(),
        capnp::Capability::Client(kj::heap<RootImpl>(atClient)));
    auto toServer = link->client->root();
    auto toClient = link->server->root();
    std::vector<kj::Promise<int64_t>> up, down;
    std::vector<kj::Promise<capnp::Response<Root::FillResults>>> bulk;
    constexpr uint COUNT = 120;
    for (uint i = 0; i < COUNT; i++) {
      up.push_back(nextOf(toServer));
      down.push_back(nextOf(toClient));
      if (i % 16 == pause % 16) bulk.push_back(fill(toServer, sizeOf(i), 0));
      // A few events between calls, in each round at other places.
      if (pause > 0 && i % pause == 0) {
        for (uint j = 0; j < 1 + pause % 3; j++) kj::evalLater([]() {}).wait(io.waitScope);
      }
    }
    for (uint i = 0; i < COUNT; i++) {
      ASSERT_EQ(i, await(kj::mv(up[i]))) << pause;
      ASSERT_EQ(i, await(kj::mv(down[i]))) << pause;
    }
    for (auto& promise: bulk) EXPECT_TRUE(isPattern(await(kj::mv(promise)).getData(), 0));
    EXPECT_EQ(COUNT, atServer.sequence);
    EXPECT_EQ(COUNT, atClient.sequence);
    link->destroyClient();
    link->destroyServer();
  }
}

TEST_P(Delivery, ServerCallsFirst) {
  auto link = connect(capnp::Capability::Client(kj::heap<RootImpl>(state)), LinkOptions(),
      capnp::Capability::Client(kj::heap<RootImpl>(mine)));
  auto toClient = link->server->root();
  std::vector<kj::Promise<int64_t>> early;
  for (uint i = 0; i < 50; i++) early.push_back(nextOf(toClient));
  turn();
  auto toServer = link->client->root();  // Before it connects, a client does not even read.
  for (uint i = 0; i < 50; i++) early.push_back(nextOf(toClient));
  for (uint i = 0; i < 100; i++) {
    EXPECT_EQ(i, await(kj::mv(early[i])));
    EXPECT_EQ(i, await(nextOf(toServer)));
  }
  EXPECT_EQ(100, mine.sequence);
  EXPECT_EQ(100, state.sequence);
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
