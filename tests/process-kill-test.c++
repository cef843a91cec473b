// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "process-fixture.h"

#include <capnp/rpc-twoparty.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

// How a connection ends when the peer's process does.

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::Root;
using conformance::RootImpl;
using kj::uint;

class ProcessEnd: public ProcessTest {
protected:
  kj::Promise<void> receiveInto(Connection& connection, uint64_t& next) {
    // Until the end; messages must be in order and without gaps.
    return connection.receiveIncomingMessage().then(
        [this, &connection, &next](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message)
            -> kj::Promise<void> {
      KJ_IF_MAYBE(m, message) {
        KJ_REQUIRE(readNumbered(**m) == next, "out of order", next);
        ++next;
        return receiveInto(connection, next);
      }
      return kj::READY_NOW;
    });
  }

  void expectEnd(kj::Promise<void>&& received) {
    // A peer that dies ends the stream, in the middle of a message or not.
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { await(kj::mv(received)); })) {
      EXPECT_EQ(uint(kj::Exception::Type::DISCONNECTED), uint(exception->getType()))
          << kj::str(*exception).cStr();
    }
  }
};

TEST_P(ProcessEnd, WhatAKilledPeerHadSentArrives) {
  auto before = resourcesOf();
  for (bool exits: { false, true }) {
    auto peer = start(mode().arguments("send", { "count=15",
        exits ? "then=exit" : "then=wait" }));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER);
    auto connection = rawConnection(*end);
    uint64_t next = 0;
    auto received = receiveInto(*connection, next).eagerlyEvaluate(nullptr);
    until([&]() { return next > 0; });
    if (exits) {
      EXPECT_EQ(0, peer.process->wait());
    } else {
      // Nothing is received from here on, until the peer is gone.
      peer.process->line();
      peer.process->signal(SIGKILL);
      EXPECT_EQ(-SIGKILL, peer.process->wait());
    }
    expectEnd(kj::mv(received));
    EXPECT_EQ(16, next);
    end->expectTransport(mode().expected());

    // Also if we then talk to it.
    sendNumbered(*connection, 0, 100);
    expectEnd(receiveInto(*connection, next));
    connection = nullptr;
    await(end->network.onDisconnect());
    EXPECT_EQ(16, next);
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(ProcessEnd, KilledAtAnyMoment) {
  auto before = resourcesOf();
  srand48(4711);
  size_t largestGap = 0;
  for (uint round = 0; round < (SLOW ? 6 : 30); round++) {
    auto peer = start(mode().arguments("send", { "count=0", round % 2 ? "small=1" : "small=0" }));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER);
    auto connection = rawConnection(*end);
    uint64_t next = 0;
    auto received = receiveInto(*connection, next).eagerlyEvaluate(nullptr);
    // Also in the middle of the setting up, and before.
    uint64_t when = round < 4 ? round : lrand48() % 3000;
    until([&]() { return next >= when; });
    peer.process->signal(SIGKILL);
    EXPECT_EQ(-SIGKILL, peer.process->wait());
    expectEnd(kj::mv(received));
    // (TwoPartyVatNetwork of 1.x no longer counts a message as queued when its write begins.)
    if (mode().isShared()) {
      EXPECT_GE(next, peer.process->getProgress(FLUSHED));
    }
    largestGap = kj::max(largestGap, next - when);
    connection = nullptr;
    await(end->network.onDisconnect());
  }
  EXPECT_GT(largestGap, 0) << "no message was under way in any round";
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(ProcessEnd, ServerGoesOnWhenAClientIsKilled) {
  // The same for TwoPartyServer and SharedMemoryServer, over whose connections RPC runs.
  SharedMemoryContext context;
  if (mode().port) context.port = &io.unixEventPort;
  context.options.trustPeer = mode().trust;
  kj::Own<capnp::TwoPartyServer> twoParty;
  kj::Own<SharedMemoryServer> shared;
  if (mode().isShared()) {
    shared = kj::heap<SharedMemoryServer>(context, kj::heap<RootImpl>(state));
  } else {
    twoParty = kj::heap<capnp::TwoPartyServer>(kj::heap<RootImpl>(state));
  }
  auto serve = [&](kj::AsyncIoStream& stream) {
    return shared.get() != nullptr ? shared->accept(stream) : twoParty->accept(stream);
  };

  auto pipe = io.provider->newCapabilityPipe();
  auto serving = serve(*pipe.ends[0]).eagerlyEvaluate(nullptr);
  auto honest = newEnd(kj::mv(pipe.ends[1]), Side::CLIENT);
  honest->start(nullptr);
  auto root = honest->root();
  uint sequence = 0;
  auto check = [&]() {
    EXPECT_EQ(sequence++, await(root.sequenceRequest().send().then(
        [](auto&& response) { return response.getValue(); })));
  };
  // Until all that belongs to the setting up is there or closed.
  settle(check, honest->network);

  auto before = resourcesOf();
  srand48(42);
  for (uint round = 0; round < (SLOW ? 4 : 12); round++) {
    auto peer = start(mode().arguments("load"));
    auto ended = serve(*peer.stream);
    uint calls = state.calls;
    uint more = lrand48() % 2000;
    until([&]() { return peer.process->hasReported() && state.calls >= calls + more; });
    EXPECT_EQ(1, state.slow.size());
    peer.process->signal(SIGKILL);
    EXPECT_EQ(-SIGKILL, peer.process->wait());
    check();
    await(kj::mv(ended));
    // The call of slow(), which nobody waits for any more.
    state.slow.front()->fulfill();
    state.slow.clear();
    turn();
    check();
  }
  EXPECT_EQ(before, resourcesOf());
  EXPECT_EQ(0, state.running);
}

TEST_P(ProcessEnd, CallsToAKilledServerFailAsDisconnected) {
  auto before = resourcesOf();
  srand48(1);
  for (uint round = 0; round < (SLOW ? 4 : 12); round++) {
    auto peer = start(mode().arguments("serve"));
    auto end = newEnd(kj::mv(peer.stream), Side::CLIENT);
    end->start(nullptr);
    auto root = end->root();
    // Some wait for ever, some return until the server is killed.
    kj::Vector<kj::Promise<void>> pending;
    for (uint i = 0; i < 20; i++) pending.add(root.slowRequest().send().ignoreResult());
    auto make = root.makeRequest();
    make.setName("x");
    auto item = make.send().getItem();
    uint done = 0, disconnected = 0, sent = 0;
    uint when = round == 0 ? 0 : lrand48() % 1500;
    auto add = [&]() {
      auto request = root.echoRequest();
      auto data = conformance::pattern(numberedBytes(sent++), 3);
      request.setData(data);
      return request.send().then([&, size = data.size()](auto&& response) {
        KJ_REQUIRE(conformance::isPattern(response.getData(), 3));
        KJ_REQUIRE(response.getData().size() == size);
        ++done;
      }, [&](kj::Exception&& exception) {
        KJ_REQUIRE(exception.getType() == kj::Exception::Type::DISCONNECTED, exception);
        ++disconnected;
      });
    };
    kj::Vector<kj::Promise<void>> calls;
    while (done < when) {
      calls.add(add().eagerlyEvaluate(nullptr));
      if (sent - done > 20) until([&]() { return sent - done <= 20; });
    }
    for (uint i = 0; i < 30; i++) calls.add(add().eagerlyEvaluate(nullptr));
    if (round % 2) turn();
    peer.process->signal(SIGKILL);
    EXPECT_EQ(-SIGKILL, peer.process->wait());
    await(kj::joinPromises(calls.releaseAsArray()));
    EXPECT_EQ(sent, done + disconnected);
    for (auto& promise: pending) EXPECT_FAILS(DISCONNECTED, "", kj::mv(promise));
    EXPECT_FAILS(DISCONNECTED, "", item.nameRequest().send().ignoreResult());
    EXPECT_FAILS(DISCONNECTED, "", root.addRequest().send().ignoreResult());
    await(end->network.onDisconnect());
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(ProcessEnd, DrainResolvesWhenAStoppedClientIsKilled) {
  // The server's answers are queued for a client that takes no more of them; then it must shut
  // down, which has to wait for the client as long as that lives.
  auto pair = newSocketPair();
  int socket = pair.peers;
  PeerProcess process(kj::arrayPtr(&socket, 1), mode().arguments("ask", { "count=64" }));
  auto before = resourcesOf();
  kj::Own<capnp::TwoPartyServer> twoParty;
  kj::Own<SharedMemoryServer> shared;
  auto stream = wrapSocket(io, kj::mv(pair.mine));
  auto accept = [&](auto& server) {
    server.accept(kj::mv(stream), 1);
    return server.drain().eagerlyEvaluate(nullptr);
  };
  kj::Promise<void> drained = nullptr;
  if (mode().isShared()) {
    SharedMemoryContext context;
    if (mode().port) context.port = &io.unixEventPort;
    context.options.trustPeer = mode().trust;
    context.options.firstRegionBytes = 16 * 1024;
    context.options.maxBytes = 64 * 1024;
    shared = kj::heap<SharedMemoryServer>(context, kj::heap<RootImpl>(state));
    drained = accept(*shared);
  } else {
    // It keeps the loop from the timers below as long as there is something to read, which there
    // always is if each answer takes long enough.
    io.waitScope.setBusyPollInterval(100);
    twoParty = kj::heap<capnp::TwoPartyServer>(kj::heap<RootImpl>(state));
    drained = accept(*twoParty);
  }

  until([&]() { return state.calls >= 1 + 64; });
  // As it was asking for 64 answers all the time, most of them are still to be sent.
  process.signal(SIGSTOP);
  process.awaitStop();
  // What our server reads ends; who holds the peer's socket else is the peer alone.
  KJ_SYSCALL(::shutdown(socket, SHUT_WR));
  pair.peers = nullptr;
  for (uint i = 0; i < 20; i++) {
    io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
    ASSERT_FALSE(drained.poll(io.waitScope)) << "it did not wait for the client";
  }

  process.signal(SIGKILL);
  EXPECT_EQ(-SIGKILL, process.wait());
  await(kj::mv(drained));
  shared = nullptr;
  twoParty = nullptr;
  before.fds -= 2;  // Both ends of the socket.
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(ProcessEnd, HalfCloseEndsOneDirectionOnly) {
  auto before = resourcesOf();
  {
    auto peer = start(mode().arguments("send", { "count=1000", "then=close" }));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER);
    auto connection = rawConnection(*end);
    uint64_t next = 0;
    await(receiveInto(*connection, next));
    EXPECT_EQ(1001, next);
    // Now all the other way.
    for (uint i = 0; i < 1000; i++) sendNumbered(*connection, i, numberedBytes(i));
    await(connection->shutdown());
    connection = nullptr;
    EXPECT_EQ("1000", peer.process->line());
    EXPECT_EQ(0, peer.process->wait());
    end->expectTransport(mode().expected());
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(ProcessEnd, WhatWasSentLastBeforeAnExitArrives) {
  // With regions to be announced, and more than a ring full, on the way; main() simply returns.
  for (const char* then: { "then=exit", "then=return" }) {
    auto peer = start(mode().arguments("send", { "count=1000", then }));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER);
    auto connection = rawConnection(*end);
    uint64_t next = 0;
    // A reset if something of ours lies unread in its socket: an answer about a region, a bell.
    expectEnd(receiveInto(*connection, next));
    EXPECT_EQ(1001, next);
    EXPECT_EQ(0, peer.process->wait());
    end->expectTransport(mode().expected());
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, ProcessEnd, testing::ValuesIn(processModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
