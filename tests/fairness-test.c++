// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

#include <algorithm>
#include <atomic>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// While one connection is never quiet, everybody else on the same event loop goes on: a timer,
// calls from other threads, a plain connection, and a hundred more in shared memory. And
// connections that are all busy, or one that sleeps beside one that is, are served alike.

namespace capnpshm {
namespace conformance {
namespace {

constexpr uint OTHERS = 100;
constexpr uint ENOUGH = SLOW ? 3 : 10;
// What each of the others shall have done while the busy connection is busy.

constexpr uint64_t TOO_MANY = 100000;
// Calls after which the busy connection gives up: many times what it makes until the others have
// done enough. Counted instead of time, since it is for the loop to share, not to be fast.

constexpr uint BACKLOG = 2000;
// Messages that always wait for us in a flood.

enum class Load {
  PING_PONG,      // The busy peer calls us, one call after the other.
  FLOOD,          // It sends messages faster than we can take them.
  BULK,           // It has several calls with much data under way.
  WE_PING_PONG    // We call it, one call after the other.
};

struct Case {
  Mode mode;
  Load load;
};

std::vector<Mode> sharedModes() {
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    for (auto name: { "Untrusted", "DropIn", "TrustedPort", "TrustedNoPort" }) {
      if (strcmp(mode.name, name) == 0) result.push_back(mode);
    }
  }
  return result;
}

std::vector<Case> allCases() {
  std::vector<Case> result;
  for (auto& mode: sharedModes()) {
    for (auto load: { Load::PING_PONG, Load::FLOOD, Load::BULK, Load::WE_PING_PONG }) {
      result.push_back({ mode, load });
    }
  }
  return result;
}

std::string caseName(const testing::TestParamInfo<Case>& info) {
  const char* loads[] = { "PingPong", "Flood", "Bulk", "WePingPong" };
  return std::string(info.param.mode.name) + loads[int(info.param.load)];
}

void PrintTo(const Case& c, std::ostream* out) { *out << c.mode.name; }

constexpr uint TAKE = kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP |
    kj::LowLevelAsyncIoProvider::ALREADY_CLOEXEC;

struct Sockets {
  Sockets() {
    int fds[2];
    KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    here = fds[0];
    there = fds[1];
  }
  int here, there;
};

kj::Own<End> newEnd(const EndMode& mode, kj::AsyncIoContext& io, int fd) {
  return kj::heap<End>(mode, io.unixEventPort,
      io.lowLevelProvider->wrapUnixSocketFd(fd, TAKE), LinkOptions());
}

class Servers {
  // Of some connections, on an event loop of this thread's.

public:
  Servers(): io(kj::setupAsyncIo()) {}

  void add(const EndMode& mode, Sockets& sockets) {
    ends.add(newEnd(mode, io, sockets.there));
    ends.back()->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    disconnects.add(ends.back()->network.onDisconnect());
  }

  void run() {
    // Until all clients have left.
    kj::joinPromises(disconnects.releaseAsArray()).wait(io.waitScope);
  }

private:
  kj::AsyncIoContext io;
  ServerState state;
  kj::Vector<kj::Own<End>> ends;
  kj::Vector<kj::Promise<void>> disconnects;
};

struct Busy {
  // The thread of the busy connection's other end.

  const Case& test;
  Sockets sockets;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> calls{0};
  kj::Own<kj::CrossThreadPromiseFulfiller<void>> tooMany;

  explicit Busy(const Case& test): test(test) {}

  kj::Promise<void> callOn(Root::Client root, size_t bytes) {
    if (stop) return kj::READY_NOW;
    count();
    auto request = root.echoRequest();
    request.initData(bytes);
    return request.send().ignoreResult().then(
        [this, root, bytes]() mutable { return callOn(kj::mv(root), bytes); });
  }

  kj::Promise<void> flood(kj::Timer& timer, End& end, Connection& connection) {
    if (stop) return connection.shutdown();
    auto again = [this, &timer, &end, &connection]() { return flood(timer, end, connection); };
    if (end.network.getCurrentQueueCount() > BACKLOG) {
      // Always ahead of the receiver, but not without bounds.
      return timer.afterDelay(200 * kj::MICROSECONDS).then(kj::mv(again));
    }
    for (uint i = 0; i < 50; i++) {
      auto message = connection.newOutgoingMessage(0);
      message->getBody().initAs<capnp::rpc::Message>().initFinish().setQuestionId(i);
      message->send();
      count();
    }
    return kj::evalLast(kj::mv(again));
  }

  void count() {
    if (++calls == TOO_MANY) {
      stop = true;
      tooMany->fulfill();
    }
  }

