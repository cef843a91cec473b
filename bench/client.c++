// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "client.h"

#include <capnp/serialize.h>
#include <kj/debug.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr uint SETUP_CALLS = SharedMemoryOptions().plainCalls + 2;

}  // namespace

Session::Session(const TransportSpec& transport, const ClientOptions& options)
    : io(kj::setupAsyncIo()), transport(transport), serverPid(options.serverPid),
      peerCore(options.peerCore) {
  if (transport.kind == TransportSpec::PEER) {
    peerAddress = kj::str(options.address);
  } else if (transport.hasServer()) {
    auto url = kj::str("unix-abstract:", options.address);
    address = io.provider->getNetwork().parseAddress(url).wait(io.waitScope);
  }
}

Session::Connection Session::connect() {
  auto link = transport.kind == TransportSpec::IN_PROCESS
      ? newInProcessLink(newTarget(noLinks))
      : newClientLink(transport, io, address->connect().wait(io.waitScope));
  auto target = link->bootstrap().castAs<Target>();
  return { kj::mv(link), kj::mv(target) };
}

void Session::setUp(Connection& connection) {
  // A connection switches to shared memory after a few calls.
  for (uint i = 0; i < SETUP_CALLS; i++) echo(connection.target).wait(io.waitScope);
  if (!transport.isShared()) return;
  auto stats = KJ_ASSERT_NONNULL(connection.link->getStats());
  KJ_REQUIRE(stats.outgoing.transport == Transport::SHARED_MEMORY &&
             stats.incoming.transport == Transport::SHARED_MEMORY,
      "this connection does not use shared memory", stats.outgoing.plainReason,
      stats.incoming.plainReason);
}

void Session::openConnections(uint count) {
  while (connections.size() < count) {
    auto connection = connect();
    setUp(connection);
    connections.push_back(kj::mv(connection));
  }
}

Target::Client& Session::targetAt(uint index) {
  openConnections(index + 1);
  return connections[index].target;
}

Peer& Session::peer() {
  if (peerClient.get() == nullptr) peerClient = newPeer(transport.name, peerAddress);
  return *peerClient;
}

kj::Promise<void> Session::echo(Target::Client& target) {
  auto request = target.echoRequest();
  request.setNumber(1);
  return request.send().ignoreResult();
}

Session::Totals Session::totals() {
  Totals result;
  if (!transport.isShared()) return result;
  auto response = target().countersRequest().send().wait(io.waitScope);
  auto counters = response.getCounters();
  result.doorbells = counters.getDoorbells();
  result.sleeps = counters.getSleeps();
  result.serverSharedBytes = counters.getSharedBytes();
  result.copiedBytes = counters.getCopiedBytes();
  result.heapWaits = counters.getHeapWaits();
  for (auto& connection: connections) {
    auto stats = KJ_ASSERT_NONNULL(connection.link->getStats());
    result.doorbells += stats.bellsRung;
    result.sleeps += stats.sleeps;
    result.clientSharedBytes += stats.regionBytes;
    result.copiedBytes += stats.outgoing.copiedBytes + stats.incoming.copiedBytes;
    result.heapWaits += stats.heapWaits;
  }
  return result;
}

// =======================================================================================

void Slice::start() {
  totalsBefore = session.totals();
  contextSwitches = countContextSwitches();
  if (task.getCountSystemCalls()) startCounting();
  // Nothing that takes long lies between the CPU clocks and the calls.
  session.latencies.clear();
  calls = 0;
  if (hasServer()) serverSeconds = cpuSecondsOf(session.serverPid);
  clientSeconds = cpuSecondsOf(getpid());
  startTime = now();
  deadline = startTime + uint64_t(task.getSeconds() * 1e9);
}

