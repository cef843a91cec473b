// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The driver: `hostile-live [--seconds N] [--seed N] [--attackers N] [--attack NUMBER]`. Runs each
// mode for its share of the time, then the control run. See hostile-live.h.

#include "handover.h"
#include "hostile-live.h"

#include <iomanip>
#include <iostream>
#include <map>
#include <poll.h>
#include <random>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace hostile {
namespace {

using conformance::Root;
using process::PeerProcess;
using process::Resources;
using process::resourcesOf;

constexpr uint LOOK_MILLISECONDS = 20;
constexpr uint MAX_LOOKS_WITHOUT = 30 * 1000 / LOOK_MILLISECONDS;
// How often the driver may look without seeing the victim's timer, or an honest call, go on.
// Counted in looks, so that what stops all processes at once is nobody's fault.

struct Parameters {
  uint seconds = 20;
  uint64_t seed = 1;
  uint attackers = 2;
  kj::Maybe<Attack> only;
};

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

class Honest {
  // A client like any other, in a thread of its own. Everything it gets is checked.

public:
  Honest(int handover, const LiveMode& mode, uint64_t seed)
      : thread([this, handover, &mode, seed]() {
          KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { run(handover, mode, seed); })) {
            complaint = kj::str(*exception).cStr();
          }
          ended.store(true);
        }) {}
  ~Honest() noexcept(false) { stop(); }

  void stop() {
    stopping.store(true);
    if (thread.joinable()) thread.join();
  }

  std::atomic<uint64_t> calls{0};
  std::atomic<bool> ended{false};
  std::string complaint;  // Once `ended`.

private:
  std::atomic<bool> stopping{false};
  std::thread thread;

  void run(int handover, const LiveMode& mode, uint64_t seed) {
    auto io = kj::setupAsyncIo();
    std::mt19937_64 random(seed);
    SharedMemoryContext context;
    context.port = &io.unixEventPort;
    context.options = mode.options;
    auto stream = process::wrapSocket(
        io, process::handOverNewPair(handover, uint(Attack::HONEST)));
    SharedMemoryClient client(context, *stream);
    auto root = client.bootstrap().castAs<Root>();
    int64_t sequence = 0;
    conformance::ServerState mine;

    while (!stopping.load()) {
      kj::Vector<kj::Promise<void>> checks;
      auto checked = [this]() { calls.fetch_add(1); };
      for (uint i = 0; i < 4; i++) {
        checks.add(root.sequenceRequest().send().then([&, checked](auto&& response) {
          KJ_REQUIRE(response.getValue() == sequence);
          ++sequence;
          checked();
        }));
      }
      for (size_t bytes: { random() % 100, random() % 2000, random() % 50000 }) {
        auto request = root.echoRequest();
        conformance::fillPattern(request.initData(bytes), bytes);
        checks.add(request.send().then([bytes, checked](auto&& response) {
          KJ_REQUIRE(response.getData().size() == bytes);
          KJ_REQUIRE(conformance::isPattern(response.getData(), bytes));
          checked();
        }));
      }
      auto make = root.makeRequest();
      make.setName("honest");
      checks.add(make.send().getItem().nameRequest().send().then([checked](auto&& response) {
        KJ_REQUIRE(response.getName() == "honest");
        checked();
      }));
      auto visit = root.visitRequest();
      visit.setItem(kj::heap<conformance::ItemImpl>(mine, "mine"));
      visit.setCount(3);
      checks.add(visit.send().ignoreResult().then(kj::mv(checked)));
      kj::joinPromises(checks.releaseAsArray()).wait(io.waitScope);
    }
    auto stats = client.getStats();
    KJ_REQUIRE(stats.outgoing.transport == Transport::SHARED_MEMORY, stats.outgoing.plainReason);
    KJ_REQUIRE(stats.incoming.transport == Transport::SHARED_MEMORY, stats.incoming.plainReason);
  }
};

struct Deeds {
  uint64_t connections = 0;
  uint64_t deeds = 0;
};

std::string withoutNumbers(const std::string& text) {
  // The gist of an exception's description: numbers differ each time, and what comes behind a
  // semicolon names them.
  auto gist = text.substr(0, text.find("; "));
  return gist.substr(0, 90);
}

class Run {
  // A victim, and what happens to it.

public:
  Run(const Parameters& parameters, const LiveMode& mode, const char* victimProgram)
      : parameters(parameters), mode(mode), seeds(parameters.seed),
        handover(process::newSocketPair()) {
    int socket = handover.peers;
    victim = kj::heap<PeerProcess>(kj::arrayPtr(&socket, 1),
        std::vector<std::string> { mode.name }, victimProgram);
    handover.peers = nullptr;
    KJ_REQUIRE(victim->line() == "ready");
  }