  void run() {
    auto io = kj::setupAsyncIo();
    ServerState state;
    if (test.load == Load::FLOOD) {
      auto end = newEnd(test.mode.client, io, sockets.there);
      auto connection = end->connect();
      // Nothing comes but what sets up the shared memory, and the end.
      auto listening = connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
      auto stats = [&]() { return KJ_ASSERT_NONNULL(end->network.getStats()); };
      while (stats().incoming.transport == Transport::STARTING) {
        io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
      }
      flood(io.provider->getTimer(), *end, *connection).wait(io.waitScope);
      listening.wait(io.waitScope);
      end->expectTransport(test.mode.expected);
      // And all of it went there.
      EXPECT_EQ(0, stats().outgoing.socketMessages);
    } else if (test.load == Load::WE_PING_PONG) {
      auto end = newEnd(test.mode.server, io, sockets.there);
      end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
      end->network.onDisconnect().wait(io.waitScope);
      end->expectNothing();
    } else {
      auto end = newEnd(test.mode.client, io, sockets.there);
      end->start(nullptr);
      kj::Vector<kj::Promise<void>> loops;
      for (uint i = 0; i < (test.load == Load::BULK ? 8 : 1); i++) {
        loops.add(callOn(end->root(), test.load == Load::BULK ? 100000 : 8));
      }
      kj::joinPromises(loops.releaseAsArray()).wait(io.waitScope);
      end->expectTransport(test.mode.expected);
    }
  }
};

class Fairness: public testing::TestWithParam<Case> {
protected:
  Fairness(): io(kj::setupAsyncIo()) {}
  ~Fairness() noexcept override {}

  kj::AsyncIoContext io;
};

INSTANTIATE_TEST_SUITE_P(Cases, Fairness, testing::ValuesIn(allCases()), caseName);

struct Progress {
  // What the others have done.

  const Busy& busy;
  kj::Own<kj::PromiseFulfiller<void>> fulfiller;
  uint ticks = 0, executed = 0;
  uint calls[OTHERS + 1] = {};  // Those of the plain connection first.
  bool enough = false;

  explicit Progress(const Busy& busy): busy(busy) {}

  void step(uint& count) {
    ++count;
    if (enough || ticks < ENOUGH || executed < ENOUGH) return;
    for (uint n: calls) {
      if (n < ENOUGH) return;
    }
    // And it was busy: the others did not just come first.
    if (busy.calls < (SLOW ? 200 : 1000)) return;
    enough = true;
    fulfiller->fulfill();
  }

  kj::Promise<void> tick(kj::Timer& timer) {
    if (enough || busy.stop) return kj::READY_NOW;
    return timer.afterDelay(1 * kj::MILLISECONDS).then([this, &timer]() {
      step(ticks);
      return tick(timer);
    });
  }

