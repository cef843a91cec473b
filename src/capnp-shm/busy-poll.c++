// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "busy-poll.h"

#include <kj/debug.h>

namespace capnpshm {

namespace {

thread_local TurnEnd* currentTurnEnd = nullptr;
// Owns nothing; set and cleared by the instance itself. An event loop cannot be asked for what
// belongs to it before Cap'n Proto 2 (EventLoopLocal).

}  // namespace

kj::Own<TurnEnd> TurnEnd::forThisLoop() {
  if (currentTurnEnd != nullptr) return kj::addRef(*currentTurnEnd);
  return kj::refcounted<TurnEnd>();
}

TurnEnd::TurnEnd() { currentTurnEnd = this; }

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
  auto last = [this]() { return kj::evalLast([this]() { run(); }); };
  pending = (mustYield() ? yieldToPort().then(kj::cp(last)) : last())
      .eagerlyEvaluate([](kj::Exception&& exception) { KJ_LOG(ERROR, exception); });
}

void TurnEnd::run() {
  // The promise that runs this must outlive this call, while a member that is active again, in its
  // endOfTurn(), needs a new one.
  auto running = kj::mv(pending);
  pending = nullptr;

  kj::Vector<Member*> now;
  for (auto& member: members) now.add(&member);
  for (auto member: now) {
    members.remove(*member);
    member->listed = false;
    member->endOfTurn();
  }

  finished = kj::mv(running);
}

kj::Promise<void> TurnEnd::yieldToPort() {
  messagesSincePort = 0;
  bytesSincePort = 0;
  // A fulfiller for other threads goes through the port. (port.poll() would swallow events of
  // other threads.)
  auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
  paf.fulfiller->fulfill();
  return kj::mv(paf.promise);
}

}  // namespace capnpshm
