// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What the tests of TurnEnd have in common.

#include <capnp-shm/busy-poll.h>

#include "loop-fixture.h"

#include <gtest/gtest.h>
#include <kj/function.h>
#include <string>

namespace capnpshm {
namespace testing {

class FakeMember final: public TurnEnd::Member {
  // Writes down what it is asked to do: its name, and F(lush), P(oll), ! for proceed, S(leep).

public:
  FakeMember(std::string& log, const char* name, uint64_t spinNanoseconds = 0)
      : Member(TurnEnd::forThisLoop(), spinNanoseconds), log(log), name(name) {}

  using Member::active;
  TurnEnd& turnEnd() { return getTurnEnd(); }

  bool waiting = false;
  bool awaitingSocket = false;
  bool answer = false;
  bool sharesCpu = false;
  kj::uint unprepared = 0;
  kj::Function<bool()> isThere = []() { return false; };
  kj::Function<void()> onProceed = []() {};
  const SharedWord* word = nullptr;
  uint64_t polls = 0;
  bool quiet = false;

private:
  std::string& log;
  const char* name;

  void write(char what) { if (!quiet) log += std::string(name) + what + ' '; }
  void flush() override { write('F'); }
  bool isWaiting() override { return waiting; }
  bool awaitsSocket() override { return awaitingSocket; }
  bool expectsAnswer() override { return answer; }
  bool poll() override {
    ++polls;
    bool result = isThere();
    // Of a row of looks in vain the first is enough to see.
    if (result || polls == 1) write('P');
    return result;
  }
  const SharedWord* watch() override { return word; }
  bool prepare() override {
    if (unprepared == 0) return false;
    write('p');
    return --unprepared > 0;
  }
  void proceed() override {
    write('!');
    onProceed();
  }
  void sleep() override {
    write('S');
    polls = 0;
  }
  bool peerSharesCpu() override { return sharesCpu; }
};

constexpr uint64_t FOREVER = 5000000;
// Turns of a member that is always busy: far more than there are while everybody else gets a look
// in, and yet an end if nobody ever does.

struct BusyMember {
  // Finds something in every turn, as in a ping-pong whose peer is always awake.

  BusyMember(std::string& log, size_t bytesEach): member(log, "x") {
    member.quiet = true;
    member.waiting = true;
    member.isThere = [this]() { return running && turns < FOREVER; };
    member.onProceed = [this, bytesEach]() {
      ++turns;
      onTurn();
      member.turnEnd().count(bytesEach);
    };
    member.active();
  }

  bool running = true;
  uint64_t turns = 0;
  kj::Function<void()> onTurn = []() {};
  FakeMember member;
};

class TurnEndFixture: public ::testing::Test, protected LoopFixture {
  // An event loop with a TurnEnd that is new, so that looks at the port are tried.

protected:
  TurnEndFixture(): turnEnd(TurnEnd::forThisLoop()) {}
  ~TurnEndFixture() noexcept override {}

  std::string turn() {
    // What happened until there was nothing more to do.
    log.clear();
    LoopFixture::turn();
    return log;
  }

  kj::uint looks(FakeMember& member) {
    // How often one that waits looks at the port before it sleeps.
    uint64_t before = turnEnd->getLooks();
    member.active();
    turn();
    return turnEnd->getLooks() - before;
  }

  std::string log;
  kj::Own<TurnEnd> turnEnd;
};

class TurnEndWithoutLooks: public TurnEndFixture {
  // Where looks at the port have proved to be in vain for long, so that there are none.

protected:
  TurnEndWithoutLooks() {
    FakeMember a(log, "a");
    a.waiting = true;
    kj::uint previous = 0;
    for (kj::uint i = 0; i < 3000; i++) {
      kj::uint now = looks(a);
      if (i > 1500 && previous > 0 && now == 0) break;
      previous = now;
    }
  }
  ~TurnEndWithoutLooks() noexcept override {}
};

}  // namespace testing
}  // namespace capnpshm
