// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "spin-budget.h"
#include <kj/async.h>
#include <kj/list.h>
#include <kj/refcount.h>
#include <kj/vector.h>

namespace capnpshm {

using kj::uint;

class TurnEnd final: public kj::Refcounted {
  // The end-of-turn event of one event loop, shared by all its connections. When the loop has
  // nothing more to do and would go to sleep, each connection that was active wakes its peer if
  // need be; then, for a bounded time, we look whether an answer comes at once; and if none does,
  // the connections announce that they sleep.
  //
  // Invariant: at most one instance a thread at a time; a thread_local pointer, which owns
  // nothing, finds it. Reference counted by the connections. Belongs to its loop's thread.

public:
  static kj::Own<TurnEnd> forThisLoop();

  TurnEnd();
  ~TurnEnd() noexcept(false);

  class Member {
    // A connection, as this class sees it. The virtual methods run no application code and do not
    // throw.

  public:
    Member(kj::Own<TurnEnd> turnEnd, uint64_t spinNanoseconds)
        : turnEnd(kj::mv(turnEnd)), spinNanoseconds(spinNanoseconds) {}
    ~Member() noexcept(false);
    KJ_DISALLOW_COPY(Member);

  protected:
    void active();
    // Asks for the methods below to be called at the end of this turn. To be called as early in
    // the turn as possible: evalLast() runs last in, first out, and we want to come after Cap'n
    // Proto's own flushes.

    virtual void flush() = 0;
    // Sends off what this turn produced and wakes the peer if it sleeps.

    virtual bool isWaiting() = 0;
    // Whether poll() can ever find something.

    virtual bool poll() = 0;
    // Whether what this connection waits for is there. Cheap: called in a tight loop.

    virtual void proceed() = 0;
    // poll() found something: goes on with it.

    virtual void sleep() = 0;
    // Asks the peer for a bell, then looks once more.

    TurnEnd& getTurnEnd() { return *turnEnd; }

  private:
    kj::Own<TurnEnd> turnEnd;
    uint64_t spinNanoseconds;  // At most; 0 for never.
    bool listed = false;
    kj::ListLink<Member> link;
    friend class TurnEnd;
  };

  void count(size_t bytes) {
    // A message of `bytes` was taken or published.
    bytesSincePort += bytes;
    if (++messagesSincePort % MESSAGES_PER_LOOK_AT_CLOCK == 0) lookAtClock();
  }

  void peerWasAwake() { budget.peerWasAwake(); }
  // A message was published and its receiver needed no bell.

  bool mustYield() const {
    // Whether so much was done since the loop last looked at its port that it must do that first,
    // or timers, other connections and other threads would starve: the port is never polled while
    // the loop has something to do.
    return messagesSincePort >= MAX_MESSAGES_WITHOUT_PORT ||
        bytesSincePort >= MAX_BYTES_WITHOUT_PORT || portIsDue;
  }

  kj::Promise<void> yieldToPort();
  // Resolves after the port has run. Costs about three system calls.

private:
  static constexpr uint MAX_MESSAGES_WITHOUT_PORT = 1024;
  static constexpr size_t MAX_BYTES_WITHOUT_PORT = 4 << 20;
  static constexpr uint64_t MAX_NANOSECONDS_WITHOUT_PORT = 2000000;
  static constexpr uint MESSAGES_PER_LOOK_AT_CLOCK = 64;
  static constexpr uint MAX_SPINNERS = 8;

  kj::List<Member, &Member::link> members;
  kj::Maybe<kj::Promise<void>> pending;   // That will call run().
  kj::Maybe<kj::Promise<void>> finished;  // That called it last.
  kj::Vector<Member*> batch;              // Of run(); kept for its memory.
  bool severalCpus;
  SpinBudget budget;
  uint64_t longestSpin = 0;               // What options allowed in the last run().
  uint messagesSincePort = 0;
  size_t bytesSincePort = 0;
  uint64_t withoutPortSince = 0;          // When we first looked at the clock since then; or 0.
  bool portIsDue = false;
  uint64_t asleepSince = 0;               // Or 0 if the loop is awake.

  void schedule();
  void run();
  bool poll(kj::ArrayPtr<Member*> spinners);
  bool spin(kj::ArrayPtr<Member*> spinners);
  void lookAtClock();
  void portHasRun();
};

}  // namespace capnpshm
