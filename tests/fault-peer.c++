// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The process that is killed or disturbed. Compiled together with the library's sources, so that
// these have their fault points, at each of which it can die.
//
// Whatever its role, it stops at a gate before it does anything about its connection, where the
// test may begin to trace it.

#include "fault-workload.h"
#include "peer-program.h"

#include <dlfcn.h>
#include <map>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <utility>

namespace capnpshm {

namespace process {
namespace {

using Place = std::pair<std::string, unsigned>;

struct FaultPoints {
  // Where to die, and what was passed.

  uint64_t killStep = 0;  // The number of the fault point, from 1; or 0.
  std::string killFile;
  unsigned killLine = 0;
  bool recording = false;
  uint64_t steps = 0;
  std::map<Place, uint64_t> passed;
};

FaultPoints* faultPoints = nullptr;  // Null before the gate.

}  // namespace
}  // namespace process

void faultPoint(const char* file, unsigned line) {
  using namespace process;
  if (faultPoints == nullptr) return;
  auto& f = *faultPoints;
  progress()[FAULT_STEPS].store(++f.steps, std::memory_order_relaxed);
  const char* slash = strrchr(file, '/');
  const char* name = slash == nullptr ? file : slash + 1;
  if (f.recording) ++f.passed[Place(name, line)];
  if (f.steps == f.killStep || (line == f.killLine && f.killFile == name)) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
}

namespace process {
namespace {

using conformance::End;
using conformance::LinkOptions;
using conformance::Root;
using conformance::RootImpl;
using conformance::ServerState;
using kj::uint;

constexpr uint MAX_FDS = 4;

void passGate() {
  progress();  // So that no mapping is made for it later.
  report("at the gate");
  awaitProceed();
  auto points = new FaultPoints();  // Until the process ends.
  points->killStep = numberOf("killStep");
  auto place = argument("killPlace");
  auto colon = place.find(':');
  if (colon != std::string::npos) {
    points->killFile = place.substr(0, colon);
    points->killLine = strtoul(place.c_str() + colon + 1, nullptr, 10);
  }
  points->recording = isSet("record");
  faultPoints = points;
}

kj::String describe(kj::Maybe<SharedMemoryStats> maybeStats) {
  auto& stats = KJ_ASSERT_NONNULL(maybeStats);
  return kj::str(int(stats.outgoing.transport), ' ', int(stats.incoming.transport), ' ',
      stats.outgoing.plainReason);
}

class Peer {
  // One end of a connection.

public:
  Peer(kj::AsyncIoContext& io, Side side, int socket): io(io) {
    EndMode mode { EndMode::CONTEXT, side, isSet("trust"), isSet("port"), isSet("small"), false,
                   !isSet("noSpin") };
    LinkOptions options;
    options.maxFds = MAX_FDS;
    end = kj::heap<End>(mode, io.unixEventPort, wrapSocket(io, kj::AutoCloseFd(socket)), options);
    end->expectNothing();
  }

  void pause() { io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope); }

  void flush() {
    while (end->network.getCurrentQueueCount() > 0) pause();
  }

  SharedMemoryStats stats() { return KJ_ASSERT_NONNULL(end->network.getStats()); }

  kj::AsyncIoContext& io;
  kj::Own<End> end;
};

void reportEnd() {
  auto points = faultPoints;
  if (points == nullptr || !points->recording) return;
  faultPoints = nullptr;
  kj::Vector<kj::String> places;
  for (auto& entry: points->passed) {
    places.add(kj::str(entry.first.first.c_str(), ':', entry.first.second, '=', entry.second));
  }
  report(kj::str("places: ", kj::strArray(places, " ")));
}

int serve() {
  // A server of the conformance suite on either side of the connection, which at the same time
  // waits for an answer of the peer's. If there is a second connection, a server there too.
  auto io = kj::setupAsyncIo();
  ServerState state;
  auto before = resourcesOf();
  --before.fds;  // The socket.
  kj::Own<Peer> steady;
  if (isSet("steady")) {
    --before.fds;
    steady = kj::heap<Peer>(io, Side::SERVER, SOCKET_FD + 1);
    steady->end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    // Until it needs nothing more that could be denied.
    while (state.calls < numberOf("steadyCalls")) steady->pause();
    for (uint i = 0; i < 3; i++) steady->pause();
  }
  passGate();

  kj::String transport;
  kj::String failure;
  {
    Peer peer(io, argument("side") == "client" ? Side::CLIENT : Side::SERVER, SOCKET_FD);
    peer.end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    auto watch = [&]() {
      return peer.end->root().slowRequest().send().ignoreResult()
          .eagerlyEvaluate([&](kj::Exception&& exception) {
        failure = kj::str(int(exception.getType()), ' ', exception.getDescription());
      });
    };
    kj::Promise<void> watching = nullptr;
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { watching = watch(); })) {
      failure = kj::str(int(exception->getType()), " thrown: ", exception->getDescription());
    }
    peer.end->network.onDisconnect().wait(io.waitScope);
    for (uint i = 0; i < 1000 && failure == nullptr; i++) peer.pause();
    transport = describe(peer.stats());
  }
  report(transport);
  report(failure);
  if (steady.get() != nullptr) {
    steady->end->network.onDisconnect().wait(io.waitScope);
    steady = nullptr;
  }
  // All are counted when none is left, since the steady one may have come to more of them meanwhile
  // (sockets for its bells, say).
  for (uint i = 0; i < 1000 && resourcesOf().fds > before.fds; i++) {
    io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
  }
  auto after = resourcesOf();
  report(kj::str(int64_t(after.fds - before.fds), " fds ",
      int64_t(after.regions - before.regions), " regions"));
  reportEnd();
  return 0;
}

