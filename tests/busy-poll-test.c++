// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "turn-end-fixture.h"

#include <kj/debug.h>
#include <kj/thread.h>
#include <string>
#include <unistd.h>

namespace capnpshm {
namespace {

using testing::FakeMember;

typedef testing::TurnEndWithoutLooks BusyPoll;

TEST_F(BusyPoll, FlushThenLookThenSleep) {
  FakeMember a(log, "a");
  EXPECT_EQ("", turn());
  a.active();
  EXPECT_EQ("", log) << "not before the end of the turn";
  EXPECT_EQ("aF aS ", turn()) << "it waits for nothing, so there is nothing to look for";
  EXPECT_EQ("", turn()) << "once for each activity";
  a.waiting = true;
  a.active();
  a.active();
  EXPECT_EQ("aF aP aS ", turn());
}

TEST_F(BusyPoll, AllFlushBeforeAnyLooks) {
  // Or an answer that one is about to send would come after another's spin.
  FakeMember a(log, "a"), b(log, "b"), c(log, "c"), idle(log, "i");
  a.waiting = c.waiting = true;
  b.active();
  a.active();
  c.active();
  EXPECT_EQ("bF aF cF bS aP cP aS cS ", turn());
}

TEST_F(BusyPoll, ComesAfterOtherWorkForTheEndOfTheTurn) {
  // Cap'n Proto's own flushes, for which it uses evalLast() too, after our activity has begun.
  FakeMember a(log, "a");
  auto promise = kj::evalLater([&]() {
    a.active();
    return kj::evalLast([&]() {
      log += "flush ";
      return kj::evalLater([&]() { log += "later "; });
    });
  }).eagerlyEvaluate(nullptr);
  EXPECT_EQ("flush later aF aS ", turn());
}

TEST_F(BusyPoll, WhoFindsSomethingGoesOnAndNobodySleeps) {
  FakeMember a(log, "a"), b(log, "b");
  a.waiting = b.waiting = true;
  bool first = true;
  a.isThere = [&]() { return kj::mv(first) && !(first = false); };
  a.active();
  b.active();
  // The other is still awake, and must be put to sleep at the next end of a turn.
  EXPECT_EQ("aF bF aP bP a! aF bS aS ", turn());
}

TEST_F(BusyPoll, WorkDoneByProceedComesBeforeTheNextLook) {
  FakeMember a(log, "a");
  a.waiting = true;
  uint left = 3;
  a.isThere = [&]() { return left > 0; };
  kj::Promise<void> work = kj::READY_NOW;
  a.onProceed = [&]() {
    --left;
    work = kj::evalLater([&]() { log += "work "; }).eagerlyEvaluate(nullptr);
  };
  a.active();
  EXPECT_EQ("aF aP a! work aF aP a! work aF aP a! work aF aS ", turn());
}

TEST_F(BusyPoll, MembersThatGoAway) {
  auto a = kj::heap<FakeMember>(log, "a");
  auto b = kj::heap<FakeMember>(log, "b");
  auto c = kj::heap<FakeMember>(log, "c");
  a->active();
  b->active();
  c->active();
  b = nullptr;
  EXPECT_EQ("aF cF aS cS ", turn());
  a->active();
  a = nullptr;
  EXPECT_EQ("", turn());
  c->active();
  EXPECT_EQ("cF cS ", turn());

  // The last one, with the end of a turn still to come.
  c->active();
  c = nullptr;
  EXPECT_EQ("", turn());
  FakeMember d(log, "d");
  d.active();
  EXPECT_EQ("dF dS ", turn());
}

TEST_F(BusyPoll, OneForEachLoopAtATime) {
  auto first = TurnEnd::forThisLoop();
  auto second = TurnEnd::forThisLoop();
  EXPECT_EQ(first.get(), second.get());
  first = nullptr;
  FakeMember a(log, "a");
  EXPECT_EQ(second.get(), &a.turnEnd()) << "as long as anybody has it";
  kj::Thread([&]() {
    auto io = kj::setupAsyncIo();
    auto other = TurnEnd::forThisLoop();
    KJ_ASSERT(other.get() != second.get());
    std::string log;
    FakeMember b(log, "b");
    b.active();
    kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
    KJ_ASSERT(log == "bF bS ");
  });
  EXPECT_EQ(second.get(), TurnEnd::forThisLoop().get());
}

TEST(BusyPollLoops, ComeAndGoOnOneThread) {
  for (uint i = 0; i < 5; i++) {
    auto io = kj::setupAsyncIo();
    std::string log;
    FakeMember a(log, "a"), b(log, "b");
    a.active();
    kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
    EXPECT_EQ("aF aS ", log);
    // And it may be gone before the end of the turn.
    b.active();
  }
}

TEST_F(BusyPoll, SpinsAsLongAsThatPays) {
  if (EMULATED) GTEST_SKIP() << "too slow under an emulator for any spin to pay";
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  uint64_t looks = 0, needed = 0;
  FakeMember a(log, "a", 1000000);
  a.waiting = a.answer = true;  // A trial for requests is short for a build that is slow.
  a.quiet = true;
  uint found = 0;
  a.isThere = [&]() { return ++looks == needed; };
  a.onProceed = [&]() { ++found; };
  auto turnThatFindsItAfter = [&](uint64_t count) {
    looks = 0;
    needed = count;
    uint before = found;
    a.active();
    turn();
    return found - before;
  };
  // As if the answer came after a microsecond or so, some looks: more than one round of them.
  for (uint i = 0; i < 50; i++) {
    if (turnThatFindsItAfter(10) == 0) break;
  }
  EXPECT_GT(found, 0u);
}

TEST_F(BusyPoll, SpinEndsWhenATimerExpires) {
  if (EMULATED) GTEST_SKIP() << "too slow under an emulator for any spin to pay";
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  constexpr uint64_t FEW = 8, MANY = 2 * FEW;
  turnEnd->usePort(io.unixEventPort);
  FakeMember a(log, "a", 1000000);
  a.quiet = a.waiting = a.answer = true;
  uint64_t looks = 0, longest = 0;
  a.isThere = [&]() { return ++looks == MANY; };
  for (uint i = 0; i < 10; i++) {
    looks = 0;
    a.active();
    turn();
    longest = kj::max(longest, looks);

    auto& timer = io.provider->getTimer();
    auto expired = timer.atTime(timer.now());
    looks = 0;
    a.active();
    expired.wait(io.waitScope);
    EXPECT_LE(looks, FEW);
    turn();
  }
  EXPECT_GE(longest, MANY) << "else it ends so soon by itself";
}

TEST_F(BusyPoll, DoesNotSpinWhereItIsForbiddenOrInVain) {
  FakeMember never(log, "a", 0), brief(log, "b", 50000);
  for (auto member: { &never, &brief }) {
    member->waiting = true;
    member->quiet = true;
    uint64_t looks = 0;
    member->isThere = [&]() { ++looks; return false; };
    uint spins = 0;
    for (uint i = 0; i < 100; i++) {
      looks = 0;
      member->active();
      turn();
      ASSERT_GE(looks, 1u);
      spins += looks > 1;
    }
    EXPECT_LE(spins, member == &never ? 0u : 60u);
    member->isThere = []() { return false; };
  }
}

TEST_F(BusyPoll, SpinsSeldomForPeersOnItsOwnCpuOnly) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  auto spinsOf = [&](bool sharesCpu, bool otherSharesCpu) {
    // Of 100 sleeps, of two that wait for ever.
    turnEnd = nullptr;
    FakeMember member(log, "a", 50000), other(log, "b", 50000);
    uint64_t looks = 0;
    for (auto m: { &member, &other }) m->waiting = m->quiet = true;
    member.sharesCpu = sharesCpu;
    other.sharesCpu = otherSharesCpu;
    member.isThere = [&]() { ++looks; return false; };
    uint spins = 0;
    for (uint i = 0; i < 100; i++) {
      looks = 0;
      member.active();
      other.active();
      turn();
      spins += looks > 1;
    }
    return spins;
  };
  uint seldom = spinsOf(true, true);
  EXPECT_LT(seldom, spinsOf(false, false));
  EXPECT_LT(seldom, spinsOf(true, false));
}

TEST_F(BusyPoll, PeerThatIsAwakeOnItsOwnCpuIsNoReasonToSpin) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  FakeMember member(log, "a", 50000);
  member.waiting = member.quiet = true;
  uint64_t looks = 0;
  member.isThere = [&]() { ++looks; return false; };
  auto spins = [&]() {
    looks = 0;
    member.active();
    turn();
    return looks > 1;
  };
  // Until the last trial is just over, and the next far.
  for (uint i = 0; i < 1000; i++) spins();
  for (uint i = 0; i < 1000 && !spins(); i++) {}
  while (spins()) {}

