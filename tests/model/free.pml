/* Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE. */

/* Messages that are read in place, and the free ring by which their blocks come back; ring.c++,
 * outbox.c++ and docs/PROTOCOL.md, 4, "Who frees what, and when".
 *
 * The sender has BLOCKS blocks, writes each message into a free one and publishes its number. The
 * reader holds up to BLOCKS messages, reads them as long as it likes and frees them in any order.
 *
 * Shown: no block is written while somebody reads it, none is lost, and nobody sleeps for ever.
 *
 * What must be there for this to hold; each of these, defined, leaves one out, and the check fails:
 *   NO_FENCE_BEFORE_SLEEP   between storing the sleep word and looking once more
 *   NO_FENCE_BEFORE_RING    between freeing and loading the peer's sleep word
 *   RELAXED_FREED           the release order of `freed`: handles, or reads, may come after it
 *   EARLY_READ_OF_HANDLE    the acquire order of its load: a handle may be read before it
 *   REUSE_WHEN_CONSUMED     waiting for the free ring instead of for `consumed`
 */

#ifndef MESSAGES
#define MESSAGES 4
#endif
#define BLOCKS 2

#define STAMPS 0                        /* As many lines as messages: ring.pml has the wrapping. */
#define HANDLES (STAMPS + MESSAGES)     /* In the lines. */
#define PAYLOADS (HANDLES + MESSAGES)   /* In the blocks. */
#define FREE_RING (PAYLOADS + BLOCKS)
#define FREED (FREE_RING + BLOCKS)
#define SLEEP_WORDS (FREED + 1)
#define VARIABLES (SLEEP_WORDS + 2)

#include "store-buffers.pml"

#define SENDER 0
#define READER 1
#define WANT_DATA 1
#define WANT_ROOM 2

bool bell[2];

#include "sleep.pml"

proctype Sender() {
  byte next = 0, freed = 0, handle, payload;
  byte epoch, rungEpoch, word, slot, seen, early;
  bool armed = false;
  bool taken[BLOCKS];

  do
  :: next == MESSAGES -> break
  :: else ->
     handle = 0;
     do
     :: handle < BLOCKS && taken[handle] -> handle++
     :: else -> break
     od;
     if
     :: handle < BLOCKS ->
        taken[handle] = true;
        store(SENDER, PAYLOADS + handle, next + 1, RELAXED);
        store(SENDER, HANDLES + next, handle, RELAXED);
        store(SENDER, STAMPS + next, 1, RELEASE);
        next++;
        ringPeer(SENDER, WANT_DATA);
#ifdef REUSE_WHEN_CONSUMED
        taken[handle] = false
#endif
     :: else ->
#ifdef EARLY_READ_OF_HANDLE
        load(SENDER, FREE_RING + freed % BLOCKS, early);
#endif
        load(SENDER, FREED, seen);
        if
        :: seen != freed ->
           load(SENDER, FREE_RING + freed % BLOCKS, handle);
#ifdef EARLY_READ_OF_HANDLE
           handle = early;
#endif
           assert(taken[handle]);
           taken[handle] = false;
           freed++;
           seen = 0
        :: else -> sleep(SENDER, WANT_ROOM, FREED, seen != freed)
        fi
     fi
  od
}

inline giveBack(handle) {
  /* A reader that is about to let go of a message looks at it one last time. */
#ifdef RELAXED_FREED
  store(READER, FREED, freed + 1, RELAXED);
#endif
  load(READER, PAYLOADS + handle, payload);
  assert(payload == held[handle]);
  payload = 0;
  held[handle] = 0;
  holding--;
  store(READER, FREE_RING + freed % BLOCKS, handle, RELAXED);
#ifndef RELAXED_FREED
  store(READER, FREED, freed + 1, RELEASE);
#endif
  freed++;
  ringPeer(READER, WANT_ROOM)
}

proctype Reader() {
  byte next = 0, freed = 0, handle, payload, stamp, holding;
  byte epoch, rungEpoch, word, slot, seen;
  bool armed = false;
  byte held[BLOCKS];   /* What the message in each block was when it came; 0 if none is held. */

  do
  :: held[0] != 0 -> giveBack(0)
  :: held[1] != 0 -> giveBack(1)
  :: next < MESSAGES ->
     load(READER, STAMPS + next, stamp);
     if
     :: stamp == 1 ->
        stamp = 0;
        load(READER, HANDLES + next, handle);
        assert(held[handle] == 0);
        load(READER, PAYLOADS + handle, payload);
        assert(payload == next + 1);
        held[handle] = payload;
        holding++;
        payload = 0;
        handle = 0;
        next++
     :: stamp == 0 && holding == 0 -> sleep(READER, WANT_DATA, STAMPS + next, seen == 1)
     :: else
     fi
  :: next == MESSAGES && holding == 0 -> break
  od
}

init {
  atomic {
    run StoreBuffer(SENDER);
    run StoreBuffer(READER);
    run Sender();
    run Reader()
  }
}
