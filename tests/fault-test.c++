// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "faults.h"
#include "process-fixture.h"

#include <errno.h>
#include <fstream>
#include <iostream>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// System calls of a process fail, or do less than they were asked to, one at a time or all of a
// kind; each with what is to come of it. Whatever it is: no hang, no crash, nothing left over,
// another connection of the same process works on, and what failed is said.
//
// By default one case each of first and later calls; CAPNP_SHM_ALL_FAULTS=1 makes every single call
// of the kind fail in turn.

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::Root;
using conformance::RootImpl;
using kj::uint;

uint64_t breakOf(pid_t pid) {
  std::ifstream maps(kj::str("/proc/", pid, "/maps").cStr());
  for (std::string line; std::getline(maps, line);) {
    if (line.find("[heap]") != std::string::npos) {
      return strtoull(line.c_str() + line.find('-') + 1, nullptr, 16);
    }
  }
  return 0;
}

class Injector {
  // Lets the calls of a traced process go wrong. One thread sets the phase, another is the
  // tracer's.

public:
  Injector(const Fault& fault, int error, uint first)
      : fault(fault), error(error), first(first) {}

  std::atomic<uint> phase { uint(Phase::SET_UP) };
  std::atomic<uint> hits { 0 };
  std::atomic<uint> seen { 0 };

  void setBreak(uint64_t address) { currentBreak = address; }
  // Where the process's heap ends when tracing begins.

  void operator()(StoppedProcess& stopped) {
    bool isBreak = stopped.call.number == SYS_brk;
    if (isBreak && !stopped.entry && !active) currentBreak = stopped.result;
    if (stopped.entry) {
      active = false;
      if (phase.load() != uint(fault.phase) || !fault.matches(stopped.call)) return;
      // Only what cannot be for something small.
      if (isBreak && stopped.call.arguments[0] <= currentBreak + LARGE) return;
      uint number = seen++;
      if (number < first) return;
      if (fault.count != EVERY && number >= first + fault.count) return;
      enter(stopped);
    } else if (active) {
      leave(stopped);
      active = false;
    }
  }

private:
  const Fault& fault;
  int error;
  uint first;  // How many calls to leave alone.
  uint64_t currentBreak = 0;
  bool active = false;

  msghdr header;
  iovec vector;
  uint64_t vectorAddress = 0;

  void enter(StoppedProcess& stopped) {
    auto& call = stopped.call;
    bool isMessage = call.number == SYS_recvmsg || call.number == SYS_sendmsg;
    vectorAddress = 0;
    switch (fault.effect) {
      case Effect::FAIL:
        stopped.skip();
        break;
      case Effect::SHORT:
        if (call.number == SYS_read || call.number == SYS_write) {
          if (call.arguments[2] <= 1) return;
          stopped.setArgument(2, 1);
        } else {
          if (isMessage) {
            header = stopped.read<msghdr>(call.arguments[1]);
            vectorAddress = reinterpret_cast<uint64_t>(header.msg_iov);
            if (header.msg_iovlen > 1) {
              auto changed = header;
              changed.msg_iovlen = 1;
              stopped.write(call.arguments[1], changed);
            }
          } else {
            vectorAddress = call.arguments[1];
            stopped.setArgument(2, 1);
          }
          vector = stopped.read<iovec>(vectorAddress);
          auto changed = vector;
          changed.iov_len = kj::min(changed.iov_len, size_t(1));
          stopped.write(vectorAddress, changed);
        }
        break;
      case Effect::NO_FDS:
        header = stopped.read<msghdr>(call.arguments[1]);
        if (header.msg_controllen == 0) return;
        header.msg_controllen = 0;
        stopped.write(call.arguments[1], header);
        active = true;
        return;  // It counts if there were any: see leave().
    }
    active = true;
    ++hits;
  }

  void leave(StoppedProcess& stopped) {
    auto& call = stopped.call;
    if (fault.effect == Effect::NO_FDS) {
      bool cut = (stopped.read<msghdr>(call.arguments[1]).msg_flags & MSG_CTRUNC) != 0;
      if (stopped.result >= 0 && cut) ++hits;
      return;
    }
    if (fault.effect == Effect::FAIL) {
      // brk() has no error but that nothing changes.
      stopped.setResult(call.number == SYS_brk ? int64_t(currentBreak) : -error);
    } else if (fault.effect == Effect::SHORT && vectorAddress != 0) {
      stopped.write(vectorAddress, vector);
      if (call.number == SYS_recvmsg || call.number == SYS_sendmsg) {
        auto changed = stopped.read<msghdr>(call.arguments[1]);
        changed.msg_iovlen = header.msg_iovlen;
        stopped.write(call.arguments[1], changed);
      }
    }
  }
};

