# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

@0xb0a83b9d2d6ac7f1;

$import "/capnp/c++.capnp".namespace("capnpshm::bench");

interface Target {
  # What the measured server offers.

  echo @0 (number :UInt64) -> (number :UInt64);
  # The small call.

  put @1 (data :Data, read :Bool) -> (sum :UInt64);
  # A payload in the params. `read`: the server reads all of it and returns the sum of its words.

  get @2 (bytes :UInt64, write :Bool) -> (data :Data, sum :UInt64);
  # A payload in the results. `write`: the server writes all of it, and tells the sum of its words.

  write @3 (data :Data, read :Bool) -> stream;
  finish @4 () -> (bytes :UInt64, sum :UInt64);
  # A stream, and what came through it since the last finish().

  hold @5 (data :Data) -> ();
  # Never returns, so the params stay where they are until the connection ends.

  counters @6 () -> (counters :Counters);
  # What the server's ends of all open connections have done so far.

  trapSystemCalls @7 (on :Bool) -> (permitted :Bool, count :UInt64);
  # The server counts its system calls by a SystemCallTrap from now on, or no longer: how many there
  # were since.
}

struct Counters {
  connections @0 :UInt32;
  doorbells @1 :UInt64;
  sleeps @2 :UInt64;
  sharedBytes @3 :UInt64;
  copiedBytes @4 :UInt64;
  heapWaits @5 :UInt64;
}

struct Task {
  # What the driver asks a client process to do, once.

  case @0 :Text;
  payloadBytes @1 :UInt64;
  window @2 :UInt32 = 1;
  gapMicroseconds @3 :UInt32;
  connections @4 :UInt32 = 1;
  seconds @5 :Float64;
  # How long to measure.
  warmUpSeconds @6 :Float64;
  calls @7 :UInt64;
  # If not 0, measure so many calls instead.
  countSystemCalls @8 :Bool;
  # Try to count system calls. (Counting slows them down, so the times are worth less.)
  callsEach @9 :UInt32 = 1;
}

struct Figure {
  name @0 :Text;
  value @1 :Float64;
}

struct Outcome {
  union {
    figures @0 :List(Figure);
    error @1 :Text;
  }
}
