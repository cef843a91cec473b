// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// Many connections, what one costs, and what it costs when nobody uses it.

#include "client.h"
#include "lanes.h"

#include <kj/debug.h>
#include <kj/timer.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr uint SETTLE_MILLISECONDS = 100;  // Until all that is still going on has ended.

void sleepFor(Session& session, uint64_t milliseconds) {
  session.io.provider->getTimer().afterDelay(milliseconds * kj::MILLISECONDS)
      .wait(session.waitScope());
}

void connectAndCall(Session& session, Task::Reader task) {
  auto connection = session.connect();
  for (uint i = 0; i < task.getCallsEach(); i++) {
    session.echo(connection.target).wait(session.waitScope());
  }
}

}  // namespace

void connections(Session& session, Task::Reader task, Figures& figures) {
  // One call at a time, over one connection after the other.
  session.openConnections(task.getConnections());
  uint next = 0;
  Slice slice(session, task);
  slice.run([&]() {
    session.echo(session.targetAt(next)).wait(session.waitScope());
    next = (next + 1) % task.getConnections();
  });
  slice.report(figures);
}

void connectionsBusy(Session& session, Task::Reader task, Figures& figures) {
  // One call in flight on each connection.
  session.openConnections(task.getConnections());
  Lanes lanes(session);
  for (uint i = 0; i < task.getConnections(); i++) lanes.add(session.targetAt(i));
  Slice slice(session, task);
  lanes.run(slice);
  slice.report(figures);
}

void connectTime(Session& session, Task::Reader task, Figures& figures) {
  // From nothing to the answer of the first call, or of the last of a few.
  Slice slice(session, task);
  slice.run([&]() { connectAndCall(session, task); });
  slice.report(figures);
}

void connectBesideBusy(Session& session, Task::Reader task, Figures& figures) {
  // Likewise, while another connection of the same two processes is never idle.
  Lanes lanes(session);
  lanes.add(session.target());
  Slice slice(session, task);
  auto busy = lanes.goOn();
  slice.runBeside([&]() {
    uint64_t begin = now();
    connectAndCall(session, task);
    return now() - begin;
  });
  slice.reportLatencies(figures);
}

void idleMemory(Session& session, Task::Reader task, Figures& figures) {
  session.target();  // What is needed once is there.
  sleepFor(session, SETTLE_MILLISECONDS);
  auto clientBefore = Memory::of(getpid());
  auto serverBefore = Memory::of(session.serverPid);
  auto totalsBefore = session.totals();

  session.openConnections(task.getConnections() + 1);
  sleepFor(session, SETTLE_MILLISECONDS);
  auto client = Memory::of(getpid());
  auto server = Memory::of(session.serverPid);
  auto totals = session.totals();

  double scale = 1.0 / 1024 / task.getConnections();
  auto difference = [&](uint64_t after, uint64_t before) {
    return (double(after) - double(before)) * scale;
  };
  double clientAnonymous = difference(client.anonymous, clientBefore.anonymous);
  double serverAnonymous = difference(server.anonymous, serverBefore.anonymous);
  double regions = difference(totals.clientSharedBytes + totals.serverSharedBytes,
      totalsBefore.clientSharedBytes + totalsBefore.serverSharedBytes);
  figures.add("client_anonymous_kib_per_connection", clientAnonymous);
  figures.add("server_anonymous_kib_per_connection", serverAnonymous);
  figures.add("region_kib_per_connection", regions);
  figures.add("resident_kib_per_connection", serverAnonymous + regions);
  figures.add("touched_region_kib_per_connection", scale *
      (RegionsTouched::of(getpid()).total + RegionsTouched::of(session.serverPid).total));
  figures.add("server_mapped_kib_per_connection", difference(server.shared, serverBefore.shared));
}

void idle(Session& session, Task::Reader task, Figures& figures) {
  // Connections that nobody uses.
  session.openConnections(task.getConnections());
  sleepFor(session, SETTLE_MILLISECONDS);
  auto clientSwitches = ContextSwitches::of(getpid()).voluntary;
  auto serverSwitches = ContextSwitches::of(session.serverPid).voluntary;
  double serverSeconds = cpuSecondsOf(session.serverPid);
  double clientSeconds = cpuSecondsOf(getpid());
  uint64_t begin = now();
  sleepFor(session, uint64_t(task.getSeconds() * 1000));
  double seconds = (now() - begin) * 1e-9;
  clientSeconds = cpuSecondsOf(getpid()) - clientSeconds;
  serverSeconds = cpuSecondsOf(session.serverPid) - serverSeconds;
  clientSwitches = ContextSwitches::of(getpid()).voluntary - clientSwitches;
  serverSwitches = ContextSwitches::of(session.serverPid).voluntary - serverSwitches;
  figures.add("server_wakeups_per_s", serverSwitches / seconds);
  figures.add("server_cpu_us_per_s", serverSeconds * 1e6 / seconds);
  // The timer's own wake-up does not count. (Its CPU time is left in: compare with TwoParty's.)
  figures.add("client_wakeups_per_s", (kj::max(clientSwitches, uint64_t(1)) - 1) / seconds);
  figures.add("client_cpu_us_per_s", clientSeconds * 1e6 / seconds);
}

void pages(Session& session, Task::Reader task, Figures& figures) {
  // What a great many small calls touch of the regions.
  Lanes lanes(session);
  for (uint i = 0; i < task.getWindow(); i++) lanes.add(session.target());
  Slice slice(session, task);
  lanes.run(slice);
  slice.report(figures);
  if (session.transport.isShared()) {
    figures.add("touched_kib_per_region",
        kj::max(RegionsTouched::of(getpid()).largest,
                RegionsTouched::of(session.serverPid).largest) / 1024.0);
  }
}

}  // namespace bench
}  // namespace capnpshm
