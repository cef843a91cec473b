// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "fault-point.h"
#include "layout.h"
#include "ring.h"

namespace capnpshm {

class SleepWord {
  // This side's sleep word, in its own region: tells the peer whether to wake us, and for what.
  //
  // To sleep: arm(), then check once more whether what is wanted is there, and only then wait for
  // a bell. On waking, or if the check found something: wake(), before draining. Each change has
  // a new epoch, so that the peer rings at most once for each.
  //
  // Why no wake-up is lost: we store the word, fence, load the ring; the peer stores into the
  // ring, fences, loads the word (PeerSleepWord::mustRing()). By the two fences at least one of us
  // sees the other's store.

public:
  explicit SleepWord(SharedWord& word): word(word) {}

  bool arm(uint64_t interests) {
    // Announces that we sleep and want to be woken for `interests` (WANT_DATA, WANT_ROOM). True if
    // the word changed, so that the caller must check once more; if not, it did before.
    if (interests == armed) return false;
    armed = interests;
    // Relaxed: ordered before the caller's check by the fence, which pairs with that in
    // PeerSleepWord::mustRing().
    word.store(++epoch << SLEEP_EPOCH_SHIFT | interests, std::memory_order_relaxed);
    faultPoint();
    fullFence();
    return true;
  }

  void wake() {
    // Announces that we are awake. Relaxed: if the peer sees it late it rings once too often.
    if (armed == 0) return;
    armed = 0;
    word.store(++epoch << SLEEP_EPOCH_SHIFT, std::memory_order_relaxed);
    faultPoint();
  }

  bool isArmed() const { return armed != 0; }

private:
  SharedWord& word;
  uint64_t epoch = 0;
  uint64_t armed = 0;
};

class PeerSleepWord {
  // The peer's sleep word, as we read it.

public:
  explicit PeerSleepWord(const SharedWord& word): word(word) {}

  bool mustRing(uint64_t served) {
    // After something was published for the peer's interests `served`: whether it sleeps and must
    // be woken. Says so once an epoch. Whatever a hostile peer writes here, it costs us one bell a
    // call at most.
    //
    // The fence orders our publishing before the load, which can be relaxed, and pairs with that in
    // SleepWord::arm().
    fullFence();
    uint64_t value = word.load(std::memory_order_relaxed);
    if ((value & served) == 0 || value >> SLEEP_EPOCH_SHIFT == rungEpoch) return false;
    rungEpoch = value >> SLEEP_EPOCH_SHIFT;
    return true;
  }

private:
  const SharedWord& word;
  uint64_t rungEpoch = 0;
};

}  // namespace capnpshm