  bool attack(double seconds) {
    // True if nothing went wrong.
    Resources before = resourcesOf(victim->getPid());
    Honest honest(handover.mine, mode, seeds());
    uint64_t ticks = 0, calls = 0;
    uint looksWithoutTick = 0, looksWithoutCall = 0;
    std::vector<kj::Own<PeerProcess>> attackers(parameters.attackers);
    for (double end = now() + seconds; now() < end && good;) {
      for (auto& attacker: attackers) {
        if (attacker.get() == nullptr) attacker = newAttacker(parameters.only);
        readAttacker(attacker);
      }
      readVictim();
      look(ticks, victim->getProgress(TICKS), looksWithoutTick, "the victim's loop is blocked");
      look(calls, honest.calls.load(), looksWithoutCall, "an honest client's calls hang");
      if (honest.ended.load()) fail("an honest client failed: " + honest.complaint);
      usleep(LOOK_MILLISECONDS * 1000);
    }
    attackers.clear();
    if (!good) {
      // Nor will the honest client end by itself, perhaps.
      victim->signal(SIGKILL);
      return false;
    }
    honest.stop();
    if (!honest.complaint.empty()) fail("an honest client failed: " + honest.complaint);
    honestCalls = honest.calls.load();

    // Now all connections must end, and nothing be left of them.
    for (uint i = 0; good && (victim->getProgress(CONNECTIONS) > 0 || i < 10); i++) {
      readVictim();
      if (i == MAX_LOOKS_WITHOUT) fail("connections do not end");
      usleep(LOOK_MILLISECONDS * 1000);
    }
    if (good) {
      auto after = resourcesOf(victim->getPid());
      if (!(after == before)) {
        fail("the victim holds " + testing::PrintToString(after) + ", it had " +
            testing::PrintToString(before));
      }
    }
    handover.mine = nullptr;
    for (uint i = 0; good && !done; i++) {
      readVictim();
      if (i == MAX_LOOKS_WITHOUT) fail("the victim does not end");
      usleep(LOOK_MILLISECONDS * 1000);
    }
    if (good) {
      int status = victim->wait();
      if (status != 0) fail("the victim ended with status " + std::to_string(status));
    }
    if (victim->getProgress(OUT_OF_BOUNDS) > 0) fail("a reader was out of bounds");
    if (victim->getProgress(CHANGED) > 0) fail("a message changed while it was read");
    return good;
  }

  bool control(double seconds) {
    // True if it was noticed that messages are read where they lie: at the latest when they change
    // under the reader's eyes, at best when that makes it read outside them.
    auto attacker = newAttacker(Attack::RACE);
    double start = now(), end = start + seconds;
    auto outside = [this]() { return !good || victim->getProgress(OUT_OF_BOUNDS) > 0; };
    while (now() < end && !outside()) {
      readAttacker(attacker);
      if (attacker.get() == nullptr) attacker = newAttacker(Attack::RACE);
      readVictim();
      usleep(LOOK_MILLISECONDS * 1000);
    }
    auto changed = victim->getProgress(CHANGED);
    std::cout << "control run: " << (victim->getProgress(OUT_OF_BOUNDS) > 0
              ? "an out-of-bounds reader" : !good ? "a dead victim" : "no out-of-bounds reader")
              << " after " << now() - start << " s, " << changed << " of "
              << victim->getProgress(INSPECTED) << " messages changed while they were read"
              << std::endl;
    return outside() || changed > 0;
  }

  void print() {
    std::cout << "\n" << std::left << std::setw(20) << "attack" << std::right
              << std::setw(12) << "connections" << std::setw(14) << "deeds" << "\n";
    uint64_t connections = 0, sum = 0;
    for (auto& pair: deeds) {
      std::cout << std::left << std::setw(20) << attackName(pair.first) << std::right
                << std::setw(12) << pair.second.connections << std::setw(14)
                << pair.second.deeds << "\n";
      connections += pair.second.connections;
      sum += pair.second.deeds;
    }
    std::cout << "\nconnections ended with\n";
    for (auto& pair: outcomes) {
      std::cout << std::setw(10) << pair.second << "  " << pair.first << "\n";
    }
    std::cout << "\n" << mode.name << ": " << connections << " attacks with " << sum << " deeds, "
              << victim->getProgress(INSPECTED) << " messages inspected ("
              << victim->getProgress(READERS) << " readers), "
              << victim->getProgress(CALLS) << " calls served, " << honestCalls
              << " honest calls checked, longest gap of the victim's timer "
              << victim->getProgress(LONGEST_GAP) << " ms, " << attackersLost
              << " attackers lost to themselves" << std::endl;
  }

private:
  const Parameters& parameters;
  const LiveMode& mode;
  std::mt19937_64 seeds;
  process::SocketPair handover;
  kj::Own<PeerProcess> victim;
  bool good = true;
  bool done = false;
  std::map<Attack, Deeds> deeds;
  std::map<std::string, uint64_t> outcomes;
  uint64_t honestCalls = 0;
  uint64_t attackersLost = 0;

