// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Clocks and counters of the two processes that are measured.

#include <kj/array.h>
#include <kj/common.h>
#include <kj/io.h>
#include <kj/string.h>
#include <kj/vector.h>
#include <stdint.h>
#include <sys/types.h>
#include <vector>

namespace capnpshm {
namespace bench {

using kj::uint;

uint64_t now();
// Nanoseconds of the monotonic clock.

kj::String readFile(const char* path);
// The content of a small file or one of /proc; empty if it cannot be read.

constexpr uint ANY_CORE = kj::maxValue;

kj::Vector<uint> usableCores();
void pinTo(pid_t process, uint core);
// Process 0 is the caller. With ANY_CORE it may go on to run on all.

void raiseFdLimit();

double cpuSecondsOf(pid_t process);
// CPU time that a process has used since it began.

struct ContextSwitches {
  // Of a process, all threads, since it began.

  uint64_t voluntary = 0;  // It went to sleep.
  uint64_t forced = 0;
  uint64_t all() const { return voluntary + forced; }

  static ContextSwitches of(pid_t process);
};

struct Memory {
  // Resident memory of a process in bytes.

  uint64_t anonymous = 0;
  uint64_t shared = 0;

  static Memory of(pid_t process);
};

struct RegionsTouched {
  // Bytes that a process has touched of the regions of shared memory it writes.

  uint64_t largest = 0;
  uint64_t total = 0;

  static RegionsTouched of(pid_t process);
};

class SystemCallCounter {
  // Counts the system calls of a process, all threads, by the kernel's tracepoint.

public:
  explicit SystemCallCounter(pid_t process);
  bool isPermitted() const { return permitted; }
  uint64_t read() const;

private:
  kj::Vector<kj::AutoCloseFd> events;
  bool permitted = false;
};

class Latencies {
  // Of the calls of one slice, in nanoseconds.

public:
  Latencies();
  void clear() {
    count = 0;
    sorted = 0;
  }
  void add(uint64_t nanoseconds) {
    // Those beyond a million are left out.
    if (count < values.size()) values[count++] = nanoseconds;
  }

  double percentile(double fraction);
  // In microseconds. 0 if there are none.

private:
  std::vector<uint64_t> values;
  size_t count = 0;
  size_t sorted = 0;
};

}  // namespace bench
}  // namespace capnpshm
