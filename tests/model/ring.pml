/* Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE. */

/* One direction of a connection: the descriptor ring with its wrap-around and one JUMP, the counter
 * of consumed lines, and both sides' sleep words with both interests; ring.c++, doorbell.h and
 * docs/PROTOCOL.md, 4 and 6.
 *
 * Shown: every message arrives once, whole and in order; nobody overwrites a line that is not
 * consumed, nor reads a ring that was given back; and nobody sleeps for ever (Spin's search for
 * invalid end states).
 *
 * What must be there for this to hold; each of these, defined, leaves one out, and the check fails:
 *   NO_FENCE_BEFORE_SLEEP   between storing the sleep word and looking once more
 *   NO_FENCE_BEFORE_RING    between publishing and loading the peer's sleep word
 *   NO_SECOND_LOOK          looking once more
 *   NO_ROOM_INTEREST        waking a sender that waits for room
 *   NO_WAKE                 storing the sleep word on waking
 *   RELAXED_STAMP           the release order of a stamp
 *   RELAXED_STAMP_LOAD      the acquire order of its load
 *   RELAXED_CONSUMED        the release order of `consumed`: the payload may be read after it
 *   NO_LINE_IN_RESERVE      the free line that is kept for a JUMP
 */

#ifndef MESSAGES
#define MESSAGES 3
#endif
#define LINES 2          /* Of the first ring; */
#define MORE_LINES 4     /* of the second. */

#define STAMPS 0
#define PAYLOADS (STAMPS + LINES + MORE_LINES)
#define CONSUMED (PAYLOADS + LINES + MORE_LINES)
#define SLEEP_WORDS (CONSUMED + 1)
#define VARIABLES (SLEEP_WORDS + 2)

#include "store-buffers.pml"

#define SENDER 0
#define READER 1
#define JUMP 255
#define OTHERS_BYTES 254   /* What the memory of a ring holds once it was given back. */

#define WANT_DATA 1
#define WANT_ROOM 2

#ifdef RELAXED_STAMP
#define STAMP_ORDER RELAXED
#else
#define STAMP_ORDER RELEASE
#endif

#ifdef NO_ROOM_INTEREST
#define SERVED_BY_CONSUMING 0
#else
#define SERVED_BY_CONSUMING WANT_ROOM
#endif

#ifdef NO_LINE_IN_RESERVE
#define RESERVE 0
#else
#define RESERVE 1
#endif

bool bell[2];
bool ringGivenBack = false;

#define line(position, bigger) (bigger -> LINES + position % MORE_LINES : position % LINES)

#include "sleep.pml"

proctype Sender() {
  byte position = LINES, consumed = LINES, next = 1;
  byte epoch, rungEpoch, word, slot, lines = LINES, before, seen;
  bool armed = false, bigger = false, unrung = false;
  byte jumpedAt;

  do
  :: next > MESSAGES -> break

  :: next <= MESSAGES && position + 1 + RESERVE <= consumed + lines ->
     store(SENDER, PAYLOADS + line(position, bigger), next, RELAXED);
     store(SENDER, STAMPS + line(position, bigger), position, STAMP_ORDER);
     position++;
     next++;
     unrung = true;
     if
     :: ringPeer(SENDER, WANT_DATA); unrung = false
     :: skip   /* At the end of the turn, with others. */
     fi

  :: next <= MESSAGES && position + 1 + RESERVE > consumed + lines ->
     before = consumed;
     load(SENDER, CONSUMED, consumed);
     if
     :: bigger && !ringGivenBack && consumed > jumpedAt ->
        /* The old ring's memory is used for something else. */
        ringGivenBack = true;
        store(SENDER, STAMPS, OTHERS_BYTES, RELAXED);
        store(SENDER, STAMPS + 1, OTHERS_BYTES, RELAXED)
     :: else
     fi;
     if
     :: consumed != before
     :: consumed == before && !bigger ->
        assert(position + 1 <= consumed + lines);   /* The line in reserve. */
        store(SENDER, PAYLOADS + line(position, bigger), JUMP, RELAXED);
        store(SENDER, STAMPS + line(position, bigger), position, STAMP_ORDER);
        jumpedAt = position;
        position++;
        bigger = true;
        lines = MORE_LINES;
        unrung = true
     :: consumed == before ->
        if
        :: unrung -> ringPeer(SENDER, WANT_DATA); unrung = false
        :: else
        fi;
        sleep(SENDER, WANT_ROOM, CONSUMED, seen != 0 && seen != consumed)
     fi
  od;
  if
  :: unrung -> ringPeer(SENDER, WANT_DATA)
  :: else
  fi
}

proctype Reader() {
  byte position = LINES, told = LINES, expected = 1;
  byte epoch, rungEpoch, word, slot, stamp, payload, early, seen;
  bool armed = false, bigger = false;

  do
  :: expected > MESSAGES -> break
  :: else ->
     assert(!(ringGivenBack && !bigger));
#ifdef RELAXED_STAMP_LOAD
     load(READER, PAYLOADS + line(position, bigger), early);
#endif
     load(READER, STAMPS + line(position, bigger), stamp);
     if
     :: stamp == position ->
        if
#ifdef RELAXED_CONSUMED
        :: store(READER, CONSUMED, position + 1, RELAXED);
           ringPeer(READER, SERVED_BY_CONSUMING);
           told = position + 1;
           load(READER, PAYLOADS + line(position, bigger), payload)
#endif
        :: load(READER, PAYLOADS + line(position, bigger), payload)
        fi;
#ifdef RELAXED_STAMP_LOAD
        payload = early;
#endif
        position++;
        if
        :: payload == JUMP -> assert(!bigger); bigger = true
        :: else -> assert(payload == expected); expected++
        fi;
        payload = 0;
        stamp = 0;
        if
        :: told != position ->
           store(READER, CONSUMED, position, RELEASE);
           told = position;
           ringPeer(READER, SERVED_BY_CONSUMING)
        :: skip   /* Not worth it yet. */
        fi

     :: else ->
        stamp = 0;
        /* Before it sleeps it tells what it consumed. */
        if
        :: told != position ->
           store(READER, CONSUMED, position, RELEASE);
           told = position;
           ringPeer(READER, SERVED_BY_CONSUMING)
        :: else
        fi;
        sleep(READER, WANT_DATA, STAMPS + line(position, bigger), seen == position)
     fi
  od
}

init {
  atomic {
    memory[CONSUMED] = LINES;   /* By the reader's header, before anything else. */
    run StoreBuffer(SENDER);
    run StoreBuffer(READER);
    run Sender();
    run Reader()
  }
}
