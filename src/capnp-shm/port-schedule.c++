// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "port-schedule.h"

namespace capnpshm {

void PortSchedule::usePort(kj::UnixEventPort& port) {
  timer = port.getTimer();
  timers = kj::dynamicDowncastIfAvailable<kj::TimerImpl>(port.getTimer());
}

void PortSchedule::lookAtClock(uint64_t time) {
  if (since == 0) since = time;
  if (time >= timeIsUpAt()) timeIsUp = true;
}

uint64_t PortSchedule::dueAt() { return isDue() ? 0 : timeIsUpAt(); }

uint64_t PortSchedule::timeIsUpAt() {
  bool cheap = timer != nullptr && messages >= MANY_MESSAGES;
  uint64_t longest = cheap ? FEW_NANOSECONDS : MAX_NANOSECONDS;
  if (socketUsedAt != 0) {
    uint64_t unused = since - kj::min(since, socketUsedAt);
    longest = kj::min(longest, kj::max(unused / PART_OF_UNUSED, LEAST_NANOSECONDS));
  }
  return kj::min(since + longest, nextTimer());
}

uint64_t PortSchedule::nextTimer() {
  // When the next timer expires that something on the loop waits for; never, as far as we can ask.
  KJ_IF_MAYBE(t, timers) {
    KJ_IF_MAYBE(event, t->nextEvent()) {
      return (*event - kj::origin<kj::TimePoint>()) / kj::NANOSECONDS;
    }
  }
  return kj::maxValue;
}

void PortSchedule::wasVisited() {
  messages = 0;
  bytes = 0;
  sleepers = 0;
  since = 0;
  timeIsUp = false;
}

kj::Promise<void> PortSchedule::visit() {
  // What is counted stays as it is until then, or others could keep the loop from the port.
  auto visited = kj::Promise<void>(nullptr);
  KJ_IF_MAYBE(t, timer) {
    // The port serves its timer when it has asked the system for everything else.
    visited = t->afterDelay(0 * kj::SECONDS);
  } else {
    // A fulfiller for other threads goes through it. (port.poll() would swallow events of other
    // threads.)
    auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
    paf.fulfiller->fulfill();
    visited = kj::mv(paf.promise);
  }
  return visited.then([this]() { wasVisited(); });
}

}  // namespace capnpshm
