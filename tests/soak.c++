// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The driver of the load test. `soak [--seconds N] [--connections N] [--seed N]`; prints what it
// did, and fails if a reply was wrong, or something grew that should not.

#include "soak.h"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

namespace capnpshm {
namespace soak {
namespace {

using process::PeerProcess;
using process::Resources;
using process::resourcesOf;

constexpr char PROGRAM[] = "/proc/self/exe";
constexpr uint WARM_UP_ROUNDS = 2;

struct Parameters {
  uint seconds = 600;
  uint connections = 1000;
  uint64_t seed = 1;
};

size_t residentBytes(pid_t pid) {
  std::ifstream file(kj::str("/proc/", pid == 0 ? getpid() : pid, "/statm").cStr());
  size_t size, resident;
  KJ_REQUIRE(bool(file >> size >> resident), "cannot read how much memory a process has");
  return resident * sysconf(_SC_PAGESIZE);
}

bool raiseFileLimit(uint connections) {
  // Two sockets a connection where both ends are in one process, and regions on their way.
  rlimit limit;
  KJ_SYSCALL(getrlimit(RLIMIT_NOFILE, &limit));
  rlim_t wanted = 4 * connections + 200;
  if (limit.rlim_cur >= wanted) return true;
  limit.rlim_cur = wanted;
  limit.rlim_max = std::max(limit.rlim_max, wanted);
  if (setrlimit(RLIMIT_NOFILE, &limit) == 0) return true;
  std::cout << "soak: cannot raise the limit of open files to " << wanted << " for " << connections
            << " connections: " << strerror(errno) << std::endl;
  return false;
}

struct Sample {
  Resources server;
  Resources driver;
  size_t serverBytes;
  size_t driverBytes;
};

class Driver {
public:
  explicit Driver(const Parameters& parameters)
      : parameters(parameters), io(kj::setupAsyncIo()), handover(process::newSocketPair()),
        server(startServer()), clients(io, handover.mine, parameters.seed) {
    KJ_REQUIRE(server->line() == "ready");
  }

  bool run() {
    uint rounds = std::max(6u, std::min(10u, parameters.seconds / 20));
    auto before = quiet();
    std::vector<Sample> samples;
    for (uint round = 0; round < rounds; round++) {
      auto middle = this->round(parameters.seconds * 1000 / rounds, round % 2 == 1);
      samples.push_back(quiet());
      print(round, middle, samples.back());
      KJ_IF_MAYBE(exception, clients.failure) {
        std::cout << kj::str(*exception).cStr() << std::endl;
        return expect(false, "a client failed");
      }
    }

    auto& last = samples.back();
    for (auto& sample: samples) {
      expect(sample.server == before.server, "the server holds fds or regions after a round");
      expect(sample.driver == before.driver, "the clients hold fds or regions after a round");
    }
    // In the first rounds the allocator learns how much is needed; after them the second half must
    // not need more than the first did, but for what fragmentation makes of it.
    if (SLOW) {
      std::cout
          << "soak: resident memory is not compared, since a sanitizer keeps what was freed\n";
    } else {
      size_t server = 0, driver = 0;
      for (uint i = WARM_UP_ROUNDS; i < std::max(WARM_UP_ROUNDS + 1, rounds / 2); i++) {
        server = std::max(server, samples[i].serverBytes);
        driver = std::max(driver, samples[i].driverBytes);
      }
      auto allowed = [](size_t bytes) { return bytes + bytes / 20 + (2 << 20); };
      expect(last.serverBytes <= allowed(server), "the server's memory grows");
      expect(last.driverBytes <= allowed(driver), "the clients' memory grows");
    }
    auto largestQueue = server->getProgress(LARGEST_QUEUE);
    expect(largestQueue <= QUEUE_LIMIT, "a connection's queue is longer than all that was asked");
    expect(server->getProgress(LARGEST_SHARE) <= MAX_BYTES,
        "the server made more shared memory for a connection than it may");
    expect(server->getProgress(HEAP_WAITS) > 0, "no client was slow enough");
    expect(slowCalls > 0, "the slow clients did nothing");

    auto& counts = clients.getCounts();
    auto accepted = server->getProgress(ACCEPTED);
    handover.mine = nullptr;
    expect(server->wait() == 0, "the server ended badly");
    std::cout << "soak: " << parameters.seconds << " s, " << parameters.connections
              << " connections at a time, " << accepted << " in all, " << counts.calls + slowCalls
              << " replies checked (" << slowCalls << " of slow clients), "
              << (counts.bytes + slowCalls * SLOW_BYTES) / 1000000 << " MB, " << counts.abandoned
              << " calls cut off; longest queue " << largestQueue << " bytes, "
              << server->getProgress(HEAP_WAITS) << " messages waited for room, "
              << server->getProgress(NOT_SHARED) << " connections ended plain\n"
              << (good ? "soak: passed" : "soak: FAILED") << std::endl;
    return good;
  }

private:
  const Parameters& parameters;
  kj::AsyncIoContext io;
  process::SocketPair handover;
  kj::Own<PeerProcess> server;
  Clients clients;
  uint64_t slowCalls = 0;
  bool good = true;

