// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/async-unix.h>
#include <kj/timer.h>

namespace capnpshm {

using kj::uint;

class PortSchedule {
  // Decides when a loop that has always something to do must look at its event port all the same.
  // KJ polls it only when there is nothing else to do, so that timers, sockets and other threads
  // would starve.
  //
  // A visit costs system calls, so there is one only now and then: after many messages, bytes or
  // milliseconds, or after a few that we spared the wait for a bell, which is still there. But
  // sooner after a socket was used, and at once when a timer expires.
  //
  // Knows no clock: the caller tells the time, that of CLOCK_MONOTONIC, in nanoseconds. Belongs to
  // its loop's thread.

public:
  void usePort(kj::UnixEventPort& port);
  // Tells which port it is. It must outlive this object. A visit costs less then, and timers can be
  // asked for.

  void took(size_t bytes) {
    // A message of so many.
    ++messages;
    this->bytes += bytes;
  }

  void foundSleepers(size_t count) { sleepers += count; }
  // So many of those that have asked for a bell had something before it was taken from the port.

  void usedSocket(uint64_t time) { socketUsedAt = time; }
  // A plain message was sent or received: there may soon be another.

  void lookAtClock(uint64_t time);
  // To be called often, or time does not count.

  bool isDue() const {
    return messages >= MAX_MESSAGES || bytes >= MAX_BYTES || sleepers >= MAX_SLEEPERS || timeIsUp;
  }

  uint64_t dueAt();
  // The time at which it will be due if nothing more is taken; 0 if it is. After lookAtClock().

  kj::Promise<void> visit();
  // Resolves after the port has run. Costs about three system calls; one if the port is known.

  void wasVisited();
  // It has run, perhaps since the loop was idle.

private:
  static constexpr uint MAX_MESSAGES = 2048;
  static constexpr size_t MAX_BYTES = 4 << 20;
  static constexpr uint64_t MAX_NANOSECONDS = 4000000;
  static constexpr size_t MAX_SLEEPERS = 4;
  // The bell of each waits there, and takes some microseconds to take; so not too many at once.
  static constexpr uint64_t FEW_NANOSECONDS = 1000000;
  static constexpr uint MANY_MESSAGES = 1024;
  // If the port is known, both together are enough: the latter keep that well below one system call
  // in a hundred small calls, of which a server takes two messages each.
  static constexpr uint64_t LEAST_NANOSECONDS = 20000;
  static constexpr uint64_t PART_OF_UNUSED = 8;
  // After a socket was used, this part of the time since then: more will come there if a connection
  // is being set up, or must stay plain, or another one follows. So what comes there waits for us
  // at most an eighth of what we have waited for it, and a few dozen visits are in vain each time.

  kj::Maybe<kj::Timer&> timer;       // Of the port, if that is known,
  kj::Maybe<kj::TimerImpl&> timers;  // and if what waits for it can be asked.
  uint messages = 0;                 // These since the last visit.
  size_t bytes = 0;
  size_t sleepers = 0;
  uint64_t since = 0;                // When we first looked at the clock since then; or 0.
  bool timeIsUp = false;
  uint64_t socketUsedAt = 0;         // Or 0 if none was yet.

  uint64_t timeIsUpAt();
  uint64_t nextTimer();
};

}  // namespace capnpshm
