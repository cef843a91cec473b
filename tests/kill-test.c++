// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fault-places.h"
#include "fault-workload.h"
#include "process-fixture.h"
#include "system-call-tracer.h"

#include <capnp-shm/rpc-shm.h>
#include <cmath>
#include <iostream>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>

// A process is killed at each of its fault points, at each of its system calls, and at random
// moments. Its peer, in this process, gets all that it had published, then the end; nothing is left
// of it; and the same server goes on.
//
// CAPNP_SHM_KILL_EVERY_STEP=1 kills at every step instead of some 60 for each test, and
// CAPNP_SHM_RANDOM_KILLS sets the number of random kills.

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::Root;
using conformance::RootImpl;
using kj::uint;

bool everyStep() { return getenv("CAPNP_SHM_KILL_EVERY_STEP") != nullptr; }

uint64_t randomKills() {
  auto text = getenv("CAPNP_SHM_RANDOM_KILLS");
  return text != nullptr ? strtoull(text, nullptr, 10) : SLOW ? 40 : 200;
}

void expectDisconnected(const kj::Exception& exception) {
  EXPECT_EQ(uint(kj::Exception::Type::DISCONNECTED), uint(exception.getType()))
      << kj::str(exception).cStr();
}

class Kill: public ProcessTest {
protected:
  conformance::ServerState mine;

  struct Victim {
    kj::Own<PeerProcess> process;
    kj::Own<kj::AsyncCapabilityStream> stream;
    kj::Own<SystemCallTracer> tracer;
    bool killed = false;

    int end() {
      if (tracer.get() != nullptr) tracer->join();
      int code = process->wait();
      killed = code == -SIGKILL;
      if (!killed) {
        EXPECT_EQ(0, code);
      }
      return code;
    }
  };

  struct How {
    // How a process is to die.
    std::vector<std::string> arguments;
    uint64_t systemCallStop = 0;
    // If not 0: at its entries to and exits from system calls, counted from 1.
    uint64_t* countStops = nullptr;
  };

  Victim startVictim(const char* role, const How& how, std::vector<std::string> more = {}) {
    auto pair = newSocketPair();
    int socket = pair.peers;
    auto arguments = mode().arguments(role, how.arguments);
    arguments.insert(arguments.end(), more.begin(), more.end());
    Victim result;
    result.process = kj::heap<PeerProcess>(
        kj::arrayPtr(&socket, 1), kj::mv(arguments), FAULT_PEER);
    result.stream = wrapSocket(io, kj::mv(pair.mine));
    KJ_REQUIRE(result.process->line() == "at the gate");
    if (how.systemCallStop != 0 || how.countStops != nullptr) {
      // The tracer outlives neither the process nor this test.
      auto count = how.countStops;
      auto when = how.systemCallStop;
      uint64_t stops = 0;
      bool counting = false;
      result.tracer = kj::heap<SystemCallTracer>(result.process->getPid(),
          [count, when, stops, counting](StoppedProcess& stopped) mutable {
        if (!counting) {
          // Still at the gate.
          counting = !stopped.entry && stopped.call.number == SYS_read &&
              stopped.call.arguments[0] == REPORT_FD && stopped.result == 1;
          return;
        }
        ++stops;
        if (count != nullptr) *count = stops;
        if (stops == when) stopped.kill();
      });
    }
    result.process->proceed();
    return result;
  }

  virtual Victim runVictim(const How& how) = 0;
  // A whole life, until its death and that of the connection; everything is checked.

  Victim run(const How& how) {
    alarm(120);  // No hang goes unnoticed, even one in which no timer runs.
    auto before = resourcesOf();
    auto victim = runVictim(how);
    victim.process = nullptr;
    victim.tracer = nullptr;
    EXPECT_EQ(before, resourcesOf());
    alarm(0);
    return victim;
  }

  void killAtFaultPoints() {
    // Once without killing it, to see what there is.
    std::string report;
    How counted { { "record=1" } };
    uint64_t total;
    {
      alarm(120);
      auto victim = runVictim(counted);
      EXPECT_FALSE(victim.killed);
      report = reportOfPlaces(*victim.process);
      total = victim.process->getProgress(FAULT_STEPS);
    }
    auto places = placesOf(report);
    EXPECT_GT(places.size(), 10);
    EXPECT_GT(total, 100);

    uint64_t kills = 0;
    for (auto& place: places) {
      SCOPED_TRACE(place.first);
      kills += run({ { "killPlace=" + place.first } }).killed;
      if (HasFailure()) return;
    }
    // Each life is a little different.
    EXPECT_GE(kills, places.size() * 9 / 10);
    uint64_t stride = everyStep() ? 1 : total / (SLOW ? 10 : 40) + 1;
    uint64_t survived = 0;
    for (uint64_t step = 1; survived < 3; step += stride) {
      SCOPED_TRACE(kj::str("step ", step).cStr());
      if (run({ { "killStep=" + std::to_string(step) } }).killed) {
        ++kills;
      } else {
        ++survived;
      }
      if (HasFailure()) return;
    }
    std::cout << "fault points: " << places.size() << " places, passed " << total << " times; "
              << kills << " kills" << std::endl;
  }

