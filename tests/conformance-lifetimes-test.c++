// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

// What ends when, and in which order: connections, networks, streams, event loops, messages.

namespace capnpshm {
namespace conformance {
namespace {

struct Resources {
  // What this process holds of the kernel's.

  uint fds = 0;
  uint mappings = 0;  // Of shared memory.

  static Resources now() {
    Resources result;
    auto dir = opendir("/proc/self/fd");
    KJ_REQUIRE(dir != nullptr);
    while (readdir(dir) != nullptr) ++result.fds;
    closedir(dir);
    auto maps = fopen("/proc/self/maps", "re");
    KJ_REQUIRE(maps != nullptr);
    char line[4096];
    while (fgets(line, sizeof(line), maps) != nullptr) {
      if (strstr(line, "memfd:") != nullptr) ++result.mappings;
    }
    fclose(maps);
    return result;
  }
};

class Lifetimes: public Conformance {
protected:
  Lifetimes(): before(Resources::now()) {}

  void TearDown() override {
    turn();
    auto after = Resources::now();
    EXPECT_EQ(before.fds, after.fds);
    EXPECT_EQ(before.mappings, after.mappings);
    EXPECT_EQ(0, state.roots);
    EXPECT_EQ(0, state.items);
    EXPECT_EQ(0, mine.items);
  }

  kj::Own<Link> connectBoth() {
    return connect(capnp::Capability::Client(kj::heap<RootImpl>(state)), LinkOptions(),
        capnp::Capability::Client(kj::heap<RootImpl>(mine)));
  }

  void upgrade(Link& link) {
    auto root = link.client->root();
    for (uint i = 0; i < 4; i++) await(root.sequenceRequest().send());
    turn();
    link.check();
  }

private:
  Resources before;
};

INSTANTIATE_TEST_SUITE_P(Modes, Lifetimes, testing::ValuesIn(allModes()), modeName);

class ThrownExceptions: public kj::ExceptionCallback {
  // Counts what KJ throws on this thread as long as it lives.

public:
  uint count = 0;

  void onRecoverableException(kj::Exception&& exception) override {
    ++count;
    kj::ExceptionCallback::onRecoverableException(kj::mv(exception));
  }
  void onFatalException(kj::Exception&& exception) override {
    ++count;
    kj::ExceptionCallback::onFatalException(kj::mv(exception));
  }
};

TEST_P(Lifetimes, ClientThatLeavesCostsNoException) {
  // It takes longer than all the rest of a connection's end.
  if (mode().expected != Transport::SHARED_MEMORY) GTEST_SKIP() << "only without shared memory";
  auto link = connectBoth();
  upgrade(*link);
  ThrownExceptions thrown;
  link->client->rpc = nullptr;
  link->client = nullptr;
  turn();
  EXPECT_EQ(0u, thrown.count);
}

struct InFlight {
  // What an application may hold of a connection, with calls under way in both directions.