void exerciseRarely(Root::Client& root, kj::WaitScope& waitScope) {
  // A message of too many segments for a descriptor, which lie elsewhere; and then so many small
  // ones that regions are retired.
  auto request = root.partsRequest();
  auto parts = request.initParts(30);
  auto data = kj::heapArray<capnp::word>(100);
  memset(data.asBytes().begin(), 1, data.asBytes().size());
  for (uint i = 0; i < parts.size(); i++) {
    parts.adopt(i, capnp::Orphanage::getForMessageContaining(parts)
        .referenceExternalData(capnp::Data::Reader(data.asBytes())));
  }
  request.send().ignoreResult().wait(waitScope);

  for (uint i = 0; i < 100; i++) {
    kj::Vector<kj::Promise<void>> calls;
    for (uint j = 0; j < 50; j++) calls.add(root.addRequest().send().ignoreResult());
    kj::joinPromises(calls.releaseAsArray()).wait(waitScope);
  }
}

int call() {
  // A client that makes calls of all kinds and leaves.
  auto io = kj::setupAsyncIo();
  ServerState mine;
  passGate();
  {
    Peer peer(io, Side::CLIENT, SOCKET_FD);
    peer.end->start(nullptr);
    auto root = peer.end->root();
    WorkloadSize size;
    size.largeBytes = 60000;
    for (auto phase: { Phase::SET_UP, Phase::GROWTH, Phase::STEADY }) {
      exercise(root, mine, phase, size, [&](auto promise) { return promise.wait(io.waitScope); });
    }
    if (isSet("rare")) exerciseRarely(root, io.waitScope);
  }
  reportEnd();
  return 0;
}

kj::Promise<void> receiveAll(Connection& connection, uint64_t& count) {
  return connection.receiveIncomingMessage().then(
      [&connection, &count](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message)
          -> kj::Promise<void> {
    KJ_IF_MAYBE(m, message) {
      KJ_REQUIRE(readNumbered(**m) == count, "out of order");
      ++count;
      return receiveAll(connection, count);
    }
    return kj::READY_NOW;
  });
}

int send() {
  // Sends numbered messages and receives others; tells exactly which of its own must arrive.
  auto io = kj::setupAsyncIo();
  passGate();
  {
    Peer peer(io, Side::CLIENT, SOCKET_FD);
    auto connection = peer.end->connect();
    uint64_t received = 0;
    progress()[BEGUN].store(1);
    sendNumbered(*connection, 0, 100);
    auto receiving = receiveAll(*connection, received).eagerlyEvaluate(nullptr);
    while (peer.stats().outgoing.transport == Transport::STARTING || received == 0) peer.pause();
    peer.flush();

    uint64_t count = numberOf("count");
    for (uint64_t i = 1; i <= count; i++) {
      progress()[BEGUN].store(i + 1);
      sendNumbered(*connection, i, numberedBytes(i));
      // The rare case: that some still wait for room when the connection is shut down.
      if (i % 8 == 0 && !(isSet("rare") && i > count / 2)) io.waitScope.poll();
      auto outgoing = peer.stats().outgoing;
      if (outgoing.transport == Transport::SHARED_MEMORY) {
        progress()[PUBLISHED].store(
            outgoing.inlineMessages + outgoing.referencedMessages + outgoing.socketMessages);
      }
    }
    // With messages that wait, if memory is short.
    connection->shutdown().wait(io.waitScope);
    progress()[PUBLISHED].store(count + 1);
    receiving.wait(io.waitScope);
  }
  reportEnd();
  return 0;
}

int run(const std::string& role) {
  if (role == "serve") return serve();
  if (role == "call") return call();
  if (role == "send") return send();
  KJ_FAIL_REQUIRE("unknown role", role.c_str());
}

}  // namespace
}  // namespace process
}  // namespace capnpshm

extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  // For all of this process, so that the test can make its clocks jump.
  static int (*const real)(clockid_t, timespec*) =
      reinterpret_cast<int (*)(clockid_t, timespec*)>(dlsym(RTLD_NEXT, "clock_gettime"));
  using namespace capnpshm::process;
  int result = real(clock, time);
  if (result == 0 && faultPoints != nullptr) {
    bool isRealtime = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
    time->tv_sec += int64_t(progress()[isRealtime ? REALTIME_JUMP : MONOTONIC_JUMP].load(
        std::memory_order_relaxed));
  }
  return result;
}

extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() {
  // LeakSanitizer cannot work in a process that is traced.
  return "detect_leaks=0";
}

int main(int argc, char** argv) {
  return capnpshm::process::runProgram(argc, argv, &capnpshm::process::run);
}
