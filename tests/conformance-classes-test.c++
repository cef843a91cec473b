// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-fixture.h"

#include <string.h>
#include <unistd.h>
#include <capnp/rpc-twoparty.h>
#include <deque>

// SharedMemoryServer and SharedMemoryClient, with every constructor and member, against
// TwoPartyServer and TwoPartyClient.

namespace capnpshm {
namespace conformance {
namespace {

using capnp::Capability;
using TraceEncoder = kj::Function<kj::String(const kj::Exception&)>;

SharedMemoryContext contextOf(const EndMode& mode, kj::AsyncIoContext& io) {
  SharedMemoryContext context;
  if (mode.port) context.port = &io.unixEventPort;
  context.options.trustPeer = mode.trust;
  context.options.plainCalls = mode.plainCalls();
  if (mode.small) {
    context.options.firstRegionBytes = 16 * 1024;
    context.options.maxBytes = 64 * 1024;
  }
  return context;
}

class AnyServer {
  // Either class of server, behind one face.

public:
  AnyServer(const EndMode& mode, kj::AsyncIoContext& io, Capability::Client bootstrap,
            kj::Maybe<TraceEncoder> encoder = nullptr) {
    switch (mode.kind) {
      case EndMode::CONTEXT:
        shared = encoder == nullptr
            ? kj::heap<SharedMemoryServer>(contextOf(mode, io), kj::mv(bootstrap))
            : kj::heap<SharedMemoryServer>(
                  contextOf(mode, io), kj::mv(bootstrap), kj::mv(encoder));
        break;
      case EndMode::DROP_IN:
        shared = encoder == nullptr
            ? kj::heap<SharedMemoryServer>(kj::mv(bootstrap))
            : kj::heap<SharedMemoryServer>(kj::mv(bootstrap), kj::mv(encoder));
        break;
      default:
#if CAPNP_VERSION >= 1000000
        twoParty = kj::heap<capnp::TwoPartyServer>(kj::mv(bootstrap), kj::mv(encoder));
#else
        twoParty = kj::heap<capnp::TwoPartyServer>(kj::mv(bootstrap));
#endif
    }
  }

  template <typename Func>
  auto with(Func&& func) {
    return shared.get() != nullptr ? func(*shared) : func(*twoParty);
  }

private:
  kj::Own<capnp::TwoPartyServer> twoParty;
  kj::Own<SharedMemoryServer> shared;
};

class AnyClient {
public:
  template <typename... Params>
  AnyClient(const EndMode& mode, kj::AsyncIoContext& io, Params&&... params) {
    switch (mode.kind) {
      case EndMode::CONTEXT:
        shared = kj::heap<SharedMemoryClient>(contextOf(mode, io), kj::fwd<Params>(params)...);
        break;
      case EndMode::DROP_IN:
        shared = kj::heap<SharedMemoryClient>(kj::fwd<Params>(params)...);
        break;
      default:
        twoParty = kj::heap<capnp::TwoPartyClient>(kj::fwd<Params>(params)...);
    }
  }

  template <typename Func>
  auto with(Func&& func) {
    return shared.get() != nullptr ? func(*shared) : func(*twoParty);
  }

  Root::Client root() {
    return with([](auto& client) { return client.bootstrap().template castAs<Root>(); });
  }
  kj::Promise<void> onDisconnect() {
    return with([](auto& client) { return client.onDisconnect(); });
  }
  void expectTransport(Transport expected) {
    if (shared.get() == nullptr) return;
    auto stats = shared->getStats();
    EXPECT_EQ(int(expected), int(stats.outgoing.transport)) << stats.outgoing.plainReason.cStr();
    EXPECT_EQ(int(expected), int(stats.incoming.transport)) << stats.incoming.plainReason.cStr();
  }

private:
  kj::Own<capnp::TwoPartyClient> twoParty;
  kj::Own<SharedMemoryClient> shared;
};

class QueueReceiver final: public kj::ConnectionReceiver {
  // A listener to which the test brings the streams.

public:
  void bring(kj::Own<kj::AsyncIoStream> stream) {
    streams.push_back(kj::mv(stream));
    next();
  }
  void fail() {
    KJ_ASSERT_NONNULL(waiting)->reject(KJ_EXCEPTION(FAILED, "the listener broke"));
  }

  kj::Promise<kj::Own<kj::AsyncIoStream>> accept() override {
    auto paf = kj::newPromiseAndFulfiller<kj::Own<kj::AsyncIoStream>>();
    waiting = kj::mv(paf.fulfiller);
    next();
    return kj::mv(paf.promise);
  }
  kj::uint getPort() override { return 0; }

private:
  std::deque<kj::Own<kj::AsyncIoStream>> streams;
  kj::Maybe<kj::Own<kj::PromiseFulfiller<kj::Own<kj::AsyncIoStream>>>> waiting;

