// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "busy-poll.h"

#include <time.h>
#include <unistd.h>
#include <utility>
#include <kj/debug.h>

namespace capnpshm {

namespace {

constexpr uint ROUNDS_PER_LOOK_AT_CLOCK = 8;

thread_local TurnEnd* currentTurnEnd = nullptr;
// Owns nothing; set and cleared by the instance itself. An event loop cannot be asked for what
// belongs to it before Cap'n Proto 2 (EventLoopLocal).

uint64_t now() {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

bool hasSeveralCpus() {
  // With one CPU the peer cannot answer while we spin. Our own affinity mask says nothing of this:
  // the two sides may be pinned to one CPU each. If to the same, spins do not pay, which
  // SpinBudget finds out.
  // Asked once, since glibc opens a file in /sys for it, and a TurnEnd may live as long as a single
  // short connection.
  static const bool result = sysconf(_SC_NPROCESSORS_ONLN) > 1;
  return result;
}

inline void pause() {
  // Tells the CPU that this is a spin loop.
#if __x86_64__ || __i386__
  __builtin_ia32_pause();
#elif __aarch64__
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace

kj::Own<TurnEnd> TurnEnd::forThisLoop() {
  if (currentTurnEnd != nullptr) return kj::addRef(*currentTurnEnd);
  return kj::refcounted<TurnEnd>();
}

TurnEnd::TurnEnd()
    : severalCpus(hasSeveralCpus()), answers(ANSWER_TRIAL), requests(REQUEST_TRIAL),
      looks(LOOKS_TRIAL), socketLooks(LONGEST_SOCKET_LOOKS) {
  currentTurnEnd = this;
}

TurnEnd::~TurnEnd() noexcept(false) { currentTurnEnd = nullptr; }

TurnEnd::Member::~Member() noexcept(false) {
  if (listed) turnEnd->members.remove(*this);
}

void TurnEnd::Member::active() {
  if (listed) return;
  listed = true;
  turnEnd->members.add(*this);
  if (turnEnd->pending == nullptr) turnEnd->schedule();
}

void TurnEnd::schedule() {
  if (asleepSince != 0) {
    uint64_t begin = kj::max(asleepSince, busyUntil);
    uint64_t end = kj::max(now(), begin);
    budget->slept(end - begin, longestSpin);
    lookBudget->slept(end - begin, LOOKS_TRIAL);
    asleepSince = 0;
    portHasRun();
  }
  runLater(mustYield());
}

void TurnEnd::runLater(bool afterPort) {
  auto last = [this]() { return kj::evalLast([this]() { run(); }); };
  pending = (afterPort ? yieldToPort().then(kj::cp(last)) : last())
      .eagerlyEvaluate([](kj::Exception&& exception) { KJ_LOG(ERROR, exception); });
}

void TurnEnd::run() {
  // The promise that runs this must outlive this call, while a member that is active again needs a
  // new one.
  auto running = kj::mv(pending);
  pending = nullptr;
  KJ_DEFER(finished = kj::mv(running));

  batch.resize(0);
  for (auto& member: members) batch.add(&member);
  for (auto member: batch) {
    members.remove(*member);
    member->listed = false;
  }

  for (auto member: batch) member->flush();
  if (lookCount > 0 && (messagesSincePort > 0 || bytesThisTurn > 0)) {
    lookBudget->hit(now() - lookingSince);
    lookCount = 0;
  }

  // Those who wait for something come first, up to a number that keeps a round of looking short.
  size_t spinners = 0;
  longestSpin = 0;
  budget = &requests;
  if (bytesThisTurn >= MANY_BYTES) {
    uint64_t time = bytesThisTurn / BYTES_PER_NANOSECOND;
    if (time <= MAX_MOVING_NANOSECONDS) busyUntil = now() + time;
  }
  bytesThisTurn = 0;
  for (size_t i = 0; i < batch.size() && spinners < MAX_SPINNERS; i++) {
    if (batch[i]->isWaiting()) {
      if (severalCpus) longestSpin = kj::max(longestSpin, batch[i]->spinNanoseconds);
      if (batch[i]->expectsAnswer()) budget = &answers;
      std::swap(batch[i], batch[spinners++]);
    }
  }

  size_t lookers = spinners;
  bool socketAnswer = false;
  for (size_t i = spinners; i < batch.size() && lookers < MAX_SPINNERS; i++) {
    if (batch[i]->awaitsSocket()) {
      if (batch[i]->expectsAnswer()) socketAnswer = true;
      std::swap(batch[i], batch[lookers++]);
    }
  }

  auto polled = batch.slice(0, spinners);
  auto awake = batch.slice(0, lookers);
  bool found = spinners > 0 &&
      (poll(polled) || (lookCount == 0 && (spin(polled) || prepare(polled))));
  if (found || (lookers > 0 && lookAtPort(socketAnswer))) {
    // Those that found something have announced themselves for the next end of turn, and come
    // first there. The others stay awake for now.
    for (auto member: awake) member->active();
  } else {
    lookCount = 0;
    for (auto member: awake) member->sleep();
  }
  for (auto member: batch.slice(lookers, batch.size())) member->sleep();

  if (pending == nullptr) asleepSince = now();
}

bool TurnEnd::poll(kj::ArrayPtr<Member*> spinners) {
  bool result = false;
  for (auto member: spinners) {
    if (member->poll()) {
      member->active();
      member->proceed();
      result = true;
    }
  }
  return result;
}

bool TurnEnd::spin(kj::ArrayPtr<Member*> spinners) {
  uint64_t allowed = budget->next(longestSpin);
  if (allowed == 0) return false;

  uint64_t start = now();
  uint64_t busy = busyUntil - kj::min(busyUntil, start);
  uint64_t elapsed = 0;
  do {
    for (uint i = 0; i < ROUNDS_PER_LOOK_AT_CLOCK; i++) {
      pause();
      if (poll(spinners)) {
        elapsed = now() - start;
        budget->hit(elapsed - kj::min(elapsed, busy));
        lookAtClock();
        return true;
      }
      for (auto member: spinners) member->prepare();
    }
    elapsed = now() - start;
  } while (elapsed < allowed + busy);
  budget->miss();
  return false;
}

bool TurnEnd::prepare(kj::ArrayPtr<Member*> spinners) {
  // What is left of it, before going to sleep. True if something was found meanwhile.
  for (uint i = 0; i < MAX_PREPARATIONS; i++) {
    bool more = false;
    for (auto member: spinners) more = member->prepare() || more;
    if (!more) return false;
    if (poll(spinners)) return true;
  }
  return false;
}

bool TurnEnd::lookAtPort(bool forSocketAnswer) {
  // Looks at the port before going to sleep, if there are looks left; run() comes after it.
  if (lookCount == 0) {
    lookBudget = forSocketAnswer ? &socketLooks : &looks;
    if (!severalCpus || lookBudget->next(LONGEST_SOCKET_LOOKS) == 0) return false;
    lookingSince = now();
  } else if (hasLookedEnough()) {
    lookBudget->miss();
    return false;
  }
  ++lookCount;
  runLater(true);
  return true;
}

bool TurnEnd::hasLookedEnough() {
  if (lookBudget == &looks && !looks.isTrial()) return lookCount >= LOOKS;
  return now() - lookingSince >= lookBudget->next(LONGEST_SOCKET_LOOKS);
}

void TurnEnd::lookAtClock() {
  uint64_t time = now();
  if (withoutPortSince == 0) {
    withoutPortSince = time;
  } else if (time - withoutPortSince >= MAX_NANOSECONDS_WITHOUT_PORT) {
    portIsDue = true;
  }
}

void TurnEnd::portHasRun() {
  messagesSincePort = 0;
  bytesSincePort = 0;
  withoutPortSince = 0;
  portIsDue = false;
}

kj::Promise<void> TurnEnd::yieldToPort() {
  portHasRun();
  // A fulfiller for other threads goes through the port. (port.poll() would swallow events of
  // other threads.)
  auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
  paf.fulfiller->fulfill();
  return kj::mv(paf.promise);
}

}  // namespace capnpshm
