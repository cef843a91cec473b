// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "client.h"

#include <capnp/serialize.h>
#include <kj/debug.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

Session::Session(const TransportSpec& transport, const ClientOptions& options)
    : io(kj::setupAsyncIo()), transport(transport), serverPid(options.serverPid) {
  if (transport.hasServer()) {
    address = io.provider->getNetwork().parseAddress(options.address).wait(io.waitScope);
  }
}

Session::Connection Session::connect() {
  auto link = transport.kind == TransportSpec::IN_PROCESS
      ? newInProcessLink(newTarget(noLinks))
      : newClientLink(transport, io, address->connect().wait(io.waitScope));
  auto target = link->bootstrap().castAs<Target>();
  return { kj::mv(link), kj::mv(target) };
}

Target::Client& Session::target() {
  KJ_IF_MAYBE(connection, kept) return connection->target;
  auto& connection = kept.emplace(connect());
  // The connection switches to shared memory during the first round trips.
  for (uint i = 0; i < 3; i++) echo(connection.target).wait(io.waitScope);
  requireShared(*connection.link);
  return connection.target;
}

kj::Promise<void> Session::echo(Target::Client& target) {
  auto request = target.echoRequest();
  request.setNumber(1);
  return request.send().ignoreResult();
}

void Session::requireShared(Link& link) {
  if (!transport.isShared()) return;
  auto stats = KJ_ASSERT_NONNULL(link.getStats());
  KJ_REQUIRE(stats.outgoing.transport == Transport::SHARED_MEMORY &&
             stats.incoming.transport == Transport::SHARED_MEMORY,
      "this connection does not use shared memory", stats.outgoing.plainReason,
      stats.incoming.plainReason);
}

Session::Totals Session::totals() {
  Totals result;
  auto& server = target();
  if (!transport.isShared()) return result;
  auto response = server.countersRequest().send().wait(io.waitScope);
  auto counters = response.getCounters();
  auto stats = KJ_ASSERT_NONNULL(KJ_ASSERT_NONNULL(kept).link->getStats());
  result.doorbells = stats.bellsRung + counters.getDoorbells();
  result.sleeps = stats.sleeps + counters.getSleeps();
  result.clientSharedBytes = stats.regionBytes;
  result.serverSharedBytes = counters.getSharedBytes();
  result.copiedBytes = stats.outgoing.copiedBytes + stats.incoming.copiedBytes +
      counters.getCopiedBytes();
  result.heapWaits = stats.heapWaits + counters.getHeapWaits();
  return result;
}

// =======================================================================================

void Slice::start() {
  totalsBefore = session.totals();
  if (task.getCountSystemCalls()) {
    clientSystemCalls.emplace(getpid());
    if (session.serverPid != getpid()) serverSystemCalls.emplace(session.serverPid);
  }
  client = ProcessUsage::of(getpid());
  server = ProcessUsage::of(session.serverPid);
  KJ_IF_MAYBE(counter, serverSystemCalls) serverCalls = counter->read();
  KJ_IF_MAYBE(counter, clientSystemCalls) clientCalls = counter->read();
  session.latencies.clear();
  calls = 0;
  startTime = now();
  deadline = startTime + uint64_t(task.getSeconds() * 1e9);
}

void Slice::stop() {
  seconds = (now() - startTime) * 1e-9;
  KJ_IF_MAYBE(counter, clientSystemCalls) clientCalls = counter->read() - clientCalls;
  KJ_IF_MAYBE(counter, serverSystemCalls) serverCalls = counter->read() - serverCalls;
  auto used = [](ProcessUsage after, const ProcessUsage& before) {
    after.cpuSeconds -= before.cpuSeconds;
    after.contextSwitches -= before.contextSwitches;
    after.voluntarySwitches -= before.voluntarySwitches;
    return after;
  };
  server = used(ProcessUsage::of(session.serverPid), server);
  client = used(ProcessUsage::of(getpid()), client);
  if (session.serverPid == getpid()) server = ProcessUsage();
  totalsAfter = session.totals();
}

