/* Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE. */

/* Sleeping and waking; doorbell.h and docs/PROTOCOL.md, 6. A sleep word is
 * epoch<<2 | wantRoom<<1 | wantData. The caller has the variables epoch, rungEpoch, armed, word and
 * seen. */

inline ringPeer(me, served) {
  /* PeerSleepWord::mustRing(), and the bell. */
#ifndef NO_FENCE_BEFORE_RING
  fence(me);
#endif
  load(me, SLEEP_WORDS + 1 - me, word);
  if
  :: (word & served) && (word >> 2) != rungEpoch -> rungEpoch = word >> 2; bell[1 - me] = true
  :: else
  fi;
  word = 0
}

inline sleep(me, interest, lookAgain, found) {
  /* SleepWord::arm(), the second look, the wait for a bell, SleepWord::wake(). `lookAgain` is a
   * variable of shared memory; `found` tells whether what is in `seen` then is worth waking. */
  if
  :: armed -> seen = 0
  :: else ->
     armed = true;
     epoch++;
     store(me, SLEEP_WORDS + me, epoch << 2 | interest, RELAXED);
#ifndef NO_FENCE_BEFORE_SLEEP
     fence(me);
#endif
#ifndef NO_SECOND_LOOK
     load(me, lookAgain, seen)
#endif
  fi;
  if
  :: found
  :: else -> bell[me]; bell[me] = false
  fi;
  seen = 0;
#ifndef NO_WAKE
  armed = false;
  epoch++;
  store(me, SLEEP_WORDS + me, epoch << 2, RELAXED)
#endif
}