  void killAtSystemCalls() {
    if (!SystemCallTracer::isAllowed()) {
      GTEST_SKIP() << "this process may not trace its children (ptrace)";
    }
    uint64_t total = 0;
    How counted;
    counted.countStops = &total;
    EXPECT_FALSE(run(counted).killed);
    EXPECT_GT(total, 100);
    uint64_t stride = everyStep() ? 1 : total / (SLOW ? 10 : 60) + 1;
    uint64_t kills = 0, survived = 0;
    for (uint64_t stop = 1; survived < 3; stop += stride) {
      SCOPED_TRACE(kj::str("stop ", stop).cStr());
      How how;
      how.systemCallStop = stop;
      if (run(how).killed) {
        ++kills;
      } else {
        ++survived;
      }
      if (HasFailure()) return;
    }
    std::cout << "system calls: " << total << " entries and exits; " << kills << " kills"
              << std::endl;
  }
};

// =======================================================================================

class KillSender: public Kill {
  // It sends numbered messages, and receives ours.

protected:
  Victim runVictim(const How& how) override {
    auto victim = startVictim("send", how, { "count=60", small ? "small=1" : "small=0" });
    auto end = newEnd(kj::mv(victim.stream), Side::SERVER, small);
    end->expectNothing();
    auto connection = rawConnection(*end);
    uint64_t next = 0;
    uint64_t sent = 0;
    auto received = receive(*connection, next, sent).eagerlyEvaluate(nullptr);
    bool clean = false;
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      await(kj::mv(received));
      clean = true;
    })) {
      expectDisconnected(*exception);
    }
    if (clean) {
      // It ended its messages, or was killed between two of them; or it is alive and waits for ours
      // to end.
      KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { await(connection->shutdown()); })) {
        expectDisconnected(*exception);
      }
    }
    connection = nullptr;
    await(end->network.onDisconnect());
    end = nullptr;
    victim.end();
    EXPECT_GE(next, victim.process->getProgress(PUBLISHED));
    EXPECT_LE(next, victim.process->getProgress(BEGUN));
    if (!victim.killed) {
      EXPECT_EQ(61, next);
    }
    return victim;
  }

  bool small = false;

private:
  kj::Promise<void> receive(Connection& connection, uint64_t& next, uint64_t& sent) {
    return connection.receiveIncomingMessage().then(
        [this, &connection, &next, &sent](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message)
            -> kj::Promise<void> {
      KJ_IF_MAYBE(m, message) {
        KJ_REQUIRE(readNumbered(**m) == next, "out of order", next);
        ++next;
        if (sent < 40) {
          sendNumbered(connection, sent, numberedBytes(sent));
          ++sent;
        }
        return receive(connection, next, sent);
      }
      return kj::READY_NOW;
    });
  }
};

class KillClient: public Kill {
  // It calls a server, which serves all of them in turn, and meanwhile an honest client.

protected:
  ~KillClient() noexcept override {}

  void SetUp() override {
    SharedMemoryContext context;
    if (mode().port) context.port = &io.unixEventPort;
    context.options.trustPeer = mode().trust;
    server = kj::heap<SharedMemoryServer>(context, kj::heap<RootImpl>(state));
    auto pipe = io.provider->newCapabilityPipe();
    serving = accept(*pipe.ends[0]).eagerlyEvaluate(nullptr);
    serversEnd = kj::mv(pipe.ends[0]);
    honest = newEnd(kj::mv(pipe.ends[1]), Side::CLIENT, false, MAX_FDS);
    honest->start(nullptr);
    honestRoot = honest->root();
    // Until all that belongs to the setting up is there or closed.
    settle([this]() { checkHonest(); }, honest->network);
  }

  void TearDown() override {
    honestRoot = nullptr;
    honest = nullptr;
    await(kj::mv(KJ_ASSERT_NONNULL(serving)));
    EXPECT_EQ(0, state.running);
    EXPECT_EQ(0, state.items + mine.items);
  }

  kj::Promise<void> accept(kj::AsyncCapabilityStream& stream) {
    return server->accept(stream, MAX_FDS);
  }

  void checkHonest() {
    auto request = KJ_ASSERT_NONNULL(honestRoot).addRequest();
    request.setA(40);
    request.setB(2);
    EXPECT_EQ(42, await(request.send()).getValue());
  }

  Victim runVictim(const How& how) override {
    auto victim = startVictim("call", how);
    auto ended = accept(*victim.stream);
    await(kj::mv(ended));
    victim.stream = nullptr;
    victim.end();
    checkHonest();
    return victim;
  }

