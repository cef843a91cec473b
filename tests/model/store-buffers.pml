/* Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE. */

/* Memory as two processors see it that may delay and reorder their stores.
 *
 * Each process has a buffer of stores which nobody else sees yet. They reach memory one by one, in
 * any order but these: stores to one variable keep their order, and a release store waits for all
 * that were made before it. A load sees the process's own stores first. A full fence waits until
 * the buffer is empty. That is weaker than x86 (TSO) and covers what aarch64 does with stores;
 * loads that may be early or late are modelled where they matter, by the variants of each model
 * which leave an acquire or a release out. */

#define RELAXED 0
#define RELEASE 1
#define BUFFERED 5

byte memory[VARIABLES];

typedef Buffer {
  byte length;
  byte variable[BUFFERED];
  byte value[BUFFERED];
  bit release[BUFFERED];
}
Buffer buffers[2];

inline store(me, which, what, order) {
  atomic {
    buffers[me].length < BUFFERED;
    buffers[me].variable[buffers[me].length] = which;
    buffers[me].value[buffers[me].length] = what;
    buffers[me].release[buffers[me].length] = order;
    buffers[me].length++;
  }
}

inline load(me, which, result) {
  d_step {
    result = memory[which];
    slot = 0;
    do
    :: slot < buffers[me].length ->
       if
       :: buffers[me].variable[slot] == which -> result = buffers[me].value[slot]
       :: else
       fi;
       slot++
    :: else -> break
    od;
    slot = 0
  }
}

inline fence(me) { buffers[me].length == 0 }

proctype StoreBuffer(byte me) {
  /* Lets one store after the other through. */
  byte chosen, earlier;
  bool allowed;
end:
  do
  :: atomic {
       buffers[me].length > 0 ->
       chosen = 0;
       do
       :: chosen + 1 < buffers[me].length -> chosen++
       :: break
       od;
       allowed = true;
       earlier = 0;
       do
       :: earlier < chosen ->
          if
          :: buffers[me].release[chosen] ||
             buffers[me].variable[earlier] == buffers[me].variable[chosen] -> allowed = false
          :: else
          fi;
          earlier++
       :: else -> break
       od;
       if
       :: allowed ->
          memory[buffers[me].variable[chosen]] = buffers[me].value[chosen];
          do
          :: chosen + 1 < buffers[me].length ->
             buffers[me].variable[chosen] = buffers[me].variable[chosen + 1];
             buffers[me].value[chosen] = buffers[me].value[chosen + 1];
             buffers[me].release[chosen] = buffers[me].release[chosen + 1];
             chosen++
          :: else -> break
          od;
          buffers[me].length--;
          buffers[me].variable[buffers[me].length] = 0;
          buffers[me].value[buffers[me].length] = 0;
          buffers[me].release[buffers[me].length] = 0
       :: else
       fi;
       chosen = 0; earlier = 0; allowed = false
     }
  od
}
