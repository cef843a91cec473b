// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fault-workload.h"
#include "process-fixture.h"

#include <signal.h>

// A peer that stands still for seconds, and clocks that jump: as if nothing had been.

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::Root;
using conformance::RootImpl;
using kj::uint;

class Stall: public ProcessTest {
protected:
  static constexpr uint MAX_FDS = 4;
  conformance::ServerState mine;

  void run(bool clientSide, kj::Function<void(PeerProcess&, End&, Root::Client)> during) {
    auto before = resourcesOf();
    {
      auto pair = newSocketPair();
      int socket = pair.peers;
      PeerProcess process(kj::arrayPtr(&socket, 1), mode().arguments("serve",
          { clientSide ? "side=client" : "side=server" }), FAULT_PEER);
      pair.peers = nullptr;
      EXPECT_EQ("at the gate", process.line());
      process.proceed();
      auto end = newEnd(wrapSocket(io, kj::mv(pair.mine)),
          clientSide ? Side::SERVER : Side::CLIENT, false, MAX_FDS);
      end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
      during(process, *end, end->root());
      end->expectTransport(Transport::SHARED_MEMORY);
      end = nullptr;
      auto transport = process.line();
      EXPECT_EQ(0, transport.find(
          kj::str(int(Transport::SHARED_MEMORY), ' ', int(Transport::SHARED_MEMORY)).cStr()))
          << transport;
      process.line();
      EXPECT_EQ("0 fds 0 regions", process.line());
      EXPECT_EQ(0, process.wait());
      state.slow.clear();
      turn();
    }
    EXPECT_EQ(before, resourcesOf());
    EXPECT_EQ(0, state.items + mine.items);
  }

  void exerciseAll(Root::Client& root, Phase from = Phase::SET_UP) {
    for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
      if (phase >= from) {
        exercise(root, mine, phase, WorkloadSize(),
            [&](auto promise) { return await(kj::mv(promise)); });
      }
    }
  }
};

TEST_P(Stall, PeerStoppedForSeconds) {
  for (bool clientSide: { false, true }) {
    run(clientSide, [&](PeerProcess& process, End& end, Root::Client root) {
      exerciseAll(root);
      process.signal(SIGSTOP);
      process.awaitStop();

      // More than goes into the ring or into memory that is there already.
      uint done = 0, failed = 0;
      kj::Vector<kj::Promise<void>> calls;
      for (uint i = 0; i < 500; i++) {
        auto request = root.echoRequest();
        request.setData(conformance::pattern(i % 10 == 0 ? 20000 : 100, i));
        calls.add(request.send().then([&done, i](auto&& response) {
          if (conformance::isPattern(response.getData(), i)) ++done;
        }, [&failed](kj::Exception&&) { ++failed; }).eagerlyEvaluate(nullptr));
      }
      // Meanwhile our loop does all else: timers, and another connection on it.
      auto pipe = io.provider->newCapabilityPipe();
      conformance::ServerState other;
      auto otherServer = newEnd(kj::mv(pipe.ends[0]), Side::SERVER);
      otherServer->start(capnp::Capability::Client(kj::heap<RootImpl>(other)));
      auto otherClient = newEnd(kj::mv(pipe.ends[1]), Side::CLIENT);
      otherClient->start(nullptr);
      {
        auto otherRoot = otherClient->root();
        for (uint i = 0; i < 200; i++) {
          await(otherRoot.addRequest().send().ignoreResult());
          io.provider->getTimer().afterDelay(10 * kj::MILLISECONDS).wait(io.waitScope);
        }
      }
      otherClient = nullptr;
      otherServer = nullptr;
      EXPECT_EQ(0, done);
      EXPECT_EQ(0, failed);
      EXPECT_EQ(Transport::SHARED_MEMORY,
          KJ_ASSERT_NONNULL(end.network.getStats()).outgoing.transport);

      process.signal(SIGCONT);
      await(kj::joinPromises(calls.releaseAsArray()));
      EXPECT_EQ(500, done);
      exerciseAll(root, Phase::STEADY);
    });
  }
}

TEST_P(Stall, ClocksJump) {
  // The monotonic clock only ahead, as when a machine was suspended: KJ's own timers allow no more.
  struct Jump {
    kj::uint clock;
    int64_t seconds;
  };
  for (bool clientSide: { false, true }) {
    for (auto jump: { Jump { MONOTONIC_JUMP, 3600 }, Jump { REALTIME_JUMP, 86400 * 365 },
                      Jump { REALTIME_JUMP, -86400 * 365 } }) {
      for (auto when: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
        run(clientSide, [&](PeerProcess& process, End&, Root::Client root) {
          for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
            if (phase == when) process.setProgress(jump.clock, uint64_t(jump.seconds));
            exercise(root, mine, phase, WorkloadSize(),
                [&](auto promise) { return await(kj::mv(promise)); });
          }
        });
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, Stall, testing::ValuesIn(sharedModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