  void fail(const std::string& text) {
    std::cout << "WRONG: " << text << std::endl;
    good = false;
  }

  kj::Own<PeerProcess> newAttacker(kj::Maybe<Attack> only) {
    std::vector<std::string> arguments { mode.name, std::to_string(seeds()) };
    KJ_IF_MAYBE(o, only) arguments.push_back(std::to_string(uint(*o)));
    int socket = handover.mine;
    return kj::heap<PeerProcess>(kj::arrayPtr(&socket, 1), kj::mv(arguments),
        HOSTILE_LIVE_ATTACKER);
  }

  void look(uint64_t& last, uint64_t value, uint& without, const char* complaint) {
    without = value == last ? without + 1 : 0;
    last = value;
    if (without >= MAX_LOOKS_WITHOUT) fail(complaint);
  }

  void readAttacker(kj::Own<PeerProcess>& attacker) {
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      while (attacker->hasReported()) {
        std::istringstream line(attacker->line());
        std::string word;
        line >> word;
        if (word == "wrong") {
          std::string text;
          std::getline(line, text);
          fail("an attacker saw:" + text);
        } else {
          uint kind;
          uint64_t count;
          line >> kind >> count;
          auto& entry = deeds[Attack(kind)];
          ++entry.connections;
          entry.deeds += count;
        }
      }
    })) {
      // It has no more regard for its own memory than for ours.
      (void)exception;
      ++attackersLost;
      attacker = nullptr;
    }
  }

  void readVictim() {
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      while (!done && victim->hasReported()) {
        auto text = victim->line();
        std::istringstream line(text);
        std::string word;
        line >> word;
        if (word == "done") {
          done = true;
        } else if (word == "end") {
          uint kind;
          int type;
          std::string description;
          line >> kind >> type;
          std::getline(line, description);
          ended(Attack(kind), type, description);
        } else {
          fail("the victim says: " + text);
        }
      }
    })) {
      fail("the victim died: status " + std::to_string(victim->wait()) + " (" +
          exception->getDescription().cStr() + ")");
    }
  }

  void ended(Attack attack, int type, std::string description) {
    static const char* const TYPES[] = { "FAILED", "OVERLOADED", "DISCONNECTED", "UNIMPLEMENTED" };
    std::string name = type < 0 ? "clean" : type < 4 ? TYPES[type] : "?";
    ++outcomes[name + ":" + withoutNumbers(description)];
    // With an Abort the peer ends its connection in whatever words it likes, and of whatever type.
    bool clear = type < 0 || type == int(kj::Exception::Type::FAILED) ||
        type == int(kj::Exception::Type::DISCONNECTED) ||
        description.find("remote exception: ") != std::string::npos;
    if (!clear || description.size() < 5) {
      fail("a connection (" + std::string(attackName(attack)) + ") ended with " + name + ":" +
          description);
    }
    if ((attack == Attack::HONEST || attack == Attack::STAMPS_AS_PAYLOAD) &&
        type == int(kj::Exception::Type::FAILED) &&
        description.find("RpcSystem was destroyed") == std::string::npos) {
      // (That is what a client says that is destroyed before its connection.)
      fail("an honest connection ended with " + name + ":" + description);
    }
  }
};

bool run(const Parameters& parameters) {
  bool good = true;
  auto modes = liveModes();
  for (auto& mode: modes) {
    std::cout << "=== mode " << mode.name << ", seed " << parameters.seed << std::endl;
    Run attack(parameters, mode, HOSTILE_LIVE_VICTIM);
    bool passed = attack.attack(double(parameters.seconds) / modes.size());
    attack.print();
    good = good && passed;
  }
  // What the copy is for. Should the sanitizer say anything below this line, that is what is
  // wanted.
  std::cout << "=== control run: a victim that does not copy" << std::endl;
  Run control(parameters, findLiveMode("copy"), HOSTILE_LIVE_VICTIM_UNSAFE);
  good = control.control(60) && good;
  std::cout << "hostile-live: " << (good ? "passed" : "FAILED") << std::endl;
  return good;
}

}  // namespace
}  // namespace hostile
}  // namespace capnpshm

int main(int argc, char** argv) {
  using namespace capnpshm::hostile;
  Parameters parameters;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string name = argv[i];
    if (name == "--seconds") parameters.seconds = atoi(argv[i + 1]);
    if (name == "--seed") parameters.seed = strtoull(argv[i + 1], nullptr, 10);
    if (name == "--attackers") parameters.attackers = atoi(argv[i + 1]);
    if (name == "--attack") parameters.only = Attack(atoi(argv[i + 1]));
  }
  return run(parameters) ? 0 : 1;
}
