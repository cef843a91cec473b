// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-fixture.h"

#include <capnp/rpc.capnp.h>
#include <string.h>

// Calls, returns, exceptions, pipelining, capabilities, order, cancellation, the end.

namespace capnpshm {
namespace conformance {
namespace {

using kj::Exception;

class Calls: public Conformance {
protected:
  kj::Promise<int64_t> add(Root::Client root, int64_t a, int64_t b) {
    auto request = root.addRequest();
    request.setA(a);
    request.setB(b);
    return request.send().then([](capnp::Response<Sum>&& r) { return r.getValue(); });
  }

  int64_t next(Root::Client root) {
    return await(root.sequenceRequest().send()).getValue();
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, Calls, testing::ValuesIn(allModes()), modeName);

TEST_P(Calls, ReturnsResults) {
  auto link = connect(state);
  auto root = link->client->root();
  EXPECT_EQ(5, await(add(root, 2, 3)));
  EXPECT_EQ(-1, await(add(root, -4, 3)));
  EXPECT_EQ(2, state.calls);
}

TEST_P(Calls, UpgradeTakesOneRoundTrip) {
  auto link = connect(state);
  auto root = link->client->root();
  for (uint i = 0; i < mode().client.plainCalls(); i++) EXPECT_EQ(3, await(add(root, 1, 2)));
  KJ_IF_MAYBE(stats, link->client->network.getStats()) {
    // A proxy is found out by the descriptor that comes with the switch.
    if (mode().stream != StreamKind::PROXY) {
      EXPECT_EQ(int(mode().expected), int(stats->outgoing.transport));
    }
  }
  // The next call, in the same turn of the loop, carries the client's switch to the server, whose
  // answer comes after its own.
  auto next = add(root, 3, 4);
  KJ_IF_MAYBE(stats, link->client->network.getStats()) {
    if (mode().expected == Transport::SHARED_MEMORY) {
      EXPECT_GE(stats->outgoing.inlineMessages, 1);
    }
  }
  EXPECT_EQ(7, await(kj::mv(next)));
  link->check();
}

TEST_P(Calls, ManyAtOnceReturnEachItsOwnResult) {
  auto link = connect(state);
  auto root = link->client->root();
  auto promises = kj::heapArrayBuilder<kj::Promise<int64_t>>(1000);
  for (int i = 0; i < 1000; i++) promises.add(add(root, i, 1000 * i));
  auto values = await(kj::joinPromises(promises.finish()));
  for (int i = 0; i < 1000; i++) EXPECT_EQ(1001 * i, values[i]);
}

TEST_P(Calls, OneAfterTheOther) {
  // Through many laps of the ring.
  auto link = connect(state);
  auto root = link->client->root();
  for (int i = 0; i < (SLOW ? 200 : 2000); i++) ASSERT_EQ(i + 7, await(add(root, i, 7)));
}

TEST_P(Calls, BothWays) {
  // The server calls the client's bootstrap interface, and both call at once.
  auto link = connect(capnp::Capability::Client(kj::heap<RootImpl>(state)), LinkOptions(),
      capnp::Capability::Client(kj::heap<RootImpl>(mine)));
  auto toServer = link->client->root();
  auto toClient = link->server->root();
  auto promises = kj::heapArrayBuilder<kj::Promise<int64_t>>(200);
  for (int i = 0; i < 100; i++) {
    promises.add(add(toServer, i, 1));
    promises.add(add(toClient, i, 2));
  }
  auto values = await(kj::joinPromises(promises.finish()));
  for (int i = 0; i < 100; i++) {
    EXPECT_EQ(i + 1, values[2 * i]);
    EXPECT_EQ(i + 2, values[2 * i + 1]);
  }
  EXPECT_EQ(100, state.calls);
  EXPECT_EQ(100, mine.calls);
}

TEST_P(Calls, ExceptionsKeepTypeAndText) {
  auto link = connect(state);
  auto root = link->client->root();
  auto fail = [&](Exception::Type type, kj::StringPtr text) {
    auto request = root.failRequest();
    request.setKind(uint16_t(type));
    request.setText(text);
    return request.send().ignoreResult();
  };
  EXPECT_FAILS(FAILED, "one", fail(Exception::Type::FAILED, "one"));
  EXPECT_FAILS(OVERLOADED, "two", fail(Exception::Type::OVERLOADED, "two"));
  EXPECT_FAILS(DISCONNECTED, "three", fail(Exception::Type::DISCONNECTED, "three"));
  EXPECT_FAILS(UNIMPLEMENTED, "four", fail(Exception::Type::UNIMPLEMENTED, "four"));
  EXPECT_EQ(3, await(add(root, 1, 2)));
}

TEST_P(Calls, UnknownInterfaceIsUnimplemented) {
  auto link = connect(state);
  auto wrong = link->client->bootstrap().castAs<Item>();
  EXPECT_FAILS(UNIMPLEMENTED, "", wrong.nameRequest().send().ignoreResult());
}

TEST_P(Calls, NoBootstrapInterface) {
  auto link = connect(kj::Maybe<capnp::Capability::Client>(nullptr));
  EXPECT_FAILS(FAILED, "", add(link->client->root(), 1, 2));
}

TEST_P(Calls, PipelineOnPromisedCapability) {
  auto link = connect(state);
  auto request = link->client->root().makeRequest();
  request.setName("pipelined");
  auto promise = request.send();
  auto name = promise.getItem().nameRequest().send();
  auto sequence = promise.getItem().sequenceRequest().send();
  promise = nullptr;
  EXPECT_EQ("pipelined", await(kj::mv(name)).getName());
  EXPECT_EQ(0, await(kj::mv(sequence)).getValue());
}

TEST_P(Calls, PipelineOnFailedCall) {
  auto link = connect(state);
  auto unknown = link->client->root().reflectRequest().send();  // A null capability.
  EXPECT_FAILS(FAILED, "returned no capabilities",
      unknown.getItem().nameRequest().send().ignoreResult());
}

TEST_P(Calls, ServerCallsBack) {
  auto link = connect(state);
  auto request = link->client->root().visitRequest();
  request.setItem(kj::heap<ItemImpl>(mine, "mine"));
  request.setCount(10);
  EXPECT_EQ(45, await(request.send()).getValue());
  turn();
  EXPECT_EQ(0, mine.items);
}

TEST_P(Calls, CapabilityComesBackAsItself) {
  // What was exported and comes back is the object itself, not a detour through the peer.
  auto link = connect(state);
  capnp::CapabilityServerSet<Item> set;
  auto own = kj::heap<ItemImpl>(mine, "mine");
  auto& object = *own;
  auto request = link->client->root().reflectRequest();
  request.setItem(set.add(kj::mv(own)));
  auto back = await(request.send()).getItem();
  await(back.whenResolved());
  auto found = await(set.getLocalServer(back));
  KJ_IF_MAYBE(f, found) {
    EXPECT_EQ(static_cast<Item::Server*>(&object), f);
  } else {
    ADD_FAILURE() << "not the object itself";
  }
}

TEST_P(Calls, ReleaseDestroysServerObject) {
  auto link = connect(state);
  auto root = link->client->root();
  auto first = await(root.makeRequest().send()).getItem();
  auto second = await(root.makeRequest().send()).getItem();
  EXPECT_EQ(2, state.items);
  // Nothing else is sent behind the Release.
  { auto drop = kj::mv(first); }
  until([&]() { return state.items == 1; });
  { auto drop = kj::mv(second); }
  until([&]() { return state.items == 0; });
}

TEST_P(Calls, PipelineKeepsServerObject) {
  auto link = connect(state);
  auto pipeline = link->client->root().makeRequest().send();
  auto item = pipeline.getItem();
  await(item.nameRequest().send());
  turn();
  EXPECT_EQ(1, state.items);
  { auto drop = kj::mv(item); }
  turn();
  EXPECT_EQ(1, state.items);
  { auto drop = kj::mv(pipeline); }
  until([&]() { return state.items == 0; });
}

TEST_P(Calls, EmbargoKeepsOrder) {
  // Calls on a promise go through the peer; once it is resolved to an object of ours they go
  // straight to it. They must still arrive in order.
  auto link = connect(state);
  auto root = link->client->root();
  for (uint round = 0; round < 20; round++) {
    Item::Client item = kj::heap<ItemImpl>(mine, "mine");
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
    for (uint i = 0; i < 3; i++) call();
    await(kj::mv(early));
    for (uint i = 0; i < 3; i++) call();
    auto resolved = await(kj::mv(echo)).getItem();
    for (uint i = 0; i < 3; i++) call();
    auto values = await(kj::joinPromises(calls.releaseAsArray()));
    for (uint i = 0; i < 9; i++) EXPECT_EQ(i, values[i]);
  }
}

TEST_P(Calls, PromiseResolvedLater) {
  // The server returns a promise, and sends Resolve when it knows.
  auto link = connect(state);
  auto promised = link->client->root().promisedRequest().send();
  auto item = promised.getItem();
  auto name = item.nameRequest().send();
  auto response = await(kj::mv(promised));
  EXPECT_FALSE(name.poll(io.waitScope));
  ASSERT_EQ(1, state.promised.size());
  state.promised.front()->fulfill(kj::heap<ItemImpl>(state, "late"));
  EXPECT_EQ("late", await(kj::mv(name)).getName());
  await(item.whenResolved());
}

TEST_P(Calls, PromiseResolvedToOurOwnObject) {
  // The server's promise resolves to an object of the caller: calls made before and after arrive
  // in order.
  auto link = connect(state);
  auto root = link->client->root();
  auto keep = root.keepRequest();
  keep.setItem(kj::heap<ItemImpl>(mine, "mine"));
  await(keep.send().ignoreResult());
  auto item = root.promisedRequest().send().getItem();
  auto first = item.sequenceRequest().send();
  auto second = item.sequenceRequest().send();
  turn();
  ASSERT_EQ(1, state.promised.size());
  // The request is begun before the promise resolves and sent after.
  auto request = item.sequenceRequest();
  capnp::Response<Root::KeptResults> kept = await(root.keptRequest().send());
  state.promised.front()->reject(KJ_EXCEPTION(FAILED, "rejected on purpose"));
  EXPECT_FAILS(FAILED, "on purpose", first.ignoreResult());
  EXPECT_FAILS(FAILED, "on purpose", second.ignoreResult());
  EXPECT_FAILS(FAILED, "on purpose", request.send().ignoreResult());
  EXPECT_EQ("mine", await(kept.getItem().nameRequest().send()).getName());
}

TEST_P(Calls, RequestBegunBeforeResolutionKeepsOrderOfSend) {
  auto paf = kj::newPromiseAndFulfiller<capnp::Capability::Client>();
  auto link = connect(capnp::Capability::Client(kj::mv(paf.promise)), LinkOptions(),
      capnp::Capability::Client(kj::heap<RootImpl>(mine)));
  auto root = link->client->root();
  auto begun = root.sequenceRequest();
  paf.fulfiller->fulfill(link->server->bootstrap());
  await(root.whenResolved());
  auto first = begun.send();
  auto second = root.sequenceRequest().send();
  EXPECT_EQ(0, await(kj::mv(first)).getValue());
  EXPECT_EQ(1, await(kj::mv(second)).getValue());
}

TEST_P(Calls, TailCallToCaller) {
  // The server answers by a call of the client itself: "take from other question".
  auto link = connect(state);
  auto request = link->client->root().forwardRequest();
  request.setTo(kj::heap<RootImpl>(mine));
  request.setA(20);
  request.setB(22);
  EXPECT_EQ(42, await(request.send()).getValue());
  EXPECT_EQ(1, mine.calls);
}

TEST_P(Calls, TailCallToServerObject) {
  auto link = connect(state);
  auto root = link->client->root();
  auto request = root.forwardRequest();
  request.setTo(root);
  request.setA(1);
  request.setB(2);
  EXPECT_EQ(3, await(request.send()).getValue());
  EXPECT_EQ(2, state.calls);
}

TEST_P(Calls, CancellationReachesServer) {
  auto link = connect(state);
  auto request = link->client->root().neverRequest();
  request.setItem(kj::heap<ItemImpl>(mine, "mine"));
  request.setData(pattern(50000, 3));
  auto promise = request.send();
  until([&]() { return state.running == 1; });
  { auto drop = kj::mv(promise); }
  until([&]() { return state.running == 0; });
  until([&]() { return mine.items == 0; });
  EXPECT_EQ(3, await(add(link->client->root(), 1, 2)));
}

TEST_P(Calls, UncancelableCallRunsToItsEnd) {
  auto link = connect(state);
  auto promise = link->client->root().slowRequest().send();
  until([&]() { return state.running == 1; });
  { auto drop = kj::mv(promise); }
  turn();
  EXPECT_EQ(1, state.running);
  state.slow.front()->fulfill();
  until([&]() { return state.running == 0; });
}

TEST_P(Calls, DropCapabilityDuringCall) {
  auto link = connect(state);
  kj::Promise<int64_t> promise = nullptr;
  {
    auto sink = link->client->root().openRequest().send().getSink();
    promise = sink.slowRequest().send().then(
        [](capnp::Response<Sum>&& r) { return r.getValue(); });
  }
  until([&]() { return state.slow.size() == 1; });
  EXPECT_EQ(1, state.sinks);
  { auto drop = kj::mv(promise); }
  turn();
  EXPECT_EQ(1, state.sinks);
  state.slow.front()->fulfill();
  until([&]() { return state.sinks == 0; });
}

TEST_P(Calls, BootstrapFactoryKnowsCaller) {
  class Factory: public capnp::BootstrapFactory<VatId> {
  public:
    explicit Factory(ServerState& state): state(state) {}
    capnp::Capability::Client createFor(VatId::Reader caller) override {
      state.callerSide = uint(caller.getSide());
      return kj::heap<RootImpl>(state);
    }
    ServerState& state;
  } factory(state);

  Link link(mode(), io, LinkOptions());
  link.server->start(factory);
  link.client->start(nullptr);
  link.startServer();
  // A network knows only that the peer is on the other side.
  uint expected = mode().server.side == Side::SERVER ? uint(Side::CLIENT) : uint(Side::SERVER);
  EXPECT_EQ(expected, await(link.client->root().callerRequest().send()).getSide());
}

// =======================================================================================
// The end

TEST_P(Calls, ProtocolViolationIsAnsweredByAbort) {
  // The client speaks the protocol itself.
  Link link(mode(), io, LinkOptions());
  link.server->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
  link.startServer();
  auto connection = link.client->connect();
  {
    auto message = connection->newOutgoingMessage(128);
    auto body = message->getBody().initAs<capnp::rpc::Message>().initReturn();
    body.setAnswerId(1234);
    body.setCanceled();
    message->send();
  }
  link.client->expectNothing();  // The server is gone before anything is agreed.
  link.server->expectNothing();
  uint aborts = 0;
  for (;;) {
    auto received = await(connection->receiveIncomingMessage());
    KJ_IF_MAYBE(message, received) {
      auto which = (*message)->getBody().getAs<capnp::rpc::Message>().which();
      if (which == capnp::rpc::Message::ABORT) ++aborts;
      else EXPECT_TRUE(mode().server.side == Side::CLIENT) << uint(which);  // Its Bootstrap.
    } else {
      break;
    }
  }
  EXPECT_EQ(1, aborts);
}

TEST_P(Calls, ViolationAfterUpgradeIsAnsweredByAbort) {
  Link link(mode(), io, LinkOptions());
  link.server->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
  link.startServer();
  auto connection = link.client->connect();
  auto send = [&](kj::Function<void(capnp::rpc::Message::Builder)> fill) {
    auto message = connection->newOutgoingMessage(128);
    fill(message->getBody().initAs<capnp::rpc::Message>());
    message->send();
  };
  auto receive = [&]() -> kj::Maybe<capnp::rpc::Message::Which> {
    auto received = await(connection->receiveIncomingMessage());
    KJ_IF_MAYBE(message, received) {
      return (*message)->getBody().getAs<capnp::rpc::Message>().which();
    }
    return nullptr;
  };
  for (uint i = 0; i < 5; i++) {
    send([&](capnp::rpc::Message::Builder m) { m.initBootstrap().setQuestionId(i); });
    for (;;) {
      auto which = KJ_ASSERT_NONNULL(receive());
      if (which == capnp::rpc::Message::RETURN) break;
    }
    send([&](capnp::rpc::Message::Builder m) {
      m.initFinish().setQuestionId(i);
      m.getFinish().setReleaseResultCaps(true);
    });
  }
  link.check();
  send([&](capnp::rpc::Message::Builder m) {
    m.initReturn().setAnswerId(1234);
    m.getReturn().setCanceled();
  });
  EXPECT_EQ(capnp::rpc::Message::ABORT, KJ_ASSERT_NONNULL(receive()));
  EXPECT_TRUE(receive() == nullptr);
}

TEST_P(Calls, DisconnectRejectsPendingCalls) {
  auto link = connect(state);
  auto root = link->client->root();
  for (uint i = 0; i < SHARING_CALLS; i++) EXPECT_EQ(3, await(add(root, 1, 2)));
  auto pending = root.slowRequest().send();
  until([&]() { return state.running == 1; });
  link->check();
  link->client->stream->shutdownWrite();  // Under the network's feet.
  EXPECT_FAILS(DISCONNECTED, "", pending.ignoreResult());
  EXPECT_FAILS(DISCONNECTED, "", add(root, 1, 2));
  EXPECT_FAILS(DISCONNECTED, "", root.makeRequest().send().getItem().nameRequest().send()
      .ignoreResult());
  await(link->client->network.onDisconnect());
}

TEST_P(Calls, ServerGoneRejectsPendingCalls) {
  auto link = connect(state);
  auto root = link->client->root();
  for (uint i = 0; i < SHARING_CALLS; i++) EXPECT_EQ(3, await(add(root, 1, 2)));
  auto pending = root.neverRequest().send();
  until([&]() { return state.running == 1; });
  link->destroyServer();
  EXPECT_FAILS(DISCONNECTED, "", pending.ignoreResult());
  EXPECT_FAILS(DISCONNECTED, "", add(root, 1, 2));
  await(link->client->network.onDisconnect());
  EXPECT_EQ(0, state.running);
  EXPECT_EQ(0, state.roots);
}

TEST_P(Calls, ClientGoneReleasesServerObjects) {
  auto link = connect(state);
  auto item = await(link->client->root().makeRequest().send()).getItem();
  EXPECT_EQ(1, state.items);
  link->destroyClient();
  await(link->server->network.onDisconnect());
  turn();
  EXPECT_EQ(0, state.items);
}

TEST_P(Calls, MessagesSentBeforeTheEndArrive) {
  // The client sends much and is gone in the same turn of the loop, after shutdown().
  Link link(mode(), io, LinkOptions());
  link.server->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
  link.startServer();
  auto connection = link.client->connect();
  auto bootstrap = [&](uint id) {
    auto message = connection->newOutgoingMessage(0);
    message->getBody().initAs<capnp::rpc::Message>().initBootstrap().setQuestionId(id);
    message->send();
  };
  auto receiveReturn = [&]() -> kj::Maybe<uint> {
    for (;;) {
      auto received = await(connection->receiveIncomingMessage());
      KJ_IF_MAYBE(message, received) {
        auto body = (*message)->getBody().getAs<capnp::rpc::Message>();
        if (body.isReturn()) return body.getReturn().getAnswerId();
      } else {
        return nullptr;
      }
    }
  };
  bootstrap(0);
  EXPECT_EQ(0, KJ_ASSERT_NONNULL(receiveReturn()));
  for (uint i = 1; i <= 500; i++) bootstrap(i);
  auto done = connection->shutdown();
  for (uint i = 1; i <= 500; i++) EXPECT_EQ(i, KJ_ASSERT_NONNULL(receiveReturn()));
  EXPECT_TRUE(receiveReturn() == nullptr);
  await(kj::mv(done));
  link.check();
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
