// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/common.h>
#include <stdint.h>

namespace capnpshm {

using kj::uint;

class SpinBudget {
  // Decides how long to look for something before going to sleep. Knows no clock: the caller tells
  // what came of it. All times in nanoseconds.
  //
  // What it weighs: a sleep and its wake-up together cost both sides 20 to 40 µs of CPU and add
  // 30-60 µs to the answer, more on some machines. A spin that finds something within that time has
  // paid for itself, also the answer of a peer that had to be woken up for it, the usual case of
  // calls with pauses; one that finds nothing, or finds it later, has not. (As in the ski rental
  // problem, nobody who knew all in advance would pay less than half.) So:
  //
  // - As long as spins pay, the next may last a few times as long as they took;
  // - after many in a row that did, a good deal longer, and the longer the more there were: if it
  //   is late this time, the peer was interrupted rather than that it has stopped, and if not, the
  //   one spin in vain is little beside what those saved. (Each earns another 64th of a sleep.)
  // - After a few in a row that did not, there are no more of them,
  // - but a trial now and then, when sleeps turn out short, or when the peer turns out to be awake
  //   after we were not. Trials that fail become rarer, each time by half; and they are rarer from
  //   the beginning if the peer last ran on our own CPU, where it cannot answer while we spin. (If
  //   it may run elsewhere, a spin is what makes the scheduler move it.)
  //
  // What a sleep costs on this machine is learned from sleeps that an answer ends. Their request
  // was sent just before and has woken the peer, so that they last for two wake-ups and the peer's
  // work.
  //
  // An event loop has two of these, since answers and requests come at different times: one that
  // calls with pauses finds its answers soon and its pauses never. And others, for the same reason,
  // for its looks at the port.

public:
  enum Purpose { FOR_ANSWERS, FOR_REQUESTS };

  SpinBudget(Purpose purpose, uint64_t longestTrial, uint64_t sleepCost = LEAST_SLEEP_COST)
      : purpose(purpose), longestTrial(longestTrial), sleepCost(sleepCost) {}
  // `longestTrial` is how long a spin of a trial may last where a sleep costs the least, and
  // `sleepCost` what one is taken to cost until more is known.

  uint64_t next(uint64_t longest) const {
    // How long to spin now, `longest` being what the options allow; 0 for not at all.
    if (credit == 0) return 0;
    if (hitsInARow == 0) {
      return kj::min(longestTrial * sleepCost / LEAST_SLEEP_COST, longest);
    }
    // Not much longer than what would count as paying.
    uint64_t usual = kj::min(LEAST_SPIN + HIT_FACTOR * averageHit, sleepCost * 10 / 9);
    if (hitsInARow < STEADY_HITS) return kj::min(usual, longest);
    return kj::min(kj::max(usual, sleepCost * (1 + hitsInARow / HITS_PER_SLEEP)), longest);
  }

  bool isTrial() const { return hitsInARow == 0; }
  // Whether the next spin, if there is one, is to find out whether they pay.

  bool isGivenUp() const { return credit == 0; }
  // Whether there are no spins at present; only then do slept() and peerWasAwake() matter.

  uint64_t getAverageHit() const { return averageHit; }

  void hit(uint64_t nanoseconds) {
    // A spin found something after this time.
    if (nanoseconds > sleepCost) {
      miss();
      return;
    }
    averageHit = hitsInARow > 0 ? averageHit - averageHit / 8 + nanoseconds / 8 : nanoseconds;
    ++hitsInARow;
    credit = FULL_CREDIT;
    if (trialInterval > 1) trialInterval /= 2;
  }

  void miss() {
    // A spin found nothing, or too late.
    hitsInARow = 0;
    if (credit > 0 && --credit == 0 && trialInterval < MAX_TRIAL_INTERVAL) trialInterval *= 2;
  }

  void slept(uint64_t nanoseconds, bool peersShareCpu) {
    // The loop was asleep for this time, between the end of a turn and the next activity; all peers
    // had been on its own CPU, or some were elsewhere.
    if (credit > 0 || nanoseconds > SHORT_SLEEP) return;
    if (purpose == FOR_ANSWERS && !peersShareCpu) learn(nanoseconds * 2 / 3);
    considerTrial(peersShareCpu ? 1 : ELSEWHERE_WEIGHT);
  }

  void peerWasAwake() {
    // We published something after having slept and found the peer still awake. Perhaps it spins;
    // perhaps it only had something else to do.
    if (credit == 0) considerTrial(ELSEWHERE_WEIGHT * AWAKE_WEIGHT);
  }

private:
  static constexpr uint64_t LEAST_SPIN = 10000;
  static constexpr uint64_t STEADY_HITS = 16;
  static constexpr uint64_t HITS_PER_SLEEP = 64;
  static constexpr uint64_t HIT_FACTOR = 3;
  static constexpr uint64_t LEAST_SLEEP_COST = 45000;
  static constexpr uint64_t MOST_SLEEP_COST = 95000;
  static constexpr uint64_t LEARNING = 32;        // A step is this part of what is known.
  static constexpr uint64_t SHORT_SLEEP = 300000;
  // Two wake-ups on a slow machine, and some work.
  static constexpr uint FULL_CREDIT = 4;
  static constexpr uint TRIAL_CREDIT = 2;
  static constexpr uint ELSEWHERE_WEIGHT = 8;  // Of a short sleep whose peer was on another CPU.
  static constexpr uint AWAKE_WEIGHT = 8;      // Of a peer that was awake, in such sleeps.
  static constexpr uint MAX_TRIAL_INTERVAL = 256;

  Purpose purpose;
  uint64_t longestTrial;
  uint64_t sleepCost;
  uint64_t hitsInARow = 0;    // 0 if spins do not pay at present.
  uint64_t averageHit = 0;    // Of those.
  uint credit = FULL_CREDIT;  // How many more spins in a row may fail to pay.
  uint trialInterval = 1;     // How many short sleeps it takes for a trial.
  uint reasons = 0;           // In units of one with the peer on our CPU.

  void learn(uint64_t cost) {
    // By small steps towards it: to the median, which outliers do not move.
    uint64_t step = sleepCost / LEARNING;
    sleepCost = cost > sleepCost ? kj::min(sleepCost + step, MOST_SLEEP_COST)
                                 : kj::max(sleepCost - step, LEAST_SLEEP_COST);
  }

  void considerTrial(uint weight) {
    reasons += weight;
    if (reasons < trialInterval * ELSEWHERE_WEIGHT) return;
    reasons = 0;
    credit = TRIAL_CREDIT;
  }
};

}  // namespace capnpshm