  void next() {
    KJ_IF_MAYBE(w, waiting) {
      if (streams.empty() || !(*w)->isWaiting()) return;
      (*w)->fulfill(kj::mv(streams.front()));
      streams.pop_front();
      waiting = nullptr;
    }
  }
};

kj::AsyncCapabilityStream& cap(kj::AsyncIoStream& stream) {
  return kj::downcast<kj::AsyncCapabilityStream>(stream);
}

struct Dialed {
  // A client, and its stream.

  Dialed(const Mode& mode, kj::AsyncIoContext& io, bool withFds): streams(mode, io, withFds) {}

  StreamPair streams;
  kj::Own<AnyClient> client;
};

class Classes: public Conformance {
protected:
  std::vector<bool> withoutAndWithFds() {
    // KJ's own pipes fail with room for descriptors; see conformance-fds-test.c++.
    if (mode().stream == StreamKind::IN_PROCESS) return { false };
    return { false, true };
  }

  Capability::Client newRoot() { return kj::heap<RootImpl>(state); }

  kj::Own<AnyServer> newServer(kj::Maybe<TraceEncoder> encoder = nullptr) {
    return kj::heap<AnyServer>(mode().server, io, newRoot(), kj::mv(encoder));
  }

  kj::Own<Dialed> dial(kj::uint maxFds = 0) {
    auto result = kj::heap<Dialed>(mode(), io, maxFds > 0);
    auto& stream = *result->streams.ends[0];
    result->client = maxFds > 0
        ? kj::heap<AnyClient>(mode().client, io, cap(stream), maxFds)
        : kj::heap<AnyClient>(mode().client, io, stream);
    return result;
  }
  kj::Own<Dialed> dial(AnyServer& server) {
    auto result = dial();
    server.with([&](auto& s) { s.accept(kj::mv(result->streams.ends[1])); });
    return result;
  }