class FaultyProcess: public ProcessTest {
  // The process to which something happens serves our calls, on either side of the connection, and
  // those of a second connection.

protected:
  conformance::ServerState mine;
  static constexpr uint MAX_FDS = 4;

  struct Result {
    uint hits = 0;
    uint seen = 0;
  };

  Result disturb(const Fault& fault, int error, uint first, bool clientSide) {
    alarm(120);
    auto before = resourcesOf();
    Result result;
    {
      Injector injector(fault, error, first);
      auto pair = newSocketPair();
      auto steadyPair = newSocketPair();
      int sockets[] = { pair.peers, steadyPair.peers };
      // In this order, since its process must be gone before the tracer is.
      kj::Own<SystemCallTracer> tracer;
      PeerProcess process(sockets, mode().arguments("serve",
          { "steady=1", "steadyCalls=4", clientSide ? "side=client" : "side=server" }), FAULT_PEER);
      pair.peers = nullptr;
      steadyPair.peers = nullptr;
      auto steady = newEnd(wrapSocket(io, kj::mv(steadyPair.mine)), Side::CLIENT, false, MAX_FDS);
      steady->start(nullptr);
      auto steadyRoot = steady->root();
      auto checkSteady = [&]() {
        EXPECT_EQ(0, await(steadyRoot.addRequest().send()).getValue());
      };
      for (uint i = 0; i < 4; i++) checkSteady();
      EXPECT_EQ("at the gate", process.line());
      tracer = kj::heap<SystemCallTracer>(process.getPid(),
          [&injector](StoppedProcess& stopped) { injector(stopped); });
      injector.setBreak(breakOf(process.getPid()));
      process.proceed();

      auto end = newEnd(wrapSocket(io, kj::mv(pair.mine)),
          clientSide ? Side::SERVER : Side::CLIENT, false, MAX_FDS);
      end->expectNothing();
      end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
      kj::Vector<kj::Exception> exceptions;
      SharedMemoryStats stats;
      {
        auto root = end->root();
        for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
          injector.phase = uint(phase);
          bool losesFds = fault.outcome == Outcome::LOSES_FDS && phase == fault.phase;
          WorkloadSize size;
          size.fds = !losesFds;
          auto wait = [&](auto promise) { return await(kj::mv(promise)); };
          KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
            exercise(root, mine, phase, size, wait);
            if (losesFds) exerciseFiles(root, mine, wait, false);
          })) {
            exceptions.add(kj::mv(*exception));
          }
          if (phase == Phase::SET_UP && exceptions.size() == 0) {
            // The helper has mapped our region, or declined, when it answers a call that we made
            // after we had done so with its own.
            until([&]() {
              return KJ_ASSERT_NONNULL(end->network.getStats()).incoming.transport !=
                  Transport::STARTING;
            });
            KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
              wait(root.addRequest().send());
            })) {
              exceptions.add(kj::mv(*exception));
            }
          }
          checkSteady();
        }
        injector.phase = uint(Phase::END);
        stats = KJ_ASSERT_NONNULL(end->network.getStats());
      }
      end = nullptr;
      auto transport = process.line();
      auto failure = process.line();
      checkSteady();
      steady->expectTransport(Transport::SHARED_MEMORY);
      steadyRoot = nullptr;
      steady = nullptr;
      EXPECT_EQ("0 fds 0 regions", process.line());
      tracer->join();
      EXPECT_EQ(0, process.wait());
      state.slow.clear();
      turn();

      result = { injector.hits, injector.seen };
      if (result.hits > 0) expect(fault, first, exceptions, stats, transport, failure);
    }
    EXPECT_EQ(before, resourcesOf());
    EXPECT_EQ(0, state.items + mine.items);
    alarm(0);
    return result;
  }

