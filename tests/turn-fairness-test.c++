// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// How TurnEnd shares the turns of a loop that is never idle among its members. How others on the
// loop fare is in busy-port-test.c++, what that means for connections in fairness-test.c++.

#include "turn-end-fixture.h"

#include <algorithm>
#include <kj/debug.h>
#include <kj/vector.h>

namespace capnpshm {
namespace {

using testing::BusyMember;
using testing::FakeMember;
using testing::FOREVER;

class TurnFairness: public testing::TurnEndFixture {
protected:
  struct Counted {
    // A member that waits, and knows in which turns of the busy one it was looked at.

    Counted(std::string& log, const BusyMember& busy): member(log, "") {
      member.quiet = true;
      member.waiting = true;
      member.isThere = [this, &busy]() {
        ++looks;
        if (busy.turns < thereFrom || found > 0) return false;
        foundAt = busy.turns;
        return true;
      };
      member.onProceed = [this]() { ++found; };
    }

    uint64_t looks = 0, thereFrom = kj::maxValue, foundAt = 0;
    uint found = 0;
    FakeMember member;
  };

  kj::Vector<kj::Own<Counted>> addMembers(const BusyMember& busy, uint count) {
    kj::Vector<kj::Own<Counted>> result;
    for (uint i = 0; i < count; i++) {
      result.add(kj::heap<Counted>(log, busy));
      result.back()->member.active();
    }
    return result;
  }