  member.sharesCpu = true;
  for (uint i = 0; i < 100; i++) member.turnEnd().peerWasAwake(member);
  EXPECT_FALSE(spins());
  member.sharesCpu = false;
  for (uint i = 0; i < 100; i++) member.turnEnd().peerWasAwake(member);
  EXPECT_TRUE(spins());
}

TEST_F(BusyPoll, PreparesWhileThereIsTime) {
  // Without a spin, before going to sleep.
  FakeMember a(log, "a"), b(log, "b");
  a.waiting = true;
  a.unprepared = b.unprepared = 3;
  a.active();
  b.active();
  EXPECT_EQ("aF bF bS aP ap ap ap aS ", turn()) << "and not for one that waits for nothing";

  // Not without end, and not a moment longer than until something is there.
  a.unprepared = 1000000;
  a.quiet = true;
  a.active();
  turn();
  EXPECT_GT(a.unprepared, 1000000u - 100);
  a.quiet = false;
  a.unprepared = 1000000;
  uint looks = 0;
  a.isThere = [&]() { return ++looks == 3; };
  a.onProceed = [&]() { a.unprepared = 0; };
  a.active();
  EXPECT_EQ("aF aP ap ap aP a! aF aS ", turn());
}

TEST_F(BusyPoll, PausesBetweenRequestsDoNotSpoilTheSpinForAnswers) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  FakeMember a(log, "a", 1000000);
  a.waiting = true;
  a.quiet = true;
  uint64_t looks = 0;
  bool here = false;
  a.isThere = [&]() { return ++looks > 4 && here; };
  auto spins = [&]() {
    looks = 0;
    a.active();
    turn();
    return looks > 1;
  };
  // One that calls with pauses: after each answer, found after a few looks, nothing comes.
  uint answerSpins = 0, requestSpins = 0;
  a.onProceed = [&]() { here = false; };
  for (uint i = 0; i < 100; i++) {
    a.answer = here = true;
    looks = 0;
    a.active();
    // The turn that finds the answer is followed by one that finds nothing.
    a.onProceed = [&]() {
      ++answerSpins;
      here = a.answer = false;
    };
    turn();
    requestSpins += spins();
  }
  EXPECT_GT(answerSpins, 90u) << "each was found without a sleep";
  EXPECT_LT(requestSpins, 50u) << "nobody looks for long for what never comes";
}

TEST_F(BusyPoll, LooksLongerWhileThePeerIsBusyWithMuch) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no spinning on a single CPU";
  FakeMember a(log, "a", 1000000);
  a.waiting = a.answer = true;
  a.quiet = true;
  auto looksAfter = [&](size_t bytes) {
    // The most of a few trials: a preempted one has few looks.
    uint64_t most = 0;
    for (uint i = 0; i < 2; i++) {
      uint64_t looks = 0;
      a.isThere = [&]() { ++looks; return false; };
      a.turnEnd().moved(bytes);
      a.active();
      turn();
      most = kj::max(most, looks);
    }
    return most;
  };
  uint64_t little = looksAfter(100);
  // 1 MiB takes a few times as long to move as a trial lasts.
  EXPECT_GT(looksAfter(1 << 20), 2 * little);
}

}  // namespace
}  // namespace capnpshm