  static constexpr uint MAX_FDS = 4;
  kj::Own<SharedMemoryServer> server;

private:
  kj::Own<kj::AsyncCapabilityStream> serversEnd;
  kj::Maybe<kj::Promise<void>> serving;
  kj::Own<End> honest;
  kj::Maybe<Root::Client> honestRoot;
};

class KillServer: public Kill {
  // It serves our calls, each of which returns what it should or fails as disconnected.

protected:
  Victim runVictim(const How& how) override {
    auto victim = startVictim("serve", how, { clientSide ? "side=client" : "side=server" });
    auto end = newEnd(kj::mv(victim.stream), clientSide ? Side::SERVER : Side::CLIENT, false, 4);
    end->expectNothing();
    end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    {
      auto root = end->root();
      auto held = root.slowRequest().send().ignoreResult();
      WorkloadSize size;
      size.largeBytes = 60000;
      bool disconnected = false;
      KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
        for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
          exercise(root, mine, phase, size, [&](auto promise) { return await(kj::mv(promise)); });
        }
      })) {
        expectDisconnected(*exception);
        disconnected = true;
      }
      if (disconnected) {
        EXPECT_FAILS(DISCONNECTED, "", kj::mv(held));
        EXPECT_FAILS(DISCONNECTED, "", root.addRequest().send().ignoreResult());
      }
    }
    end = nullptr;
    victim.end();
    state.slow.clear();
    turn();
    EXPECT_EQ(0, state.items + mine.items);
    return victim;
  }

  bool clientSide = false;
};

#define KILL_TESTS(name) \
  TEST_P(name, AtFaultPoints) { killAtFaultPoints(); } \
  TEST_P(name, AtSystemCalls) { killAtSystemCalls(); } \
  INSTANTIATE_TEST_SUITE_P(Modes, name, testing::ValuesIn(sharedModes()), modeName)

KILL_TESTS(KillSender);
KILL_TESTS(KillClient);
KILL_TESTS(KillServer);

class KillSmallSender: public KillSender {
  // With so little memory that messages wait, and go in parts.

protected:
  KillSmallSender() { small = true; }
};
KILL_TESTS(KillSmallSender);

class KillServerThatOffers: public KillServer {
protected:
  KillServerThatOffers() { clientSide = true; }
};
KILL_TESTS(KillServerThatOffers);

// =======================================================================================

class KillAtRandom: public KillClient {
protected:
  template <typename Func>
  void killSoon(PeerProcess& process, Func&& meanwhile) {
    // From another thread, so that it does not depend on what this one does. Lives from one
    // microsecond to 30 milliseconds are all as likely.
    auto nanoseconds = uint64_t(1000 * exp2(drand48() * 15));
    pid_t pid = process.getPid();
    std::thread killer([pid, nanoseconds]() {
      timespec time { 0, long(nanoseconds) };
      nanosleep(&time, nullptr);
      kill(pid, SIGKILL);
    });
    KJ_DEFER(killer.join());
    meanwhile();
  }

  void expectMostKilled(uint64_t killed) {
    // Some are done before.
    std::cout << killed << " of " << randomKills() << " killed before they were done" << std::endl;
    EXPECT_GE(killed * 2, randomKills());
  }
};

TEST_P(KillAtRandom, Clients) {
  srand48(4711);
  uint64_t killed = 0;
  for (uint64_t i = 0; i < randomKills(); i++) {
    SCOPED_TRACE(i);
    alarm(120);
    auto before = resourcesOf();
    {
      auto victim = startVictim("call", {});
      auto ended = accept(*victim.stream);
      killSoon(*victim.process, [&]() { await(kj::mv(ended)); });
      victim.end();
      killed += victim.killed;
    }
    checkHonest();
    EXPECT_EQ(before, resourcesOf());
    alarm(0);
    if (HasFailure()) return;
  }
  expectMostKilled(killed);
}

TEST_P(KillAtRandom, Servers) {
  srand48(42);
  uint64_t killed = 0;
  for (uint64_t i = 0; i < randomKills(); i++) {
    SCOPED_TRACE(i);
    alarm(120);
    auto before = resourcesOf();
    {
      auto victim = startVictim("serve", {});
      auto end = newEnd(kj::mv(victim.stream), Side::CLIENT, false, MAX_FDS);
      end->expectNothing();
      end->start(nullptr);
      auto root = end->root();
      killSoon(*victim.process, [&]() {
        KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
          for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
            exercise(root, mine, phase, WorkloadSize(),
                [&](auto promise) { return await(kj::mv(promise)); });
          }
        })) {
          expectDisconnected(*exception);
        }
      });
      root = nullptr;
      end = nullptr;
      victim.end();
      killed += victim.killed;
    }
    EXPECT_EQ(before, resourcesOf());
    alarm(0);
    if (HasFailure()) return;
  }
  expectMostKilled(killed);
}

INSTANTIATE_TEST_SUITE_P(Modes, KillAtRandom, testing::ValuesIn(spinningModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
