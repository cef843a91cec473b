// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The client that is measured, and what its cases have in common.

#include "bench.capnp.h"
#include "meter.h"
#include "peers.h"
#include "server.h"
#include "system-call-trap.h"
#include "transports.h"
#include <kj/async-io.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

class Figures {
  // What a slice has measured: names, as in the JSON output, and values.

public:
  struct Figure {
    kj::StringPtr name;
    double value;
  };

  void add(kj::StringPtr name, double value) { figures.add(Figure { name, value }); }
  kj::ArrayPtr<const Figure> get() const { return figures.asPtr(); }

private:
  kj::Vector<Figure> figures;
};

struct ClientOptions {
  kj::StringPtr transport;
  kj::String address;    // Of the server's Unix socket.
  pid_t serverPid = 0;   // The client's own if there is no server process.
  uint peerCore = 0;     // Where the server runs.
  int tasksFd = -1;      // Tasks come in here...
  int outcomesFd = -1;   // and the outcomes go out here.
};

class Session {
  // A client process and its server. It keeps its connections open for all its slices.

public:
  struct Connection {
    kj::Own<Link> link;
    Target::Client target;
  };

  Session(const TransportSpec& transport, const ClientOptions& options);

  kj::AsyncIoContext io;
  const TransportSpec& transport;
  const pid_t serverPid;
  const uint peerCore;
  Latencies latencies;

  kj::WaitScope& waitScope() { return io.waitScope; }
  Connection connect();
  // A new one, which has not been used yet.

  void setUp(Connection& connection);
  // Uses it until it is in shared memory, if it can be; throws if it stays plain all the same.

  void openConnections(uint count);
  // Sees to it that so many are open, used and, if they can be, in shared memory.

  Target::Client& target() { return targetAt(0); }
  Target::Client& targetAt(uint index);

  kj::Promise<void> echo(Target::Client& target);
  Peer& peer();
  // If the transport is another library's.

  struct Totals {
    // Both sides' counters, of all connections.
    uint64_t doorbells = 0;
    uint64_t sleeps = 0;
    uint64_t clientSharedBytes = 0;
    uint64_t serverSharedBytes = 0;
    uint64_t copiedBytes = 0;
    uint64_t heapWaits = 0;
  };
  Totals totals();

private:
  kj::Own<kj::NetworkAddress> address;
  Links noLinks;
  kj::String peerAddress;
  kj::Own<Peer> peerClient;
  std::vector<Connection> connections;

public:
  // Used by the case "held"; they go before the connections.
  kj::Vector<kj::Promise<void>> heldCalls;
  kj::Vector<capnp::Response<Target::GetResults>> heldResponses;
};

class Slice {
  // Measures one slice of a case:
  //
  //     Slice slice(session, task);
  //     slice.run([&]() { call(); });
  //     slice.report(figures);

public:
  Slice(Session& session, Task::Reader task): session(session), task(task) {}

  template <typename Call>
  void run(Call&& call) {
    run(kj::fwd<Call>(call), []() {});
  }
  template <typename Call, typename Between>
  void run(Call&& call, Between&& between) {
    // Calls are made one after the other. The time of each is taken, without `between`.
    warmUp([&]() {
      call();
      between();
    });
    start();
    do {
      uint64_t begin = now();
      call();
      record(now() - begin);
      between();
    } while (more());
    stop();
  }

  template <typename Call>
  void runBeside(Call&& call) {
    // Likewise, beside others that go on all the time and whose CPU and system calls it would be
    // that are counted, so only latencies are for reportLatencies(); `call` returns them. All stand
    // still while start() takes its figures, and have to get going again before anything is
    // measured.
    start();
    warmUp(call);
    do record(call()); while (more());
    stop();
  }

  template <typename Call>
  void warmUp(Call&& call) {
    uint64_t end = now() + uint64_t(task.getWarmUpSeconds() * 1e9);
    do call(); while (now() < end);
  }
  void start();
  void record(uint64_t nanoseconds) {
    session.latencies.add(nanoseconds);
    ++calls;
  }
  bool more() {
    // Whether another call is due.
    if (task.getCalls() > 0) return calls < task.getCalls();
    return now() < deadline || calls < LEAST_CALLS;
  }
  void stop();

  void report(Figures& figures);
  void reportLatencies(Figures& figures);
  // Part of report().
  void reportRate(Figures& figures, double bytesPerCall);

private:
  static constexpr uint LEAST_CALLS = 3;

  Session& session;
  Task::Reader task;
  uint64_t calls = 0;
  uint64_t startTime = 0;
  uint64_t deadline = 0;
  double seconds = 0;
  Session::Totals totalsBefore, totalsAfter;
  // At the start, then what was used since. Those of the server are 0 if it is no process.
  double clientSeconds = 0, serverSeconds = 0;
  uint64_t contextSwitches = 0;
  kj::Maybe<SystemCallCounter> clientSystemCalls, serverSystemCalls;
  kj::Own<SystemCallTrap> clientTrap;  // If that is not permitted, but this is, and there:
  uint64_t clientCalls = 0, serverCalls = 0;
  bool isCounted = false, isTrapped = false;

  void startCounting();
  void stopCounting();
  bool hasServer() const { return session.serverPid != getpid(); }
  uint64_t countContextSwitches() const {
    uint64_t result = ContextSwitches::of(getpid()).all();
    if (hasServer()) result += ContextSwitches::of(session.serverPid).all();
    return result;
  }
};

typedef void CaseFunction(Session& session, Task::Reader task, Figures& figures);

// The cases; see the driver's list for what calls them.
CaseFunction smallCall, idleGap, besideBusy, window;
CaseFunction param, firstParam, result, stream, held;
CaseFunction connections, connectionsBusy, connectTime, connectBesideBusy, idleMemory, idle, pages;
CaseFunction rawLimit, peerCall;

void runClient(const ClientOptions& options);
// Does what it is told, until there is no more.

}  // namespace bench
}  // namespace capnpshm