  void expectServed(AnyClient& client) {
    auto root = client.root();
    for (kj::uint i = 0; i < SHARING_CALLS; i++) {
      auto request = root.addRequest();
      request.setA(i);
      request.setB(40);
      EXPECT_EQ(i + 40, await(request.send()).getValue());
    }
    client.expectTransport(mode().expected);
  }
};

std::vector<Mode> classModes() {
  // All modes in which one end is a SERVER and the other a CLIENT, each made from a stream.
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    if (mode.client.side == Side::CLIENT && mode.server.side == Side::SERVER &&
        mode.client.kind != EndMode::MESSAGE_STREAM) {
      result.push_back(mode);
    }
  }
  return result;
}

INSTANTIATE_TEST_SUITE_P(Modes, Classes, testing::ValuesIn(classModes()), modeName);

TEST_P(Classes, EveryWayToConnect) {
  for (bool clientFds: withoutAndWithFds()) {
    for (bool serverFds: withoutAndWithFds()) {
      for (bool own: { false, true }) {
        auto server = newServer();
        StreamPair streams(mode(), io, true);
        kj::Promise<void> task = nullptr;
        server->with([&](auto& s) {
          if (own && serverFds) s.accept(streams.ends[1].downcast<kj::AsyncCapabilityStream>(), 2);
          else if (own) s.accept(kj::mv(streams.ends[1]));
          else if (serverFds) task = s.accept(cap(*streams.ends[1]), 2);
          else task = s.accept(*streams.ends[1]);
        });
        auto& stream = *streams.ends[0];
        kj::Own<AnyClient> client = clientFds
            ? kj::heap<AnyClient>(mode().client, io, cap(stream), 2u)
            : kj::heap<AnyClient>(mode().client, io, stream);
        expectServed(*client);
        client = nullptr;
        streams.ends[0] = nullptr;
        if (own) await(server->with([](auto& s) { return s.drain(); }));
        else await(kj::mv(task));
        EXPECT_EQ(1, state.roots);
        server = nullptr;
        EXPECT_EQ(0, state.roots);
      }
    }
  }
}

TEST_P(Classes, ClientsOfBothSides) {
  for (bool fds: withoutAndWithFds()) {
    ServerState states[2];
    StreamPair streams(mode(), io, true);
    auto make = [&](uint i, const EndMode& end, Side side) {
      Capability::Client bootstrap = kj::heap<RootImpl>(states[i]);
      auto& stream = *streams.ends[i];
      return fds ? kj::heap<AnyClient>(end, io, cap(stream), 2u, kj::mv(bootstrap), side)
                 : kj::heap<AnyClient>(end, io, stream, kj::mv(bootstrap), side);
    };
    auto client = make(0, mode().client, Side::CLIENT);
    auto server = make(1, mode().server, Side::SERVER);
    expectServed(*client);
    expectServed(*server);  // A CLIENT answers nothing before it speaks itself.
    EXPECT_EQ(SHARING_CALLS, states[0].calls);
    EXPECT_EQ(SHARING_CALLS, states[1].calls);
  }
}

TEST_P(Classes, ClientWithBootstrapIsOnTheClientSideByDefault) {
  StreamPair streams(mode(), io, true);
  auto server = newServer();
  server->with([&](auto& s) { s.accept(kj::mv(streams.ends[1])); });
  AnyClient client(mode().client, io, *streams.ends[0],
      Capability::Client(kj::heap<RootImpl>(mine)));
  expectServed(client);
}

TEST_P(Classes, ListenServesWhoeverComes) {
  for (bool fds: withoutAndWithFds()) {
    uint maxFds = fds ? 2 : 0;
    auto server = newServer();
    QueueReceiver receiver;
    auto listening = server->with([&](auto& s) {
      return maxFds == 0 ? s.listen(receiver) : s.listenCapStreamReceiver(receiver, maxFds);
    }).eagerlyEvaluate(nullptr);
    std::vector<kj::Own<Dialed>> dialed;
    for (uint i = 0; i < 3; i++) {
      dialed.push_back(dial(maxFds));
      receiver.bring(kj::mv(dialed[i]->streams.ends[1]));
      expectServed(*dialed[i]->client);
    }
    EXPECT_FALSE(listening.poll(io.waitScope));
    // Who was accepted stays, and nobody else is.
    { auto drop = kj::mv(listening); }
    auto late = dial(maxFds);
    receiver.bring(kj::mv(late->streams.ends[1]));
    auto unanswered = late->client->root().sequenceRequest().send();
    for (auto& d: dialed) expectServed(*d->client);
    EXPECT_FALSE(unanswered.poll(io.waitScope));
  }
}

TEST_P(Classes, ListenPassesFileDescriptors) {
  if (withoutAndWithFds().size() == 1) return;
  auto server = newServer();
  QueueReceiver receiver;
  auto listening = server->with([&](auto& s) {
    return s.listenCapStreamReceiver(receiver, 1);
  }).eagerlyEvaluate(nullptr);
  auto dialed = dial(1);
  receiver.bring(kj::mv(dialed->streams.ends[1]));
  auto request = dialed->client->root().filesRequest();
  auto items = request.initItems(2);
  items.set(0, kj::heap<FileItem>(mine, pipeWith("first")));
  items.set(1, kj::heap<FileItem>(mine, pipeWith("second")));
  auto response = await(request.send());
  EXPECT_EQ(mode().passesFds() ? "first" : "none", response.getContents()[0]);
  EXPECT_EQ("none", response.getContents()[1]);
  EXPECT_EQ(mode().passesFds(), await(response.getItem().getFd()) != nullptr);
}

TEST_P(Classes, BrokenListenerEndsListening) {
  auto server = newServer();
  QueueReceiver receiver;
  auto listening = server->with([&](auto& s) { return s.listen(receiver); })
      .eagerlyEvaluate(nullptr);
  auto dialed = dial();
  receiver.bring(kj::mv(dialed->streams.ends[1]));
  expectServed(*dialed->client);
  receiver.fail();
  EXPECT_FAILS(FAILED, "the listener broke", kj::mv(listening));
  expectServed(*dialed->client);
}

TEST_P(Classes, DrainWaitsForAllClients) {
  auto server = newServer();
  auto drain = [&]() { return server->with([](auto& s) { return s.drain(); }); };
  await(drain());
  auto goes = dial(*server);
  auto stays = dial(*server);
  expectServed(*goes->client);
  expectServed(*stays->client);
  auto drained = drain();
  EXPECT_FALSE(drained.poll(io.waitScope));
  goes = nullptr;
  for (uint i = 0; i < 10; i++) expectServed(*stays->client);
  EXPECT_FALSE(drained.poll(io.waitScope));
  stays = nullptr;
  await(kj::mv(drained));
  await(drain());
  // It may serve others afterwards.
  auto next = dial(*server);
  expectServed(*next->client);
  EXPECT_FALSE(drain().poll(io.waitScope));
}

TEST_P(Classes, DrainLeavesOutBorrowedStreams) {
  auto server = newServer();
  auto dialed = dial();
  auto task = server->with([&](auto& s) { return s.accept(*dialed->streams.ends[1]); });
  expectServed(*dialed->client);
  EXPECT_TRUE(server->with([](auto& s) { return s.drain(); }).poll(io.waitScope));
  EXPECT_FALSE(task.poll(io.waitScope));
}

TEST_P(Classes, DroppingABorrowedStreamEndsTheConnection) {
  auto server = newServer();
  auto dialed = dial();
  auto task = server->with([&](auto& s) { return s.accept(*dialed->streams.ends[1]); });
  expectServed(*dialed->client);
  auto disconnected = dialed->client->onDisconnect();
  auto pending = dialed->client->root().neverRequest().send();
  until([&]() { return state.running == 1; });
  EXPECT_FALSE(disconnected.poll(io.waitScope));
  { auto drop = kj::mv(task); }
  dialed->streams.ends[1] = nullptr;
  until([&]() { return state.running == 0; });
  EXPECT_FAILS(DISCONNECTED, "", pending.ignoreResult());
  await(kj::mv(disconnected));
}

TEST_P(Classes, ServerGoneDisconnectsAllClients) {
  auto server = newServer();
  auto first = dial(*server);
  auto second = dial(*server);
  expectServed(*first->client);
  expectServed(*second->client);
  server = nullptr;
  await(first->client->onDisconnect());
  await(second->client->onDisconnect());
  EXPECT_EQ(0, state.roots);
}

TEST_P(Classes, TraceEncoders) {
  auto fail = [this](AnyClient& client) {
    auto request = client.root().failRequest();
    request.setText("on purpose");
    std::string trace;
    await(request.send().ignoreResult().then([]() {}, [&](kj::Exception&& exception) {
      trace = exception.getRemoteTrace().cStr();
    }));
    return trace;
  };
  auto encoder = [](kj::StringPtr name) -> TraceEncoder {
    return [name](const kj::Exception& exception) {
      return kj::str(name, strstr(exception.getDescription().cStr(), "on purpose") != nullptr);
    };
  };
  auto server = newServer(encoder("server "));
  auto dialed = dial(*server);
  // 0.9.2 cannot set one for a TwoPartyServer.
  bool has = CAPNP_VERSION >= 1000000 || mode().server.kind != EndMode::TWO_PARTY;
  EXPECT_EQ(has ? "server true" : "", fail(*dialed->client));

  ServerState exported;
  StreamPair streams(mode(), io, false);
  AnyClient client(mode().client, io, *streams.ends[0],
      Capability::Client(kj::heap<RootImpl>(exported)));
  AnyClient peer(mode().server, io, *streams.ends[1], newRoot(), Side::SERVER);
  client.with([&](auto& c) { c.setTraceEncoder(encoder("client ")); });
  expectServed(client);
  EXPECT_EQ("client true", fail(peer));
}

TEST_P(Classes, QueueOfTheClient) {
  auto server = newServer();
  auto dialed = dial(*server);
  auto& client = *dialed->client;
  auto count = [&]() { return client.with([](auto& c) { return c.getCurrentQueueCount(); }); };
  auto size = [&]() { return client.with([](auto& c) { return c.getCurrentQueueSize(); }); };
  auto age = [&]() { return client.with([](auto& c) { return c.getOutgoingMessageWaitTime(); }); };
  EXPECT_EQ(0, count());
  EXPECT_EQ(0, size());
  EXPECT_TRUE(age() == 0 * kj::SECONDS);
  expectServed(client);
  turn();
  EXPECT_EQ(0, count());
  auto root = client.root();
  EXPECT_EQ(1, count());
  size_t bootstrapSize = size();
  EXPECT_GT(bootstrapSize, 0);
  auto promise = root.sequenceRequest().send();
  EXPECT_EQ(2, count());
  EXPECT_GT(size(), bootstrapSize);
  turn();
  EXPECT_EQ(0, count());
  EXPECT_EQ(0, size());
  EXPECT_TRUE(age() == 0 * kj::SECONDS);
  await(kj::mv(promise));
}

TEST_P(Classes, DestroyedByTheirCallers) {
  // A client by the continuation of its own call and of its onDisconnect(), a server by that of
  // another's call.
  auto server = newServer();
  auto first = dial(*server);
  auto second = dial(*server);
  expectServed(*first->client);
  expectServed(*second->client);
  await(first->client->root().sequenceRequest().send().then(
      [&](capnp::Response<Sum>&&) { first = nullptr; }));
  expectServed(*second->client);
  auto gone = second->client->onDisconnect().then([&]() { second->client = nullptr; })
      .eagerlyEvaluate(nullptr);
  await(second->client->root().sequenceRequest().send().then(
      [&](capnp::Response<Sum>&&) { server = nullptr; }));
  await(kj::mv(gone));
  turn();
  EXPECT_EQ(0, state.roots);
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