  kj::Promise<void> call(kj::Timer& timer, Root::Client root, uint& count) {
    // One call after the other, with pauses, in which the busy connection has the loop for itself.
    if (enough || busy.stop) return kj::READY_NOW;
    return root.sequenceRequest().send().ignoreResult().then([this, &timer, &count]() {
      step(count);
      return timer.afterDelay(1 * kj::MILLISECONDS);
    }).then([this, &timer, root, &count]() mutable {
      return call(timer, kj::mv(root), count);
    });
  }
};

kj::Promise<void> drain(Connection& connection) {
  // Takes whatever comes, and has some work with it, so that there is always more.
  return connection.receiveIncomingMessage().then(
      [&connection](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) -> kj::Promise<void> {
    if (message == nullptr) return kj::READY_NOW;
    for (uint i = 0; i < 30000; i++) asm volatile("");
    return drain(connection);
  });
}

TEST_P(Fairness, OthersGoOnWhileOneConnectionIsNeverQuiet) {
  auto& mode = GetParam().mode;
  EndMode plain { EndMode::TWO_PARTY, Side::CLIENT };
  EndMode plainServer { EndMode::TWO_PARTY, Side::SERVER };

  // The others' peers, all on a loop of their own.
  Sockets plainSockets, otherSockets[OTHERS];
  kj::Thread peers([&]() {
    Servers servers;
    servers.add(plainServer, plainSockets);
    for (auto& sockets: otherSockets) servers.add(mode.server, sockets);
    servers.run();
  });

  // All connections are set up, each at rest, before it begins.
  kj::Vector<kj::Own<End>> ends;
  KJ_DEFER(ends.clear());  // Or the thread would not end.
  ends.add(newEnd(plain, io, plainSockets.here));
  for (auto& sockets: otherSockets) ends.add(newEnd(mode.client, io, sockets.here));
  kj::Vector<Root::Client> roots;
  for (auto& end: ends) {
    end->start(nullptr);
    roots.add(end->root());
    for (uint i = 0; i < SHARING_CALLS; i++) {
      roots.back().sequenceRequest().send().wait(io.waitScope);
    }
  }
  for (size_t i = 1; i < ends.size(); i++) ends[i]->expectTransport(mode.expected);

  Busy busy(GetParam());
  ServerState state;
  auto busyEnd = newEnd(
      busy.test.load == Load::WE_PING_PONG ? mode.client : mode.server, io, busy.sockets.here);
  kj::Own<Connection> flooded;
  if (busy.test.load == Load::WE_PING_PONG) {
    busyEnd->start(nullptr);
  } else if (busy.test.load == Load::FLOOD) {
    flooded = busyEnd->network.get().accept().wait(io.waitScope);
  } else {
    busyEnd->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
  }
  busyEnd->expectNothing();

  auto over = kj::newPromiseAndFulfiller<void>();
  auto tooMany = kj::newPromiseAndCrossThreadFulfiller<void>();
  auto callerEnded = kj::newPromiseAndCrossThreadFulfiller<void>();
  busy.tooMany = kj::mv(tooMany.fulfiller);
  Progress progress(busy);
  progress.fulfiller = kj::mv(over.fulfiller);

  auto& executor = kj::getCurrentThreadExecutor();
  kj::Thread busyThread([&]() { busy.run(); });
  kj::Thread caller([&]() {
    while (!busy.stop) {
      executor.executeSync([&]() { progress.step(progress.executed); });
      usleep(1000);  // A pause, as above.
    }
    callerEnded.fulfiller->fulfill();
  });

  kj::Vector<kj::Promise<void>> work;
  if (busy.test.load == Load::WE_PING_PONG) {
    work.add(busy.callOn(busyEnd->root(), 8).eagerlyEvaluate(nullptr));
  } else if (busy.test.load == Load::FLOOD) {
    // The setting up, then a backlog that lasts.
    flooded->receiveIncomingMessage().wait(io.waitScope);
    flooded->receiveIncomingMessage().wait(io.waitScope);
    while (busy.calls < BACKLOG) usleep(100);
    work.add(drain(*flooded).eagerlyEvaluate(nullptr));
  }
  auto& timer = io.provider->getTimer();
  work.add(progress.tick(timer).eagerlyEvaluate(nullptr));
  for (uint i = 0; i <= OTHERS; i++) {
    work.add(progress.call(timer, roots[i], progress.calls[i]).eagerlyEvaluate(nullptr));
  }
  over.promise.exclusiveJoin(kj::mv(tooMany.promise)).wait(io.waitScope);

  EXPECT_TRUE(progress.enough) << "the others starved";
  EXPECT_GE(progress.ticks, ENOUGH) << "timer";
  EXPECT_GE(progress.executed, ENOUGH) << "executor";
  EXPECT_GE(progress.calls[0], ENOUGH) << "plain connection";
  for (uint i = 1; i <= OTHERS; i++) EXPECT_GE(progress.calls[i], ENOUGH) << "connection " << i;

  busy.stop = true;
  kj::joinPromises(work.releaseAsArray()).wait(io.waitScope);
  callerEnded.promise.wait(io.waitScope);
  if (busy.test.load == Load::WE_PING_PONG) {
    busyEnd->expectTransport(mode.expected);
    busyEnd = nullptr;
  } else if (busy.test.load == Load::FLOOD) {
    flooded->shutdown().wait(io.waitScope);
    flooded = nullptr;
    busyEnd = nullptr;
  } else {
    busyEnd->network.onDisconnect().wait(io.waitScope);
  }
}

// =======================================================================================
// Shares

class EqualShares: public testing::TestWithParam<Mode> {
  // Some connections between this loop and that of a server thread.

protected:
  EqualShares(): io(kj::setupAsyncIo()) {}
  ~EqualShares() noexcept override {}

  void connect(uint count, uint later = 0) {
    // There is a server for some others, to be started later, too.
    for (uint i = 0; i < count + later; i++) sockets.add();
    thread = kj::heap<kj::Thread>([this]() {
      Servers servers;
      for (auto& pair: sockets) servers.add(GetParam().server, pair);
      servers.run();
    });
    for (uint i = 0; i < count; i++) {
      auto& root = start(i);
      for (uint j = 0; j < SHARING_CALLS; j++) root.sequenceRequest().send().wait(io.waitScope);
      ends.back()->expectTransport(Transport::SHARED_MEMORY);
    }
    calls = kj::heapArray<uint64_t>(count);
    for (auto& n: calls) n = 0;
  }

  Root::Client& start(uint connection) {
    ends.add(newEnd(GetParam().client, io, sockets[connection].here));
    ends.back()->start(nullptr);
    return roots.add(ends.back()->root());
  }

