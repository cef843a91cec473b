// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// How TurnEnd looks at the event port before it goes to sleep; the rest is in busy-poll-test.c++.

#include "turn-end-fixture.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <kj/thread.h>
#include <unistd.h>
#include <vector>

namespace capnpshm {
namespace {

using testing::FakeMember;

class LooksAtPort: public testing::TurnEndFixture {};

TEST_F(LooksAtPort, AWhileThenSleeps) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  FakeMember a(log, "a");
  a.waiting = true;
  // The first time is slow for other reasons.
  for (uint i = 0; i < 3; i++) {
    auto begin = std::chrono::steady_clock::now();
    EXPECT_GT(looks(a), 0u);
    EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::microseconds(30))
        << "to find out whether it pays";
    EXPECT_EQ("aF aP aS ", log);
  }
}

TEST_F(LooksAtPort, AfterASingleSpin) {
  FakeMember a(log, "a", 20000);
  a.waiting = true;
  a.unprepared = 1000000;
  uint unpreparedAtFirstLook = 0;
  a.isThere = [&]() {
    if (unpreparedAtFirstLook == 0 && turnEnd->getLooks() > 0) unpreparedAtFirstLook = a.unprepared;
    return false;
  };
  EXPECT_GT(looks(a), 0u);
  EXPECT_LT(unpreparedAtFirstLook, 1000000u) << "it is done while spinning";
  EXPECT_EQ(unpreparedAtFirstLook, a.unprepared);
}

TEST_F(LooksAtPort, NotForOneThatWaitsForNothing) {
  FakeMember a(log, "a");
  for (uint i = 0; i < 100; i++) {
    a.active();
    EXPECT_EQ("aF aS ", turn());
  }
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  a.waiting = true;
  EXPECT_GT(looks(a), 0u) << "there were none before, in vain";
}

TEST_F(LooksAtPort, NotForLongInVain) {
  FakeMember a(log, "a");
  a.waiting = true;
  uint turnsWithLooks = 0;
  for (uint i = 0; i < 1000; i++) turnsWithLooks += looks(a) > 0;
  EXPECT_LE(turnsWithLooks, 25u);
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  EXPECT_GT(turnsWithLooks, 4u) << "it is tried again now and then";
}

TEST_F(LooksAtPort, ForWhatIsAwaitedOnASocketAndNowhereElse) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  FakeMember a(log, "a", 20000), b(log, "b", 20000);
  a.awaitingSocket = true;
  a.unprepared = 1;
  EXPECT_GT(looks(a), 0u);
  EXPECT_EQ("aF aS ", log);

  // Beside one that waits for something else, which has its spin first.
  b.waiting = true;
  uint64_t before = turnEnd->getLooks(), spins = 0, atLooks = 0;
  b.isThere = [&]() {
    ++(turnEnd->getLooks() == before ? spins : atLooks);
    return false;
  };
  a.active();
  uint count = looks(b);
  EXPECT_GT(count, 0u);
  EXPECT_GT(spins, 1u);
  EXPECT_LE(atLooks, count) << "no spins between them, which would make it wait";
  EXPECT_EQ("aF bF bP bS aS ", log);
}

TEST_F(LooksAtPort, LongerForWhatComesOnASocket) {
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  FakeMember a(log, "a");
  a.awaitingSocket = true;
  // Neither answers nor requests say anything of the other,
  for (bool answer: { true, false }) {
    a.answer = answer;
    auto begin = std::chrono::steady_clock::now();
    EXPECT_GT(looks(a), 0u) << answer;
    EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::microseconds(90)) << answer;
    uint turnsWithLooks = 0;
    for (uint i = 0; i < 1000; i++) turnsWithLooks += looks(a) > 0;
    EXPECT_LE(turnsWithLooks, 25u) << "in vain " << answer;
  }
  // nor of what a peer wants that is set up already.
  a.awaitingSocket = false;
  a.waiting = true;
  EXPECT_GT(looks(a), 0u);
}

TEST_F(LooksAtPort, FewerWhileTheyPayWithSpinsAndWithout) {
  if (EMULATED) GTEST_SKIP() << "too slow under an emulator for any look to pay";
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  auto usualLooks = [&](uint64_t spin) {
    turnEnd = nullptr;  // For a new one.
    FakeMember a(log, "a", spin);
    turnEnd = TurnEnd::forThisLoop();
    turnEnd->usePort(io.unixEventPort);  // A look is one system call then.
    a.waiting = true;
    bool coming = false;
    uint64_t before = 0;
    a.isThere = [&]() {
      // In the first look.
      return coming && turnEnd->getLooks() > before && !(coming = false);
    };
    a.onProceed = [&]() { a.turnEnd().count(8); };
    std::vector<uint> counts;
    for (uint i = 0; i < 200; i++) {
      // Something comes, then nothing more does.
      coming = true;
      before = turnEnd->getLooks();
      counts.push_back(looks(a));
    }
    std::sort(counts.begin(), counts.end());
    return counts[counts.size() / 2];
  };
  for (uint64_t spin: { 0, 1 }) {
    // The look that found it, and those in vain. Where a look takes 45 µs, as with a sanitizer on a
    // busy machine, it does not pay; but that is not so for long.
    uint count = 0;
    for (uint attempt = 0; attempt < 50 && count != 1 + 4; attempt++) count = usualLooks(spin);
    EXPECT_EQ(1u + 4, count) << spin;
  }
}

TEST_F(LooksAtPort, SpinsBetweenThemWhereThatIsAllowed) {
  // It sees the same in the same time, with fewer system calls.
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  turnEnd->usePort(io.unixEventPort);
  FakeMember a(log, "a", 1);
  a.waiting = true;
  uint64_t before = turnEnd->getLooks();
  uint polls = 0;
  a.isThere = [&]() {
    polls += turnEnd->getLooks() == before + 4;
    return false;
  };
  uint count = looks(a);
  EXPECT_GT(count, 0u);
  EXPECT_LE(count, 4u + 4) << "a trial of 30 µs";
  if (count >= 5) {
    EXPECT_GT(polls, 2u) << "what comes then need not wait for the next look";
  }
}

TEST_F(LooksAtPort, FindsWhatComesThroughIt) {
  // Before anybody is told that we sleep.
  if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "no looks on a single CPU";
  FakeMember a(log, "a");
  a.waiting = true;
  auto pipe = io.provider->newTwoWayPipe();
  kj::byte buffer[1];
  auto read = pipe.ends[0]->read(buffer, 1).then([&]() { log += "read "; })
      .eagerlyEvaluate(nullptr);
  turn();
  pipe.ends[1]->write("x", 1).wait(io.waitScope);
  a.active();
  auto happened = turn();
  EXPECT_LT(happened.find("read "), happened.find("aS "));
}

TEST_F(LooksAtPort, BeforeTheEndOfTheTurnWhenItIsDue) {
  FakeMember a(log, "a");
  for (uint i = 0; i < 4000; i++) a.turnEnd().count(0);
  // Another thread's call is there already; it must be served first.
  auto& executor = kj::getCurrentThreadExecutor();
  std::atomic<bool> sent{false};
  kj::Thread thread([&]() {
    auto io = kj::setupAsyncIo();
    auto promise = executor.executeAsync([this]() { log += "call "; });
    sent = true;
    promise.wait(io.waitScope);
  });
  while (!sent) usleep(100);
  a.active();
  turn();
  EXPECT_EQ("call aF aS ", log);
}

}  // namespace
}  // namespace capnpshm