private:
  void expect(const Fault& fault, uint first, kj::ArrayPtr<kj::Exception> exceptions,
              const SharedMemoryStats& stats, const std::string& transport,
              const std::string& failure) {
    auto has = [&](const std::string& text) {
      return text.find(fault.reason) != std::string::npos;
    };
    auto all = kj::str("helper: ", transport.c_str(), "; ", failure.c_str());
    std::string context = all.cStr();
    for (auto& exception: exceptions) context += kj::str("; ", exception).cStr();
    auto shared = kj::str(int(Transport::SHARED_MEMORY), ' ', int(Transport::SHARED_MEMORY), ' ');
    auto plain = kj::str(int(Transport::PLAIN), ' ', int(Transport::PLAIN), ' ');
    auto outcome = fault.outcome;
    if (fault.effect == Effect::NO_FDS && outcome == Outcome::STAYS_PLAIN && first > 0 &&
        transport.find(plain.cStr()) != 0) {
      // What lost its descriptor was not the offer, but a bell.
      outcome = Outcome::WORKS;
    }
    switch (outcome) {
      case Outcome::WORKS:
      case Outcome::LOSES_FDS:
        EXPECT_EQ(0, exceptions.size()) << context;
        EXPECT_EQ(0, transport.find(shared.cStr())) << context;
        EXPECT_EQ(Transport::SHARED_MEMORY, stats.outgoing.transport);
        break;
      case Outcome::STAYS_PLAIN:
        EXPECT_EQ(0, exceptions.size()) << context;
        EXPECT_EQ(0, transport.find(plain.cStr())) << context;
        EXPECT_TRUE(has(transport)) << context;
        EXPECT_GT(transport.size(), plain.size()) << context;
        EXPECT_EQ(Transport::PLAIN, stats.outgoing.transport);
        EXPECT_NE("", stats.outgoing.plainReason);
        break;
      case Outcome::CALL_FAILS:
        EXPECT_EQ(1, exceptions.size()) << context;
        for (auto& exception: exceptions) {
          EXPECT_TRUE(has(exception.getDescription().cStr())) << context;
        }
        EXPECT_EQ(0, transport.find(shared.cStr())) << context;
        break;
      case Outcome::CONNECTION_FAILS:
        ASSERT_GT(exceptions.size(), 0) << context;
        for (auto& exception: exceptions) {
          EXPECT_EQ(uint(kj::Exception::Type::DISCONNECTED), uint(exception.getType())) << context;
        }
        EXPECT_TRUE(has(failure)) << context;
        EXPECT_GT(failure.size(), 4) << context;
        break;
    }
  }
};

TEST_P(FaultyProcess, FailsAsItShould) {
  if (!SystemCallTracer::isAllowed() || !SystemCallTracer::canChangeCalls()) {
    GTEST_SKIP() << "this process may not trace its children, or not change their system calls";
  }
  bool all = getenv("CAPNP_SHM_ALL_FAULTS") != nullptr;
  auto only = getenv("CAPNP_SHM_ONLY_FAULT");
  uint cases = 0, calls = 0;
  for (auto& fault: faults()) {
    if (only != nullptr && strcmp(only, fault.name) != 0) continue;
    if (fault.trust == Fault::TRUSTED && !mode().trust) continue;
    if (fault.trust == Fault::UNTRUSTED && mode().trust) continue;
    if (SLOW && fault.matches == isLargeAllocation) {
      std::cout << fault.name << ": left out, since the sanitizer has a malloc() of its own"
                << std::endl;
      continue;
    }
    SCOPED_TRACE(fault.name);
    bool everHit = false;
    for (bool clientSide: { false, true }) {
      SCOPED_TRACE(clientSide ? "the side that offers" : "the side that answers");
      auto errors = fault.errors;
      if (errors.empty()) errors.push_back(0);
      if (!all) errors.resize(1);
      for (int error: errors) {
        SCOPED_TRACE(strerror(error));
        auto result = disturb(fault, error, 0, clientSide);
        everHit = everHit || result.hits > 0;
        ++cases;
        calls += result.hits;
        // The same with each later call as the first one.
        for (uint first = 1; all && result.seen > first && first < 30; first++) {
          result = disturb(fault, error, first, clientSide);
          ++cases;
          calls += result.hits;
        }
      }
    }
    EXPECT_TRUE(everHit) << "no such call was made";
    if (only == nullptr && HasFailure()) std::cout << "after " << fault.name << std::endl;
  }
  std::cout << cases << " cases, " << calls << " system calls" << std::endl;
}

INSTANTIATE_TEST_SUITE_P(Modes, FaultyProcess, testing::ValuesIn(sharedModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