void Slice::report(Figures& figures) {
  double perCall = 1.0 / calls;
  auto& latencies = session.latencies;
  figures.add("calls", calls);
  figures.add("seconds", seconds);
  figures.add("p50_us", latencies.percentile(0.5));
  figures.add("p90_us", latencies.percentile(0.9));
  figures.add("p99_us", latencies.percentile(0.99));
  figures.add("p999_us", latencies.percentile(0.999));
  figures.add("calls_per_s", calls / seconds);
  figures.add("cpu_us_per_call", (client.cpuSeconds + server.cpuSeconds) * 1e6 * perCall);
  figures.add("client_cpu_us_per_call", client.cpuSeconds * 1e6 * perCall);
  figures.add("server_cpu_us_per_call", server.cpuSeconds * 1e6 * perCall);
  figures.add("context_switches_per_call",
      (client.contextSwitches + server.contextSwitches) * perCall);
  if (session.transport.isShared()) {
    figures.add("doorbells_per_call",
        (totalsAfter.doorbells - totalsBefore.doorbells) * perCall);
    figures.add("sleeps_per_call", (totalsAfter.sleeps - totalsBefore.sleeps) * perCall);
    figures.add("copied_bytes_per_call",
        (totalsAfter.copiedBytes - totalsBefore.copiedBytes) * perCall);
    figures.add("heap_waits_per_call",
        (totalsAfter.heapWaits - totalsBefore.heapWaits) * perCall);
    figures.add("shared_bytes",
        kj::max(totalsBefore.clientSharedBytes + totalsBefore.serverSharedBytes,
                totalsAfter.clientSharedBytes + totalsAfter.serverSharedBytes));
  }
  KJ_IF_MAYBE(counter, clientSystemCalls) {
    bool serverPermitted = true;
    KJ_IF_MAYBE(other, serverSystemCalls) serverPermitted = other->isPermitted();
    if (counter->isPermitted() && serverPermitted) {
      figures.add("syscalls_per_call", (clientCalls + serverCalls) * perCall);
      figures.add("client_syscalls_per_call", clientCalls * perCall);
      figures.add("server_syscalls_per_call", serverCalls * perCall);
    }
  }
}

void Slice::reportRate(Figures& figures, double bytesPerCall) {
  figures.add("bytes_per_s", bytesPerCall * calls / seconds);
}

// =======================================================================================

namespace {

struct Case {
  kj::StringPtr name;
  CaseFunction* function;
};

const Case CASES[] = {
  { "small_call", &smallCall },
};

Figures runCase(Session& session, Task::Reader task) {
  Figures figures;
  for (auto& c: CASES) {
    if (task.getCase() == c.name) {
      c.function(session, task, figures);
      return figures;
    }
  }
  KJ_FAIL_REQUIRE("there is no such case", task.getCase());
}

}  // namespace

void runClient(const ClientOptions& options) {
  auto& transport = findTransport(options.transport);
  Session session(transport, options);
  kj::FdInputStream tasks(options.tasksFd);
  kj::BufferedInputStreamWrapper buffered(tasks);

  while (buffered.tryGetReadBuffer().size() > 0) {
    capnp::InputStreamMessageReader reader(buffered);
    capnp::MallocMessageBuilder message;
    auto outcome = message.initRoot<Outcome>();
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      auto figures = runCase(session, reader.getRoot<Task>());
      auto list = outcome.initFigures(figures.get().size());
      for (size_t i = 0; i < list.size(); i++) {
        list[i].setName(figures.get()[i].name);
        list[i].setValue(figures.get()[i].value);
      }
    })) {
      outcome.setError(kj::str(*exception));
    }
    capnp::writeMessageToFd(options.outcomesFd, message);
  }
}

}  // namespace bench
}  // namespace capnpshm