  kj::Own<PeerProcess> startServer() {
    int socket = handover.peers;
    auto result = kj::heap<PeerProcess>(
        kj::arrayPtr(&socket, 1), std::vector<std::string> { "serve" }, PROGRAM);
    handover.peers = nullptr;
    return result;
  }

  bool expect(bool condition, const char* complaint) {
    if (!condition) std::cout << "soak: WRONG: " << complaint << std::endl;
    good = good && condition;
    return condition;
  }

  void sleep(uint milliseconds) {
    io.provider->getTimer().afterDelay(milliseconds * kj::MILLISECONDS).wait(io.waitScope);
  }

  Sample round(uint milliseconds, bool kill) {
    uint slow = parameters.connections / 10;
    int socket = handover.mine;
    PeerProcess slowClients(kj::arrayPtr(&socket, 1),
        { "slow", std::to_string(slow) }, PROGRAM);
    clients.start(parameters.connections - slow);

    sleep(milliseconds / 2);
    Sample middle = sample();
    uint64_t ticks = server->getProgress(TICKS);
    // Counted in turns of this loop, not in time: whatever stops all of us is no fault of theirs.
    uint turns = milliseconds / 2 / 50;
    for (uint i = 0, without = 0; i < turns && clients.failure == nullptr; i++) {
      sleep(50);
      while (slowClients.hasReported()) slowCalls += std::stoull(slowClients.line());
      auto now = server->getProgress(TICKS);
      without = now == ticks ? without + 1 : 0;
      ticks = now;
      if (!expect(without < 600, "the server's loop is blocked")) exit(1);
    }
    if (kill) {
      // In the middle of whatever they do.
      slowClients.signal(SIGKILL);
    }
    clients.finish().exclusiveJoin(io.provider->getTimer().afterDelay(300 * kj::SECONDS)
        .then([]() { KJ_FAIL_REQUIRE("calls are never answered"); })).wait(io.waitScope);
    if (!kill) {
      // And these in the middle of a pause.
      while (slowClients.hasReported()) slowCalls += std::stoull(slowClients.line());
      slowClients.signal(SIGSTOP);
      slowClients.awaitStop();
      slowClients.signal(SIGKILL);
    }
    slowClients.wait();
    return middle;
  }

  Sample quiet() {
    // When the server has seen that everybody has gone, and has taken up the last connections that
    // somebody handed to it before being killed.
    auto look = [this]() {
      return std::make_pair(server->getProgress(CONNECTIONS), server->getProgress(ACCEPTED));
    };
    for (uint i = 0;; i++) {
      auto seen = look();
      auto ticks = server->getProgress(TICKS);
      for (; server->getProgress(TICKS) < ticks + 5; i++) {
        if (!expect(i < 6000, "connections do not end")) exit(1);
        sleep(20);
      }
      if (seen.first == 0 && look() == seen) break;
    }
    malloc_trim(0);  // As the server does.
    return sample();
  }

  Sample sample() {
    return { resourcesOf(server->getPid()), resourcesOf(),
             residentBytes(server->getPid()), residentBytes(0) };
  }

  void print(uint round, const Sample& middle, const Sample& after) {
    auto show = [](const Sample& s) {
      return kj::str("server ", s.server.fds, " fds, ", s.server.regions, " regions, ",
          s.serverBytes >> 20, " MiB; clients ", s.driver.fds, " fds, ", s.driver.regions,
          " regions, ", s.driverBytes >> 20, " MiB");
    };
    auto& counts = clients.getCounts();
    std::cout << "round " << round + 1 << ": " << counts.lives << " lives, " << counts.calls
              << " calls so far\n  under load: " << show(middle).cStr()
              << "\n  afterwards: " << show(after).cStr() << std::endl;
  }
};

}  // namespace
}  // namespace soak
}  // namespace capnpshm

int main(int argc, char** argv) {
  using namespace capnpshm::soak;
  std::string role = argc > 1 ? argv[1] : "";
  if (role == "serve" || role == "slow") {
    // So that it does not outlive a test that crashed.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return role == "serve" ? serve() : readSlowly(atoi(argv[2]));
  }
  Parameters parameters;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string name = argv[i];
    if (name == "--seconds") parameters.seconds = atoi(argv[i + 1]);
    if (name == "--connections") parameters.connections = atoi(argv[i + 1]);
    if (name == "--seed") parameters.seed = strtoull(argv[i + 1], nullptr, 10);
  }
  if (!raiseFileLimit(parameters.connections)) return 1;
  return Driver(parameters).run() ? 0 : 1;
}