  kj::Promise<void> callOn(uint connection) {
    // One call after the other, and counts them.
    if (stop) return kj::READY_NOW;
    return roots[connection].sequenceRequest().send().ignoreResult().then([this, connection]() {
      ++calls[connection];
      if (++total == enough) stop = true;
      return callOn(connection);
    });
  }

  kj::AsyncIoContext io;
  kj::Vector<Sockets> sockets;
  kj::Own<kj::Thread> thread;
  kj::Vector<kj::Own<End>> ends;
  kj::Vector<Root::Client> roots;
  kj::Array<uint64_t> calls;
  uint64_t total = 0, enough = kj::maxValue;
  bool stop = false;
};

INSTANTIATE_TEST_SUITE_P(Modes, EqualShares, testing::ValuesIn(sharedModes()), modeName);

TEST_P(EqualShares, ForManyThatAreBusy) {
  // With one call in flight each. Those that happen to be awake must not have it all.
  constexpr uint COUNT = 40;
  connect(COUNT);
  enough = COUNT * (SLOW ? 50 : 300);
  kj::Vector<kj::Promise<void>> work;
  for (uint i = 0; i < COUNT; i++) work.add(callOn(i));
  kj::joinPromises(work.releaseAsArray()).wait(io.waitScope);
  for (uint i = 0; i < COUNT; i++) EXPECT_GE(calls[i], enough / COUNT / 2) << i;
}

TEST_P(EqualShares, ForOneThatSleepsBesideABusyOne) {
  // What counts is how many calls the busy one makes meanwhile.
  connect(2);
  auto busy = callOn(1).eagerlyEvaluate(nullptr);
  std::vector<uint64_t> between;
  auto& timer = io.provider->getTimer();
  for (uint i = 0; i < (SLOW ? 5 : 51); i++) {
    // Long enough for both ends of this one to go to sleep, which takes 4096 turns.
    uint64_t before = calls[1];
    while (calls[1] < before + 4500) timer.afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
    before = calls[1];
    roots[0].sequenceRequest().send().wait(io.waitScope);
    between.push_back(calls[1] - before);
  }
  stop = true;
  busy.wait(io.waitScope);
  std::sort(between.begin(), between.end());
  EXPECT_LE(between[between.size() / 2], 50u);
}

TEST_P(EqualShares, ForANewOneBesideABusyOne) {
  // Whose first calls go over its socket, which the port tells of: all of these if it is made as
  // usual.
  connect(1, 1);
  auto busy = callOn(0).eagerlyEvaluate(nullptr);
  auto& root = start(1);
  std::vector<uint64_t> between;
  for (uint i = 0; i < 21; i++) {
    uint64_t before = calls[0];
    root.sequenceRequest().send().wait(io.waitScope);
    between.push_back(calls[0] - before);
  }
  stop = true;
  busy.wait(io.waitScope);
  std::sort(between.begin(), between.end());
  EXPECT_LE(between[between.size() / 2], 50u);
}

class FloodTurns: public RawConformance {};

INSTANTIATE_TEST_SUITE_P(Modes, FloodTurns, testing::ValuesIn(sharedModes()), modeName);

TEST_P(FloodTurns, LeaveOthersTheirs) {
  // However much of one connection is there to be taken.
  constexpr uint BURST = 100;
  constexpr uint A_TURN = 64;
  auto flood = connectRaw(), other = connectRaw();
  settle(*flood);
  settle(*other);
  uint taken = 0;
  kj::Function<void()> onTaken = []() {};
  kj::Function<kj::Promise<void>()> drain = [&]() -> kj::Promise<void> {
    if (taken == BURST) return kj::READY_NOW;
    return flood->server->receiveIncomingMessage().then([&](kj::Maybe<Incoming>&& message) {
      KJ_ASSERT(message != nullptr);
      ++taken;
      onTaken();
      return drain();
    });
  };
  auto fill = [&]() {
    taken = 0;
    for (uint i = 0; i < BURST; i++) sendMessage(*flood->client, i, 8);
  };
  for (uint i = 0; i < 10; i++) {
    // Until all of it finds room in shared memory at once.
    fill();
    await(drain());
  }
  auto heapWaits = [&]() {
    return KJ_ASSERT_NONNULL(flood->link.client->network.getStats()).heapWaits;
  };
  auto before = heapWaits();
  fill();
  ASSERT_EQ(before, heapWaits());

  uint foundAt = 0;
  auto received = receive(*other->server).then([&](kj::Maybe<Incoming>&&) {
    foundAt = taken;
  }).eagerlyEvaluate(nullptr);
  onTaken = [&]() {
    if (taken == 10) sendMessage(*other->client, 1, 8);
  };
  await(drain());
  await(kj::mv(received));
  EXPECT_GE(foundAt, 10u);
  EXPECT_LE(foundAt, 10 + A_TURN + 1);
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
