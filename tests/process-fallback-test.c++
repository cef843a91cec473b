// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "emulator.h"
#include "process-fixture.h"

#include <string.h>

// Processes that cannot use shared memory, because of a sandbox, a limit, or what is between them:
// both stay plain, get the same results, and say why.

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::RootImpl;
using kj::uint;

struct Obstacle {
  const char* denied;  // To the helper, by its system.
  const char* reason;  // Why it stays plain then.

  std::vector<std::string> arguments() const { return { std::string("deny=") + denied }; }
  kj::String reported() const { return kj::str("the peer declined: ", reason); }
};

std::vector<Obstacle> refusals(const char* reasonWithoutFiles) {
  // That depends on who needs a file first.
  return { { "memfd", "this side cannot make shared memory" },
           { "map", "cannot map the peer's shared memory" },
           { "files", reasonWithoutFiles } };
}

class Fallback: public ProcessTest {
protected:
  void expectPlain(End& end, const char* reason) {
    auto stats = KJ_ASSERT_NONNULL(end.network.getStats());
    for (auto direction: { &stats.outgoing, &stats.incoming }) {
      EXPECT_EQ(Transport::PLAIN, direction->transport);
      EXPECT_NE(nullptr, strstr(direction->plainReason.cStr(), reason))
          << direction->plainReason.cStr();
    }
    EXPECT_EQ(0, stats.regions);
  }

  static void expectReport(const std::string& report, const char* reason) {
    // "2 2": the number of Transport::PLAIN, for both directions.
    auto plain = kj::str(int(Transport::PLAIN), ' ', int(Transport::PLAIN), ' ');
    EXPECT_EQ(0, report.find(plain.cStr())) << report;
    EXPECT_NE(std::string::npos, report.find(reason)) << report;
  }

  void runWithServer(const Obstacle& obstacle) {
    // The helper is the server.
    auto peer = start(mode().arguments("serve", obstacle.arguments()));
    auto end = newEnd(kj::mv(peer.stream), Side::CLIENT);
    end->start(nullptr);
    EXPECT_EQ("ready", peer.process->line());
    runWorkload(end->root(), io.waitScope);
    expectPlain(*end, obstacle.reported().cStr());
    EXPECT_EQ(0, resourcesOf(peer.process->getPid()).regions);
    end = nullptr;
    expectReport(peer.process->line(), obstacle.reason);
    EXPECT_EQ(0, peer.process->wait());
  }

  void runWithClient(const Obstacle& obstacle) {
    auto peer = start(mode().arguments("call", obstacle.arguments()));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER);
    end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    await(end->network.onDisconnect());
    expectReport(peer.process->line(), obstacle.reason);
    EXPECT_EQ(0, peer.process->wait());
    expectPlain(*end, obstacle.reported().cStr());
    EXPECT_EQ(0, state.running);
  }
};

TEST_P(Fallback, HelperCanBeDeniedNothing) {
  // Or the tests below would prove nothing.
  auto before = resourcesOf();
  {
    auto peer = start(mode().arguments("serve"));
    auto end = newEnd(kj::mv(peer.stream), Side::CLIENT);
    end->start(nullptr);
    runWorkload(end->root(), io.waitScope);
    end->expectTransport(Transport::SHARED_MEMORY);
    EXPECT_GT(resourcesOf(peer.process->getPid()).regions, 0);
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(Fallback, SystemRefusesInTheServer) {
  CAPNP_SHM_NEEDS_SECCOMP;
  auto before = resourcesOf();
  for (auto& obstacle: refusals("file descriptors do not pass")) {
    SCOPED_TRACE(obstacle.denied);
    runWithServer(obstacle);
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(Fallback, SystemRefusesInTheClient) {
  CAPNP_SHM_NEEDS_SECCOMP;
  auto before = resourcesOf();
  for (auto& obstacle: refusals("this side cannot make shared memory")) {
    SCOPED_TRACE(obstacle.denied);
    state.sequence = 0;
    runWithClient(obstacle);
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(Fallback, ProxyThatStripsFileDescriptors) {
  // In both directions; or in one, so that the client finds it out when the server has taken its
  // second call from shared memory already.
  auto before = resourcesOf();
  for (bool backwards: { false, true }) {
    SCOPED_TRACE(backwards ? "backwards" : "both ways");
    state.sequence = 0;
    auto front = newSocketPair();
    auto back = newSocketPair();
    int ends[] = { front.peers, back.mine };
    PeerProcess proxy(ends, { "proxy", backwards ? "stripBackwards=1" : "strip=1" });
    int serverEnd = back.peers;
    PeerProcess server(kj::arrayPtr(&serverEnd, 1), mode().arguments("serve"));
    front.peers = nullptr;
    back.mine = nullptr;
    back.peers = nullptr;
    auto end = newEnd(wrapSocket(io, kj::mv(front.mine)), Side::CLIENT);
    end->start(nullptr);
    EXPECT_EQ("ready", server.line());
    runWorkload(end->root(), io.waitScope);
    const char* reason = "file descriptors do not pass";
    const char* reported = "the peer declined: file descriptors do not pass";
    expectPlain(*end, backwards ? reason : reported);
    EXPECT_EQ(0, resourcesOf(server.getPid()).regions);
    end = nullptr;
    expectReport(server.line(), backwards ? reported : reason);
    EXPECT_EQ(0, server.wait());
    EXPECT_EQ(0, proxy.wait());
  }
  EXPECT_EQ(before, resourcesOf());
}

INSTANTIATE_TEST_SUITE_P(Modes, Fallback, testing::ValuesIn(sharedModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
