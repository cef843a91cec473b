// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What can go wrong with a system call, and what is to come of it.

#include "fault-workload.h"
#include "system-call-tracer.h"

#include <ostream>
#include <vector>

namespace capnpshm {
namespace process {

using kj::uint;

constexpr uint EVERY = 0;
constexpr uint64_t LARGE = 140 * 1024;
// An allocation which malloc() hands on to the system, and which nothing but a large message needs.

enum class Outcome {
  WORKS,            // In shared memory, all results are right.
  STAYS_PLAIN,      // So they are, and it says why it is plain.
  LOSES_FDS,        // File descriptors do not arrive, all else does.
  CALL_FAILS,       // The call that needed it, and says why; the connection goes on.
  CONNECTION_FAILS  // The process learns why, its peer that it is disconnected.
};

enum class Effect {
  FAIL,             // With `error`.
  SHORT,            // A single byte is read or written.
  NO_FDS            // Received file descriptors are cut off, as at the limit for open files.
};

using Filter = bool (*)(const SystemCall&);

struct Fault {
  const char* name;
  Filter matches;
  Effect effect;
  std::vector<int> errors;
  Phase phase;
  uint count;           // How many calls of the phase, from its first one on; or EVERY.
  Outcome outcome;
  const char* reason;   // In the words of the process, if it has to say one.
  enum { BOTH, TRUSTED, UNTRUSTED } trust = BOTH;
};

inline void PrintTo(const Fault& fault, std::ostream* out) { *out << fault.name; }

bool isLargeAllocation(const SystemCall& call);
// By malloc(), for more than LARGE.

std::vector<Fault> faults();
// All of them; docs/TESTING.md has the same in short.

}  // namespace process
}  // namespace capnpshm