void Slice::startCounting() {
  clientSystemCalls.emplace(getpid());
  if (hasServer()) serverSystemCalls.emplace(session.serverPid);
  isCounted = KJ_ASSERT_NONNULL(clientSystemCalls).isPermitted();
  KJ_IF_MAYBE(counter, serverSystemCalls) isCounted = isCounted && counter->isPermitted();
  if (isCounted) {
    KJ_IF_MAYBE(counter, serverSystemCalls) serverCalls = counter->read();
    KJ_IF_MAYBE(counter, clientSystemCalls) clientCalls = counter->read();
    return;
  }

  if (session.transport.kind == TransportSpec::PEER) return;  // Other libraries have threads.

  if (hasServer()) {
    auto request = session.target().trapSystemCallsRequest();
    request.setOn(true);
    if (!request.send().wait(session.waitScope()).getPermitted()) return;
  }
  clientTrap = kj::heap<SystemCallTrap>();
  isCounted = isTrapped = clientTrap->isPermitted();
}

void Slice::stopCounting() {
  if (isTrapped) {
    clientCalls = clientTrap->getCount();
    clientTrap = nullptr;
    if (!hasServer()) return;
    auto response = session.target().trapSystemCallsRequest().send().wait(session.waitScope());
    serverCalls = response.getCount();
  } else {
    KJ_IF_MAYBE(counter, clientSystemCalls) clientCalls = counter->read() - clientCalls;
    KJ_IF_MAYBE(counter, serverSystemCalls) serverCalls = counter->read() - serverCalls;
  }
}

void Slice::stop() {
  if (isCounted) stopCounting();
  seconds = (now() - startTime) * 1e-9;
  clientSeconds = cpuSecondsOf(getpid()) - clientSeconds;
  if (hasServer()) serverSeconds = cpuSecondsOf(session.serverPid) - serverSeconds;
  contextSwitches = countContextSwitches() - contextSwitches;
  totalsAfter = session.totals();
}

void Slice::reportLatencies(Figures& figures) {
  auto& latencies = session.latencies;
  figures.add("calls", calls);
  figures.add("seconds", seconds);
  figures.add("p50_us", latencies.percentile(0.5));
  figures.add("p90_us", latencies.percentile(0.9));
  // A percentile needs some calls beyond it.
  if (calls >= 100) figures.add("p99_us", latencies.percentile(0.99));
  if (calls >= 1000) figures.add("p999_us", latencies.percentile(0.999));
}

void Slice::report(Figures& figures) {
  reportLatencies(figures);
  double perCall = 1.0 / calls;
  figures.add("calls_per_s", calls / seconds);
  figures.add("cpu_us_per_call", (clientSeconds + serverSeconds) * 1e6 * perCall);
  figures.add("client_cpu_us_per_call", clientSeconds * 1e6 * perCall);
  figures.add("server_cpu_us_per_call", serverSeconds * 1e6 * perCall);
  figures.add("context_switches_per_call", contextSwitches * perCall);
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
  if (isCounted) {
    figures.add("syscalls_per_call", (clientCalls + serverCalls) * perCall);
    figures.add("client_syscalls_per_call", clientCalls * perCall);
    figures.add("server_syscalls_per_call", serverCalls * perCall);
    figures.add("syscalls_trapped", isTrapped);
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
  { "one_core", &smallCall },
  { "unpinned", &smallCall },
  { "loaded", &smallCall },
  { "idle_gap", &idleGap },
  { "window", &window },
  { "param", &param },
  { "param_rw", &param },
  { "first_param_rw", &firstParam },
  { "second_param_rw", &firstParam },
  { "result", &result },
  { "result_rw", &result },
  { "stream", &stream },
  { "stream_rw", &stream },
  { "held", &held },
  { "beside_busy", &besideBusy },
  { "connections", &connections },
  { "connections_busy", &connectionsBusy },
  { "connect", &connectTime },
  { "connect_busy", &connectBesideBusy },
  { "memory", &idleMemory },
  { "idle", &idle },
  { "pages", &pages },
  { "raw", &rawLimit },
};

Figures runCase(Session& session, Task::Reader task) {
  Figures figures;
  if (session.transport.kind == TransportSpec::PEER) {
    peerCall(session, task, figures);
    return figures;
  }
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
      outcome.setError(exception->getDescription());
    }
    capnp::writeMessageToFd(options.outcomesFd, message);
  }
}

}  // namespace bench
}  // namespace capnpshm
