// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "busy-poll.h"

#include <time.h>
#include <unistd.h>
#include <utility>
#include <kj/debug.h>

namespace capnpshm {

namespace {

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
    : severalCpus(hasSeveralCpus()), answers(SpinBudget::FOR_ANSWERS, ANSWER_TRIAL),
      requests(SpinBudget::FOR_REQUESTS, REQUEST_TRIAL),
      answerLooks(SpinBudget::FOR_ANSWERS, ANSWER_LOOKS_TRIAL),
      requestLooks(SpinBudget::FOR_REQUESTS, REQUEST_LOOKS_TRIAL),
      socketAnswerLooks(SpinBudget::FOR_REQUESTS, SOCKET_LOOKS_TRIAL, SOCKET_SLEEP_COST),
      socketRequestLooks(SpinBudget::FOR_REQUESTS, SOCKET_LOOKS_TRIAL, SOCKET_SLEEP_COST) {
  currentTurnEnd = this;
}

TurnEnd::~TurnEnd() noexcept(false) { currentTurnEnd = nullptr; }

void TurnEnd::usedSocket() { portSchedule.usedSocket(now()); }

TurnEnd::Crowd::~Crowd() noexcept(false) {}

void TurnEnd::Crowd::add(Member& member, const SharedWord* word) {
  member.crowd = this;
  member.index = entries.size();
  // Relaxed, here and in poll(): only a hint. Before the first change poll() is asked, after this
  // load, and after each; it orders what it finds.
  uint64_t value = word == nullptr ? 0 : word->load(std::memory_order_relaxed);
  bool expectsAnswer = member.expectsAnswer();
  spinNanoseconds = kj::max(entries.empty() ? 0 : spinNanoseconds, member.spinNanoseconds);
  answersExpected += expectsAnswer;
  entries.add(Entry { &member, word, value, false, expectsAnswer });
}

void TurnEnd::Crowd::remove(Member& member) {
  answersExpected -= entries[member.index].expectsAnswer;
  auto& last = entries.back();
  last.member->index = member.index;
  entries[member.index] = last;
  entries.removeLast();
  member.crowd = nullptr;
}

void TurnEnd::Crowd::moveTo(kj::Vector<Member*>& target) {
  for (auto& entry: entries) {
    entry.member->crowd = nullptr;
    target.add(entry.member);
  }
  entries.clear();
  answersExpected = 0;
}

inline bool TurnEnd::Crowd::poll(Entry& entry) {
  if (entry.asked && entry.word != nullptr &&
      entry.word->load(std::memory_order_relaxed) == entry.value) {
    return false;
  }
  entry.asked = true;
  return entry.member->poll();
}

void TurnEnd::Crowd::moveReadyTo(kj::Vector<Member*>& target, uint most) {
  size_t count = 0;
  for (size_t i = 0; i < entries.size(); i++) {
    auto& entry = entries[i];
    if (most > 0 && poll(entry)) {
      entry.member->crowd = nullptr;
      target.add(entry.member);
      answersExpected -= entry.expectsAnswer;
      --most;
      continue;
    }
    if (count < i) {
      entry.member->index = count;
      entries[count] = entry;
    }
    ++count;
  }
  entries.truncate(count);
}

void TurnEnd::Crowd::moveReadyTo(kj::Vector<Member*>& target, size_t& index, size_t count) {
  for (count = kj::min(count, entries.size()); count > 0; count--) {
    if (index >= entries.size()) index = 0;
    auto& entry = entries[index];
    if (poll(entry)) {
      target.add(entry.member);
      remove(*entry.member);
    } else {
      ++index;
    }
  }
}

TurnEnd::Member::~Member() noexcept(false) {
  if (crowd != nullptr) crowd->remove(*this);
}

void TurnEnd::Member::active() {
  auto& t = *turnEnd;
  if (crowd == &t.active) return;
  if (crowd != nullptr) crowd->remove(*this);
  t.active.add(*this);
  if (t.pending == nullptr) t.schedule();
}

void TurnEnd::schedule() {
  if (asleepSince != 0) {
    uint64_t begin = kj::max(asleepSince, busyUntil);
    uint64_t end = kj::max(now(), begin);
    budget->slept(end - begin, peersShareCpu);
    lookBudget->slept(end - begin, peersShareCpu);
    asleepSince = 0;
    portSchedule.wasVisited();
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

  portSchedule.lookAtClock(now());
  flush();
  bool found = poll() || !active.empty();
  if (!found) {
    chooseBudget();
    found = !awake.empty() && lookCount == 0 && (spin() || prepare());
  }
  if (found || lookAtPort()) {
    dismissIdle();
  } else {
    lookCount = 0;
    batch.clear();
    awake.moveTo(batch);
    atSocket.moveTo(batch);
    peersShareCpu = !batch.empty();
    for (auto member: batch) {
      peersShareCpu = peersShareCpu && member->peerSharesCpu();
      putToSleep(*member);
    }
  }

  if (pending == nullptr) asleepSince = now();
}

void TurnEnd::flush() {
  // Does what is left to do of this turn, and begins the next.
  batch.clear();
  active.moveTo(batch);
  for (auto member: batch) member->flush();
  if (!batch.empty()) spinningSince = 0;
  ++turns;

  if (lookCount > 0 && (messagesThisTurn > 0 || bytesThisTurn > 0)) {
    lookBudget->hit(now() - lookingSince);
    lookCount = 0;
  }
  if (bytesThisTurn >= MANY_BYTES) {
    uint64_t time = bytesThisTurn / BYTES_PER_NANOSECOND;
    if (time <= MAX_MOVING_NANOSECONDS) busyUntil = now() + time;
  }
  messagesThisTurn = 0;
  bytesThisTurn = 0;

  for (auto member: batch) {
    member->lastActive = turns;
    if (member->crowd != nullptr) continue;  // Active again already.
    if (member->isWaiting()) {
      awake.add(*member, member->watch());
    } else if (member->awaitsSocket()) {
      atSocket.add(*member);
    } else {
      putToSleep(*member);
    }
  }
}

bool TurnEnd::poll() {
  batch.clear();
  // Only some of those that have something, so that their peers need not wait for all. The others
  // come before them next time.
  awake.moveReadyTo(batch, MAX_MESSAGES_A_TURN);
  moveReadySleepers();
  return proceed();
}

bool TurnEnd::pollSome() {
  // Those who will most probably have something, and some of the others.
  batch.clear();
  size_t last = awake.size() - kj::min(awake.size(), LATELY);
  awake.moveReadyTo(batch, last, LATELY);
  if (awake.size() > LATELY) awake.moveReadyTo(batch, nextAwake, OTHERS_A_LOOK);
  moveReadySleepers();
  return proceed();
}

inline void TurnEnd::moveReadySleepers() {
  size_t before = batch.size();
  asleep.moveReadyTo(batch, nextSleeper, OTHERS_A_LOOK);
  portSchedule.foundSleepers(batch.size() - before);
}

inline bool TurnEnd::proceed() {
  for (auto member: batch) {
    member->active();
    member->proceed();
  }
  return !batch.empty();
}

void TurnEnd::chooseBudget() {
  budget = awake.expectsAnswer() ? &answers : &requests;
}

bool TurnEnd::spin() {
  uint64_t allowed = severalCpus ? budget->next(awake.getSpinNanoseconds()) : 0;
  if (allowed == 0) return false;

  uint64_t time = now();
  if (spinningSince == 0) spinningSince = time;
  uint64_t busy = busyUntil - kj::min(busyUntil, spinningSince);
  uint64_t due = portSchedule.dueAt();
  while (time - spinningSince < allowed + busy) {
    if (time >= due) {
      // While there is nothing better to do. The spin goes on after that.
      runLater(true);
      return true;
    }
    for (uint i = 0; i < ROUNDS_PER_LOOK_AT_CLOCK; i++) {
      pause();
      if (pollSome()) {
        uint64_t elapsed = now() - spinningSince;
        budget->hit(elapsed - kj::min(elapsed, busy));
        return true;
      }
      // One of them, since the next look is what matters.
      prepareOne();
    }
    time = now();
  }
  budget->miss();
  spinningSince = 0;
  return false;
}

bool TurnEnd::prepare() {
  // What is left of it, before going to sleep. True if something was found meanwhile.
  uint prepared = 0;  // In a row.
  for (uint i = 0; i < MAX_PREPARATIONS && prepared < kj::min(awake.size(), LATELY); i++) {
    if (prepareOne()) {
      prepared = 0;
      if (pollSome()) return true;
    } else {
      ++prepared;
    }
  }
  return false;
}

inline bool TurnEnd::prepareOne() {
  // Each of the last few in turn.
  if (awake.empty()) return false;
  if (nextToPrepare >= kj::min(awake.size(), LATELY)) nextToPrepare = 0;
  return awake[awake.size() - ++nextToPrepare].prepare();
}

bool TurnEnd::lookAtPort() {
  // Looks at the port before going to sleep, if there are looks left; run() comes after it.
  if (awake.empty() && atSocket.empty()) return false;
  if (lookCount == 0) {
    if (!atSocket.empty()) {
      lookBudget = atSocket.expectsAnswer() ? &socketAnswerLooks : &socketRequestLooks;
    } else {
      lookBudget = awake.expectsAnswer() ? &answerLooks : &requestLooks;
    }
    if (!severalCpus || lookBudget->next(LONGEST_LOOKS) == 0) return false;
    lookingSince = now();
  } else if (hasLookedEnough()) {
    lookBudget->miss();
    return false;
  }
  if (lookCount >= LOOKS && spinBetweenLooks()) return true;
  ++lookCount;
  ++looksMade;
  runLater(true);
  return true;
}

bool TurnEnd::spinBetweenLooks() {
  // If spins are allowed at all: in memory we see the same for the same time without a system call,
  // unless somebody waits for what will come through the port.
  if (!atSocket.empty() || awake.getSpinNanoseconds() == 0) return false;
  uint64_t end = now() + NANOSECONDS_BETWEEN_LOOKS;
  do {
    for (uint i = 0; i < ROUNDS_PER_LOOK_AT_CLOCK; i++) {
      pause();
      if (pollSome()) return true;
    }
  } while (now() < end);
  return false;
}

bool TurnEnd::hasLookedEnough() {
  uint64_t elapsed = now() - lookingSince;
  bool forSocket = lookBudget == &socketAnswerLooks || lookBudget == &socketRequestLooks;
  if (!forSocket && !lookBudget->isTrial()) {
    return lookCount >= LOOKS && elapsed >= lookBudget->getAverageHit() * 3 / 2;
  }
  return elapsed >= lookBudget->next(LONGEST_LOOKS);
}

void TurnEnd::putToSleep(Member& member) {
  if (member.crowd != nullptr) member.crowd->remove(member);
  member.sleep();
  // It has found something after all, or else waits now.
  if (member.crowd == nullptr && member.isWaiting()) asleep.add(member, member.watch());
}

void TurnEnd::dismissIdle() {
  // Those of a few. To put one to sleep takes some microseconds, so that all at once would make a
  // call wait.
  uint64_t most = kj::min(MAX_IDLE_TURNS, MAX_IDLE_LOOKS / kj::max(awake.size(), size_t(1)));
  for (size_t i = kj::min(awake.size(), DISMISSALS_A_TURN); i > 0 && !awake.empty(); i--) {
    if (nextToDismiss >= awake.size()) nextToDismiss = 0;
    auto& member = awake[nextToDismiss];
    if (turns - member.lastActive >= most) {
      putToSleep(member);  // Another takes its place.
    } else {
      ++nextToDismiss;
    }
  }
}

}  // namespace capnpshm
