// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/spin-budget.h>

#include <gtest/gtest.h>

namespace capnpshm {
namespace {

constexpr uint64_t LONGEST = 50000;
constexpr uint64_t SHORT_SLEEP = 2 * LONGEST;
constexpr uint64_t LONG_SLEEP = 1000 * LONGEST;

void exhaust(SpinBudget& budget) {
  while (budget.next(LONGEST) > 0) budget.miss();
}

uint sleepsUntilTrial(SpinBudget& budget, uint64_t length, bool peersShareCpu = false) {
  // How many sleeps of a length it takes until there is a spin again.
  for (uint i = 1; i <= 100000; i++) {
    budget.slept(length, peersShareCpu);
    if (budget.next(LONGEST) > 0) return i;
  }
  return 0;
}

TEST(SpinBudget, NeverLongerThanAllowed) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  EXPECT_EQ(LONGEST, budget.next(LONGEST)) << "begins with a trial";
  EXPECT_EQ(7u, SpinBudget(SpinBudget::FOR_REQUESTS, 7).next(LONGEST))
      << "which may be a short one";
  EXPECT_EQ(0u, budget.next(0)) << "0 is never";
  EXPECT_EQ(1u, budget.next(1));
  budget.hit(15000);
  EXPECT_EQ(LONGEST, budget.next(LONGEST));
  EXPECT_EQ(100u, budget.next(100));
}

TEST(SpinBudget, PaysUpToWhatASleepCosts) {
  SpinBudget usual(SpinBudget::FOR_REQUESTS, LONGEST);
  SpinBudget dear(SpinBudget::FOR_REQUESTS, LONGEST, 60000);
  for (int i = 0; i < 100; i++) {
    usual.hit(55000);
    dear.hit(55000);
  }
  EXPECT_EQ(0u, usual.next(10 * LONGEST));
  EXPECT_GE(dear.next(10 * LONGEST), 60000u);
}

TEST(SpinBudget, AsLongAsItPaysAFewTimesWhatItTook) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  for (int i = 0; i < 1000; i++) {
    if (i % 10 == 0) budget.miss();
    budget.hit(2000);
    uint64_t next = budget.next(LONGEST);
    EXPECT_GE(next, 2000u);
    EXPECT_LE(next, 20000u);
  }
  // It follows when answers take longer.
  uint64_t before = budget.next(LONGEST);
  for (int i = 0; i < 100; i++) {
    if (i % 10 == 0) budget.miss();
    budget.hit(8000);
  }
  EXPECT_GT(budget.next(LONGEST), before);
  EXPECT_GE(budget.next(LONGEST), 2 * 8000u);

  // But hardly longer than what would be worth it.
  budget.hit(40000);
  budget.miss();
  for (int i = 0; i < 10; i++) budget.hit(40000);
  EXPECT_EQ(50000u, budget.next(10 * LONGEST));

  // One that failed does not end it, nor several with a hit in between.
  for (int i = 0; i < 100; i++) {
    budget.miss();
    EXPECT_GT(budget.next(LONGEST), 0u);
    budget.miss();
    EXPECT_GT(budget.next(LONGEST), 0u);
    budget.hit(2000);
  }
}

TEST(SpinBudget, PatientAfterManyInARowThatPaid) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  uint count = 0;
  do {
    budget.hit(2000);
    ASSERT_LT(++count, 100u);
  } while (budget.next(LONGEST) <= 20000u);
  EXPECT_GT(count, 10u);
  EXPECT_LE(budget.next(20000), 20000u);

  // Once in vain, and it must be earned anew.
  budget.miss();
  budget.hit(2000);
  EXPECT_LE(budget.next(LONGEST), 20000u);
}

TEST(SpinBudget, TheMorePatientTheMoreThatPaid) {
  // A peer that was there ten thousand times was interrupted, and both are spared a sleep if we
  // wait.
  constexpr uint64_t ALLOWED = 1000000, SLEEP = 45000;
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  for (uint hits = 1; hits <= 10000; hits++) {
    budget.hit(2000);
    // What this may cost if it is in vain is in proportion to what was saved before.
    EXPECT_LE(budget.next(ALLOWED), SLEEP + hits * SLEEP / 64) << hits;
  }
  EXPECT_EQ(ALLOWED, budget.next(ALLOWED));
  EXPECT_EQ(LONGEST, budget.next(LONGEST));
  budget.miss();
  budget.hit(2000);
  EXPECT_LT(budget.next(ALLOWED), SLEEP);
}

TEST(SpinBudget, AnAnswerThatTakesAWakeUpStillPays) {
  // As of one that calls with pauses: its peer sleeps each time, but it need not as well.
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  for (int i = 0; i < 100; i++) {
    budget.hit(40000);
    EXPECT_EQ(LONGEST, budget.next(LONGEST));
  }
}