  void runFor(BusyMember& busy, uint64_t turns) {
    // Then all go to sleep.
    busy.turns = 0;
    busy.running = true;
    busy.onTurn = [&busy, turns]() { busy.running = busy.turns < turns; };
    busy.member.active();
    turn();
    ASSERT_EQ(turns, busy.turns);
  }
};

TEST_F(TurnFairness, AllWhoAreAwakeAreLookedAtInEachTurn) {
  constexpr uint TURNS = 100;
  BusyMember busy(log, 8);
  auto members = addMembers(busy, 200);
  members[0]->thereFrom = members[100]->thereFrom = members[199]->thereFrom = 50;
  runFor(busy, TURNS);
  for (auto& member: members) {
    EXPECT_GE(member->looks, TURNS);
    if (member->thereFrom == 50) {
      EXPECT_EQ(1u, member->found);
      EXPECT_LE(member->foundAt, 51u);
    }
  }
}

TEST_F(TurnFairness, WhoFindsNothingForLongGoesToSleep) {
  // Or each would cost all others something for ever.
  BusyMember busy(log, 8);
  FakeMember idle(log, "i"), seldom(log, "s");
  idle.waiting = seldom.waiting = true;
  uint64_t idleSleepsAt = 0, seldomSleepsAt = 0, last = 0;
  seldom.isThere = [&]() {
    if (busy.turns % 3600 != 0 || busy.turns == last) return false;
    last = busy.turns;
    return true;
  };
  busy.onTurn = [&]() {
    if (idleSleepsAt == 0 && log.find("iS") != std::string::npos) idleSleepsAt = busy.turns;
    if (seldomSleepsAt == 0 && log.find("sS") != std::string::npos) seldomSleepsAt = busy.turns;
    busy.running = busy.turns < 12000;
  };
  idle.active();
  seldom.active();
  turn();
  EXPECT_GE(idleSleepsAt, 4096u);
  EXPECT_LE(idleSleepsAt, 4096u + 2);
  EXPECT_EQ(0u, seldomSleepsAt) << "not as long as the loop is awake";
}

TEST_F(TurnFairness, FewGoToSleepInOneTurn) {
  // Or a message would have to wait until all do.
  constexpr uint COUNT = 80;
  BusyMember busy(log, 8);
  auto members = addMembers(busy, COUNT);
  for (auto& member: members) member->member.quiet = false;
  uint most = 0, asleep = 0;
  busy.onTurn = [&]() {
    auto count = uint(std::count(log.begin(), log.end(), 'S'));
    most = kj::max(most, count);
    asleep += count;
    log.clear();
    busy.running = busy.turns < 5000;
  };
  turn();
  EXPECT_EQ(COUNT, asleep);
  EXPECT_LE(most, 4u);
}

TEST_F(TurnFairness, SleepersThatHadSomethingMakeThePortDue) {
  // The bell of each waits there.
  BusyMember busy(log, 8);
  busy.running = false;
  auto members = addMembers(busy, 8);
  turn();
  for (uint i = 0; i < 4; i++) members[i]->thereFrom = 10 * (i + 1);
  kj::Vector<uint64_t> due;
  busy.running = true;
  busy.onTurn = [&]() {
    if (turnEnd->mustYield()) due.add(busy.turns);
    busy.running = busy.turns < 60;
  };
  busy.member.active();
  turn();
  ASSERT_EQ(1u, due.size());
  EXPECT_GE(due[0], 40u);
  EXPECT_LE(due[0], 42u);
}

TEST_F(TurnFairness, SleepersAreLookedAtInTurn) {
  constexpr uint COUNT = 80;
  constexpr uint LOOKS = 16;  // In each turn.
  BusyMember busy(log, 8);
  busy.running = false;
  auto members = addMembers(busy, COUNT);
  turn();
  // All are asleep now.
  uint64_t before[COUNT], after[COUNT];
  busy.running = true;
  busy.onTurn = [&]() {
    for (uint i = 0; i < COUNT; i++) {
      if (busy.turns == 10) before[i] = members[i]->looks;
      if (busy.turns == 110) after[i] = members[i]->looks;
      // And now they get something that nothing tells of.
      if (busy.turns == 110) members[i]->thereFrom = 111;
    }
    busy.running = busy.turns < 111 + COUNT / LOOKS;
  };
  busy.member.active();
  turn();
  for (uint i = 0; i < COUNT; i++) {
    EXPECT_EQ(100 * LOOKS / COUNT, after[i] - before[i]);
    EXPECT_EQ(1u, members[i]->found);
    EXPECT_LE(members[i]->foundAt, 111 + COUNT / LOOKS);
  }

  // Nobody looks at those who wait for nothing.
  FakeMember indifferent(log, "n");
  indifferent.active();
  turn();
  runFor(busy, 100);
  EXPECT_EQ(0u, indifferent.polls);
}

TEST_F(TurnFairness, MembersMayGoAwayInAnyState) {
  BusyMember busy(log, 8);
  for (bool awake: { true, false }) {
    auto members = addMembers(busy, 5);
    if (!awake) {
      busy.running = false;
      turn();
    }
    FakeMember atSocket(log, "");
    atSocket.awaitingSocket = true;
    atSocket.active();
    uint64_t looksBefore[5];
    busy.turns = 0;
    busy.running = true;
    busy.onTurn = [&]() {
      if (busy.turns == 10) {
        for (uint i: { 0, 1, 3 }) members[i] = nullptr;
        for (uint i: { 2, 4 }) looksBefore[i] = members[i]->looks;
      }
      busy.running = busy.turns < 50;
    };
    busy.member.active();
    turn();
    EXPECT_EQ(50u, busy.turns);
    for (uint i: { 2, 4 }) EXPECT_GE(members[i]->looks, looksBefore[i] + 30) << awake;
  }
}

TEST_F(TurnFairness, NobodyIsAskedBeforeAWordChanges) {
  SharedWord word(5);
  BusyMember busy(log, 8);
  Counted watched(log, busy);
  watched.member.word = &word;
  uint64_t before = 0;
  busy.onTurn = [&]() {
    if (busy.turns == 10) before = watched.looks;
    if (busy.turns == 50) {
      EXPECT_EQ(before, watched.looks);
      watched.thereFrom = 0;
      word.store(6, std::memory_order_relaxed);
    }
    busy.running = busy.turns < 100;
  };
  for (bool thereAtOnce: { false, true }) {
    watched.found = watched.looks = 0;
    watched.thereFrom = thereAtOnce ? 0 : FOREVER;
    watched.member.active();
    busy.turns = 0;
    busy.running = true;
    busy.member.active();
    turn();
    EXPECT_EQ(1u, watched.found);
    if (thereAtOnce) {
      EXPECT_LE(watched.foundAt, 2u) << "since it may have changed before it was first looked at";
    } else {
      EXPECT_GE(watched.foundAt, 50u);
      EXPECT_LE(watched.foundAt, 51u);
    }
  }
}

TEST_F(TurnFairness, NotAllThatIsThereComesInOneTurn) {
  // Or the peers of the first would have to wait until the last is done. But nobody is left out.
  constexpr uint COUNT = 150;
  BusyMember busy(log, 8);
  auto members = addMembers(busy, COUNT);
  for (auto& member: members) {
    member->thereFrom = 10;
    member->member.quiet = false;
  }
  log.clear();
  runFor(busy, 20);
  uint most = 0, found = 0;
  for (char c: log) {
    if (c == 'F') found = 0;
    if (c == '!') most = kj::max(most, ++found);
  }
  EXPECT_GT(most, 1u);
  EXPECT_LE(most, 64u);
  for (auto& member: members) EXPECT_EQ(1u, member->found);
}

TEST_F(TurnFairness, TurnIsLongAfterMessagesOrBytes) {
  FakeMember a(log, "a");
  auto& turnEnd = a.turnEnd();
  for (size_t bytes: { 8, 64 << 10 }) {
    uint messages = 0;
    for (; !turnEnd.isLong(); messages++) turnEnd.count(bytes);
    EXPECT_EQ(bytes == 8 ? 64u : 8u, messages);
    a.active();
    turn();
    EXPECT_FALSE(turnEnd.isLong()) << "the next has just begun";
  }
}

TEST_F(TurnFairness, TurnIsShorterIfOthersAreAwake) {
  auto messagesBesides = [this](uint others) {
    BusyMember busy(log, 0);
    auto members = addMembers(busy, others);
    uint messages = 0;
    busy.onTurn = [&]() {
      // In the second all have been seen to wait.
      if (busy.turns < 2) return;
      for (; !turnEnd->isLong(); messages++) turnEnd->count(0);
      busy.running = false;
    };
    turn();
    return messages;
  };
  EXPECT_EQ(64u, messagesBesides(0));
  EXPECT_EQ(16u, messagesBesides(1));
  EXPECT_EQ(41u, messagesBesides(40)) << "one for each";
  EXPECT_EQ(64u, messagesBesides(200));
}

}  // namespace
}  // namespace capnpshm
