// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The client that is measured, and what its cases have in common.

#include "bench.capnp.h"
#include "meter.h"
#include "server.h"
#include "transports.h"
#include <kj/async-io.h>

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
  int tasksFd = -1;      // Tasks come in here...
  int outcomesFd = -1;   // and the outcomes go out here.
};

class Session {
  // A client process and its server. It keeps one connection open for all its slices.

public:
  struct Connection {
    kj::Own<Link> link;
    Target::Client target;
  };

  Session(const TransportSpec& transport, const ClientOptions& options);

  kj::AsyncIoContext io;
  const TransportSpec& transport;
  const pid_t serverPid;
  Latencies latencies;

  kj::WaitScope& waitScope() { return io.waitScope; }
  Connection connect();
  Target::Client& target();
  // Of the connection that is kept open.

  kj::Promise<void> echo(Target::Client& target);
  void requireShared(Link& link);
  // Throws if a connection of a shared memory transport has stayed plain.

  struct Totals {
    // Both sides' counters, of the connection that is kept (client) and all (server).
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
  kj::Maybe<Connection> kept;
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
  void reportRate(Figures& figures, double bytesPerCall);

private:
  static constexpr uint LEAST_CALLS = 2;

  Session& session;
  Task::Reader task;
  uint64_t calls = 0;
  uint64_t startTime = 0;
  uint64_t deadline = 0;
  double seconds = 0;
  Session::Totals totalsBefore, totalsAfter;
  ProcessUsage client, server;  // At the start, then what was used.
  kj::Maybe<SystemCallCounter> clientSystemCalls, serverSystemCalls;
  uint64_t clientCalls = 0, serverCalls = 0;
};

typedef void CaseFunction(Session& session, Task::Reader task, Figures& figures);

// The cases; see the driver's list for what calls them.
CaseFunction smallCall, idleGap, window;
CaseFunction param, result, stream, held;
CaseFunction connections, connectionsBusy, connectTime, idleMemory, idle, pages;

void rawLimit(const TransportSpec& transport, Task::Reader task, Figures& figures);

void runClient(const ClientOptions& options);
// Does what it is told, until there is no more.

}  // namespace bench
}  // namespace capnpshm