TEST(SpinBudget, LearnsWhatASleepCosts) {
  // From sleeps that answers end, which last for two wake-ups.
  constexpr uint64_t ALLOWED = 1000000;
  auto longestPayingHit = [](SpinBudget& budget) {
    uint64_t result = 0;
    for (uint64_t hit = 1000; hit < ALLOWED; hit += 1000) {
      auto copy = budget;
      copy.hit(hit);
      if (copy.next(ALLOWED) == 0) break;
      result = hit;
    }
    return result;
  };
  auto learn = [](SpinBudget& budget, uint64_t length, bool peersShareCpu = false) {
    for (int i = 0; i < 100; i++) {
      exhaust(budget);
      budget.slept(length, peersShareCpu);
    }
    // So that the next one that does not pay is the last.
    exhaust(budget);
    while (budget.next(ALLOWED) == 0) budget.slept(length, peersShareCpu);
    budget.miss();
  };
  SpinBudget answers(SpinBudget::FOR_ANSWERS, 50000);
  learn(answers, 30000);
  EXPECT_EQ(45000u, longestPayingHit(answers)) << "at least";
  EXPECT_EQ(50000u, answers.next(ALLOWED));
  learn(answers, 120000);
  EXPECT_NEAR(80000, longestPayingHit(answers), 5000);
  EXPECT_NEAR(89000, answers.next(ALLOWED), 6000);
  EXPECT_EQ(LONGEST, answers.next(LONGEST)) << "never longer than allowed";
  learn(answers, 290000);
  EXPECT_NEAR(95000, longestPayingHit(answers), 1000) << "at most";
  learn(answers, 30000);
  EXPECT_EQ(45000u, longestPayingHit(answers)) << "and it forgets";

  // Where the peer must wait for us to sleep, its length tells nothing; nor does that of a pause.
  learn(answers, 120000, true);
  EXPECT_EQ(45000u, longestPayingHit(answers));
  SpinBudget requests(SpinBudget::FOR_REQUESTS, 50000);
  learn(requests, 120000);
  EXPECT_EQ(45000u, longestPayingHit(requests));
}

TEST(SpinBudget, AnAnswerFromAPeerThatIsSlowToWakeUpPaysOnceThatIsKnown) {
  // Both sides sleep each time, and a spin of the usual length finds nothing just before the answer
  // comes.
  SpinBudget budget(SpinBudget::FOR_ANSWERS, LONGEST);
  constexpr uint64_t ANSWER = 60000;
  uint found = 0, calls = 0;
  for (; calls < 1000 && found < 10; calls++) {
    uint64_t spin = budget.next(2 * LONGEST);
    if (spin >= ANSWER) {
      budget.hit(ANSWER);
      ++found;
      continue;
    }
    found = 0;
    if (spin > 0) budget.miss();
    budget.slept(2 * ANSWER - spin, false);
  }
  EXPECT_LT(calls, 500u);
}

TEST(SpinBudget, EndsAfterAFewThatDidNotPay) {
  for (bool late: { false, true }) {
    SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
    budget.hit(2000);
    uint count = 0;
    while (budget.next(LONGEST) > 0) {
      ASSERT_LT(++count, 10u);
      // To find something after longer than sleep and wake-up cost is no gain.
      if (late) budget.hit(LONGEST); else budget.miss();
    }
    EXPECT_GE(count, 2u);
    for (int i = 0; i < 1000; i++) {
      budget.slept(LONG_SLEEP, false);
      EXPECT_EQ(0u, budget.next(LONGEST)) << "long sleeps are no reason for another trial";
    }
  }
}

TEST(SpinBudget, TrialsBecomeRarerAndStayRare) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  uint last = 0;
  for (int i = 0; i < 20; i++) {
    exhaust(budget);
    uint sleeps = sleepsUntilTrial(budget, SHORT_SLEEP);
    EXPECT_GE(sleeps, last);
    EXPECT_LE(sleeps, kj::max(2 * last, 2u));
    EXPECT_GE(sleeps, 1u);
    last = sleeps;
  }
  EXPECT_EQ(256u, last) << "what SharedMemoryOptions::spinMicroseconds promises";

  // Spins that pay bring them back.
  for (int i = 0; i < 8; i++) budget.hit(2000);
  exhaust(budget);
  EXPECT_LE(sleepsUntilTrial(budget, SHORT_SLEEP), 2u);
}

TEST(SpinBudget, TrialsAreRarerIfThePeerCannotRunMeanwhile) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  uint last = 0;
  for (int i = 0; i < 20; i++) {
    exhaust(budget);
    last = sleepsUntilTrial(budget, SHORT_SLEEP, true);
    EXPECT_GE(last, 8u);
  }
  EXPECT_EQ(2048u, last) << "what SharedMemoryOptions::spinMicroseconds promises";
  // Once it is elsewhere they are as usual.
  exhaust(budget);
  EXPECT_EQ(256u, sleepsUntilTrial(budget, SHORT_SLEEP));
}

TEST(SpinBudget, PeerThatSpinsIsAReason) {
  SpinBudget budget(SpinBudget::FOR_REQUESTS, LONGEST);
  for (int i = 0; i < 20; i++) {
    exhaust(budget);
    sleepsUntilTrial(budget, SHORT_SLEEP);
  }
  exhaust(budget);
  uint count = 0;
  while (budget.next(LONGEST) == 0) {
    budget.peerWasAwake();
    ASSERT_LT(++count, 100u);
  }
  // It happens after every call of one that calls with pauses, so trials must stay rare for it too.
  EXPECT_GT(count, 16u);
  EXPECT_LT(count, 64u) << "a stronger reason than a short sleep";

  // While it spins itself it makes no difference.
  uint64_t next = budget.next(LONGEST);
  for (int i = 0; i < 1000; i++) budget.peerWasAwake();
  EXPECT_EQ(next, budget.next(LONGEST));
  exhaust(budget);
  EXPECT_GT(sleepsUntilTrial(budget, SHORT_SLEEP), 100u);
}

}  // namespace
}  // namespace capnpshm