  std::vector<kj::Promise<void>> promises;
  std::vector<Item::Client> items;
  std::vector<capnp::Response<Root::FillResults>> responses;
  kj::Maybe<capnp::Request<Root::EchoParams, Root::EchoResults>> unsent;
};

TEST_P(Lifetimes, EveryOrderOfDestruction) {
  // Of both RPC systems and both networks with their streams, what the application holds before or
  // after, with the loop turning in between or not.
  enum Part { CLIENT_RPC, CLIENT_END, SERVER_RPC, SERVER_END };
  const Part orders[][4] = {
    { CLIENT_RPC, CLIENT_END, SERVER_RPC, SERVER_END },
    { CLIENT_RPC, SERVER_RPC, CLIENT_END, SERVER_END },
    { CLIENT_RPC, SERVER_RPC, SERVER_END, CLIENT_END },
    { SERVER_RPC, SERVER_END, CLIENT_RPC, CLIENT_END },
    { SERVER_RPC, CLIENT_RPC, SERVER_END, CLIENT_END },
    { SERVER_RPC, CLIENT_RPC, CLIENT_END, SERVER_END },
  };
  for (auto& order: orders) {
    for (uint variant = 0; variant < 8; variant++) {
      bool heldOutlives = variant & 1, turns = variant & 2, upgraded = variant & 4;
      InFlight held;
      auto link = connectBoth();
      if (upgraded) {
        upgrade(*link);
      } else {
        link->client->expectNothing();
        link->server->expectNothing();
      }
      auto root = link->client->root();
      auto hold = [&](auto&& promise) {
        held.promises.push_back(promise.ignoreResult().eagerlyEvaluate([](kj::Exception&&) {}));
      };
      if (upgraded) {
        auto fill = root.fillRequest();
        fill.setBytes(5000);
        held.responses.push_back(await(fill.send()));
        held.items.push_back(await(link->server->root().makeRequest().send()).getItem());
      }
      held.items.push_back(root.makeRequest().send().getItem());
      hold(held.items.back().nameRequest().send());
      hold(root.neverRequest().send());
      auto echo = root.echoRequest();
      echo.setData(pattern(100000, 1));
      held.unsent = root.echoRequest();
      hold(echo.send());
      auto visit = root.visitRequest();
      visit.setItem(kj::heap<ItemImpl>(mine, "mine"));
      visit.setCount(50);
      hold(visit.send());
      root = nullptr;
      if (upgraded) hold(link->server->root().neverRequest().send());
      if (turns) turn();

      if (!heldOutlives) held = InFlight();
      for (auto part: order) {
        switch (part) {
          case CLIENT_RPC: link->client->rpc = nullptr; break;
          case SERVER_RPC: link->server->rpc = nullptr; break;
          case CLIENT_END: link->client = nullptr; break;
          case SERVER_END: link->server = nullptr; break;
        }
        if (turns) turn();
      }
      for (auto& response: held.responses) EXPECT_TRUE(isPattern(response.getData(), 0));
      held = InFlight();
      link = nullptr;
      turn();
      ASSERT_EQ(0, state.roots + state.items + mine.roots + mine.items);
      state.running = mine.running = 0;
    }
  }
}

TEST_P(Lifetimes, CallsInFlightFailWhenTheirNetworkGoes) {
  auto link = connect(state);
  upgrade(*link);
  auto root = link->client->root();
  auto first = root.neverRequest().send();
  auto second = root.makeRequest().send().getItem();
  auto name = second.nameRequest().send();
  auto idle = link->client->network.onDisconnect();
  EXPECT_FALSE(idle.poll(io.waitScope));
  link->client->rpc = nullptr;
  EXPECT_FAILS(DISCONNECTED, "RpcSystem was destroyed", first.ignoreResult());
  link->client = nullptr;
  EXPECT_FAILS(DISCONNECTED, "", root.sequenceRequest().send().ignoreResult());
  kj::runCatchingExceptions([&]() { await(name.ignoreResult()); });
  await(link->server->network.onDisconnect());
}

TEST_P(Lifetimes, OnDisconnectComesWithTheEndAndNotBefore) {
  auto link = connect(state);
  bool disconnected[2] = { false, false };
  auto watch = [&](End& end, bool& flag) {
    return end.network.onDisconnect().then([&flag]() { flag = true; }).eagerlyEvaluate(nullptr);
  };
  auto client = watch(*link->client, disconnected[0]);
  auto server = watch(*link->server, disconnected[1]);
  upgrade(*link);
  { auto root = link->client->root(); await(root.makeRequest().send()); }
  for (uint i = 0; i < 5; i++) turn();
  // Neither an idle connection nor one without any capability is at its end.
  EXPECT_FALSE(disconnected[0] || disconnected[1]);
  link->client->rpc = nullptr;
  turn();
  EXPECT_TRUE(disconnected[0]);
  // Whoever asks later learns it at once.
  EXPECT_TRUE(link->client->network.onDisconnect().poll(io.waitScope));
  link->client = nullptr;
  await(kj::mv(server));
  EXPECT_TRUE(disconnected[1]);
  EXPECT_TRUE(link->server->network.onDisconnect().poll(io.waitScope));
}

TEST_P(Lifetimes, OnDisconnectWaitsForWhatTheApplicationSentBefore) {
  // The server's Abort, and its answers, come first.
  auto link = connect(state);
  upgrade(*link);
  auto root = link->client->root();
  kj::Vector<kj::Promise<void>> calls;
  uint answered = 0;
  for (uint i = 0; i < 100; i++) {
    calls.add(root.sequenceRequest().send().then(
        [&](capnp::Response<Sum>&&) { ++answered; }, [](kj::Exception&&) {})
        .eagerlyEvaluate(nullptr));
  }
  auto last = await(root.sequenceRequest().send()).getValue();
  EXPECT_EQ(100, answered);
  EXPECT_EQ(104, last);
  uint answeredAtTheEnd = 0;
  auto end = link->client->network.onDisconnect().then([&]() { answeredAtTheEnd = answered; })
      .eagerlyEvaluate(nullptr);
  for (uint i = 0; i < 100; i++) {
    calls.add(root.sequenceRequest().send().then(
        [&](capnp::Response<Sum>&&) { ++answered; }, [](kj::Exception&&) {})
        .eagerlyEvaluate(nullptr));
  }
  await(root.sequenceRequest().send());
  link->server = nullptr;
  await(kj::mv(end));
  EXPECT_EQ(200, answeredAtTheEnd);
}

TEST_P(Lifetimes, ThousandConnectionsLeaveNothing) {
  Resources first;
  bool quick = SLOW || mode().client.kind != EndMode::CONTEXT || mode().client.small;
  uint count = quick ? 100 : 1000;
  for (uint i = 0; i < count; i++) {
    auto link = connect(state);
    auto request = link->client->root().fillRequest();
    request.setBytes(i % 3 * 20000);
    ASSERT_EQ(i % 3 * 20000, await(request.send()).getData().size());
    link->client->expectNothing();
    link->server->expectNothing();
    if (i % 2) link->client = nullptr;
    link = nullptr;
    if (i == 10) first = Resources::now();
  }
  auto last = Resources::now();
  EXPECT_EQ(first.fds, last.fds);
  EXPECT_EQ(first.mappings, last.mappings);
}

TEST_P(Lifetimes, ManyConnectionsAtOnce) {
  constexpr uint COUNT = 50;
  for (uint round = 0; round < 2; round++) {
    std::vector<kj::Own<Link>> links;
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = 0; i < COUNT; i++) links.push_back(connect(state));
    for (uint n = 0; n < 5; n++) {
      for (auto& link: links) {
        auto request = link->client->root().addRequest();
        request.setA(n);
        request.setB(1);
        calls.add(request.send().then([n](capnp::Response<Sum>&& response) {
          EXPECT_EQ(n + 1, response.getValue());
        }));
      }
      await(kj::joinPromises(calls.releaseAsArray()));
    }
    // In another order than they came.
    for (uint i = 0; i < COUNT; i += 2) links[i] = nullptr;
    for (uint i = 1; i < COUNT; i += 2) await(links[i]->client->root().sequenceRequest().send());
  }
}

TEST_P(Lifetimes, DestroyedByAContinuation) {
  // In the middle of a turn in which more arrives for it.
  for (uint round = 0; round < 2; round++) {
    auto link = connect(state);
    upgrade(*link);
    auto root = link->client->root();
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = 0; i < 50; i++) {
      auto& end = round == 0 ? link->client : link->server;
      calls.add(root.sequenceRequest().send().then([&end, i](capnp::Response<Sum>&&) {
        if (i == 20) end = nullptr;
      }).eagerlyEvaluate([](kj::Exception&&) {}));
    }
    await(kj::joinPromises(calls.releaseAsArray()));
    root = nullptr;
    turn();
  }
}

#if CAPNP_VERSION >= 1000000
// Cap'n Proto 0.9.2 takes the second hop's Disembargo for a violation.
TEST_P(Lifetimes, TwoHopEmbargo) {
  // Upstream's test: the client's own object comes back through a proxy. Calls made before, while
  // and after the promise resolves must arrive in order.
  for (bool asPromise: { false, true }) {
    Link back(mode(), io, LinkOptions());
    back.start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    auto front = connect(back.client->bootstrap());
    auto root = front->client->root();
    class Promised final: public ItemImpl {
    public:
      using ItemImpl::ItemImpl;
      kj::Maybe<kj::Promise<capnp::Capability::Client>> shortenPath() override {
        return kj::Promise<capnp::Capability::Client>(kj::NEVER_DONE);
      }
    };
    Item::Client item = asPromise ? Item::Client(kj::heap<Promised>(mine, "mine"))
                                  : Item::Client(kj::heap<ItemImpl>(mine, "mine"));
    auto early = root.sequenceRequest().send();
    auto request = root.reflectRequest();
    request.setItem(item);
    auto echo = request.send();
    auto pipeline = echo.getItem();
    kj::Vector<kj::Promise<int64_t>> calls;
    auto call = [&]() {
      calls.add(pipeline.sequenceRequest().send().then(
          [](capnp::Response<Sum>&& r) { return r.getValue(); }));
    };
    call();
    call();
    await(kj::mv(early));
    call();
    auto resolved = await(kj::mv(echo)).getItem();
    for (uint i = 0; i < 3; i++) call();
    auto values = await(kj::joinPromises(calls.releaseAsArray()));
    for (uint i = 0; i < 6; i++) EXPECT_EQ(i, values[i]);
    for (uint i = 0; i < 4; i++) await(root.sequenceRequest().send());
  }
}
#endif

// =======================================================================================
// Event loops

class Loops: public testing::TestWithParam<Mode> {};

INSTANTIATE_TEST_SUITE_P(Modes, Loops, testing::ValuesIn(allModes()), modeName);

TEST_P(Loops, OneAfterTheOtherOnOneThread) {
  auto before = Resources::now();
  for (uint round = 0; round < 3; round++) {
    ServerState state;
    auto io = kj::setupAsyncIo();
    Link first(GetParam(), io, LinkOptions());
    Link second(GetParam(), io, LinkOptions());
    for (auto link: { &first, &second }) {
      link->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
      auto root = link->client->root();
      for (uint i = 0; i < 5; i++) {
        auto request = root.fillRequest();
        request.setBytes(i * 10000);
        EXPECT_EQ(i * 10000, request.send().wait(io.waitScope).getData().size());
      }
    }
  }
  auto after = Resources::now();
  EXPECT_EQ(before.fds, after.fds);
  EXPECT_EQ(before.mappings, after.mappings);
}

TEST_P(Loops, LeftWithCallsUnderWay) {
  for (uint round = 0; round < 3; round++) {
    ServerState state;
    auto io = kj::setupAsyncIo();
    Link link(GetParam(), io, LinkOptions());
    link.start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    auto root = link.client->root();
    if (round > 0) for (uint i = 0; i < 4; i++) root.sequenceRequest().send().wait(io.waitScope);
    link.client->expectNothing();
    link.server->expectNothing();
    auto never = root.neverRequest().send();
    auto fill = root.fillRequest();
    fill.setBytes(300000);
    auto large = fill.send();
    if (round == 2) kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
  }
}

TEST_P(Loops, MessagesOutliveThem) {
  Incoming incoming[2];
  Outgoing sent, unsent;
  {
    auto io = kj::setupAsyncIo();
    RawLink raw(GetParam(), io, LinkOptions());
    auto receive = [&](Connection& connection) -> Incoming {
      for (;;) {
        auto message = KJ_ASSERT_NONNULL(connection.receiveIncomingMessage().wait(io.waitScope));
        auto body = message->getBody().getAs<capnp::rpc::Message>();
        if (!body.isObsoleteSave()) return message;
        auto answer = connection.newOutgoingMessage(0);
        answer->getBody().initAs<capnp::rpc::Message>().setUnimplemented(body);
        answer->send();
      }
    };
    for (uint i = 0; i < 4; i++) {
      sendMessage(*raw.client, i, 8);
      receive(*raw.server);
      sendMessage(*raw.server, i, 8);
      receive(*raw.client);
    }
    sendMessage(*raw.client, 5, 100);
    incoming[0] = receive(*raw.server);
    sendMessage(*raw.client, 6, 20000);
    incoming[1] = receive(*raw.server);
    sent = newMessage(*raw.client, 7, 20000);
    sent->send();
    receive(*raw.server);
    unsent = newMessage(*raw.client, 8, 20000);
  }
  EXPECT_TRUE(isMessage(*incoming[0], 5, 100));
  EXPECT_TRUE(isMessage(*incoming[1], 6, 20000));
  fillMessage(*unsent, 9, 300);
  EXPECT_GT(sent->sizeInWords(), 2500u);
  {
    // And into the next loop.
    auto io = kj::setupAsyncIo();
    RawLink raw(GetParam(), io, LinkOptions());
    raw.link.client->expectNothing();
    raw.link.server->expectNothing();
    sendMessage(*raw.client, 1, 8);
    incoming[0] = nullptr;
    sent = nullptr;
  }
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
