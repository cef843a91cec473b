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
  // need be; then, for a bounded time, we look whether an answer comes at once, and do meanwhile
  // what would only cost time later; if none does we look a few times at the port, where something
  // may have come for other connections; and then the connections announce that they sleep.
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

    virtual bool awaitsSocket() = 0;
    // Whether something may soon come on its socket, so that it pays to look at the port before
    // going to sleep.

    virtual bool expectsAnswer() = 0;
    // Whether it waits for the answer to something it sent, rather than for whatever the peer may
    // want next.

    virtual bool poll() = 0;
    // Whether what this connection waits for is there. Cheap: called in a tight loop.

    virtual void proceed() = 0;
    // poll() found something: goes on with it.

    virtual bool prepare() = 0;
    // There is time: does a little, a microsecond or so, of what would otherwise delay the next
    // message. Whether there is more of it. Called in a tight loop too.

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
    // A message of `bytes` was taken, or published after it had waited.
    moved(bytes);
    bytesSincePort += bytes;
    if (++messagesSincePort % MESSAGES_PER_LOOK_AT_CLOCK == 0) lookAtClock();
  }

  void moved(size_t bytes) { bytesThisTurn += bytes; }
  // So much was sent, or received: the peer is busy with it, or with the next of its size, for a
  // time that it would be premature to call a miss.

  void peerWasAwake(bool answerExpected) {
    // A message was published and its receiver needed no bell.
    (answerExpected ? answers : requests).peerWasAwake();
  }

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
  static constexpr uint MAX_MESSAGES_WITHOUT_PORT = 2048;
  static constexpr size_t MAX_BYTES_WITHOUT_PORT = 4 << 20;
  static constexpr uint64_t MAX_NANOSECONDS_WITHOUT_PORT = 4000000;
  static constexpr uint MESSAGES_PER_LOOK_AT_CLOCK = 64;
  static constexpr uint MAX_SPINNERS = 8;

  static constexpr uint64_t ANSWER_TRIAL = 50000;
  // Two sides that both sleep answer each other too late for a short trial.
  static constexpr uint64_t REQUEST_TRIAL = 15000;
  // A peer that looks for our answer sends its next request soon after it, or after a pause.
  static constexpr size_t MANY_BYTES = 4096;
  static constexpr uint64_t BYTES_PER_NANOSECOND = 6;
  // Roughly what a core copies or writes, if there are many.
  static constexpr uint64_t MAX_MOVING_NANOSECONDS = 700000;
  // What takes longer is not worth staying awake for.
  static constexpr uint MAX_PREPARATIONS = 32;
  // Before going to sleep.

  static constexpr uint LOOKS = 4;
  // At the port, before going to sleep, each of which takes about 3 µs. What comes next may come
  // on a connection that we do not spin on, and be a bell; or spins are not allowed. While they
  // pay, the first or second finds something, so that we make fewer system calls for each message
  // than TwoPartyVatNetwork, whose own keep it from sleeping too early. (With two, both sides
  // lost each other for a tenth of a second now and then.)
  static constexpr uint64_t LOOKS_TRIAL = 30000;
  // In nanoseconds, and as many looks as go into it. As with spins, a side whose peer sleeps must wait
  // for it to wake up before both can find each other awake.
  static constexpr uint64_t LONGEST_SOCKET_LOOKS = 60000;
  // In nanoseconds, if the answer to the first call of a connection is awaited, which comes on its
  // socket. The peer was probably asleep, and has a connection to accept.

  kj::List<Member, &Member::link> members;
  kj::Maybe<kj::Promise<void>> pending;   // That will call run().
  kj::Maybe<kj::Promise<void>> finished;  // That called it last.
  kj::Vector<Member*> batch;              // Of run(); kept for its memory.
  bool severalCpus;
  SpinBudget answers;
  SpinBudget requests;
  SpinBudget looks;
  SpinBudget socketLooks;
  SpinBudget* lookBudget = &looks;        // One of these two, that of the last looks.
  uint lookCount = 0;                     // Of looks since there was last anything to do,
  uint64_t lookingSince = 0;              // and when they began.
  SpinBudget* budget = &requests;         // That of the last run(),
  uint64_t longestSpin = 0;               // and what options allowed in it.
  size_t bytesThisTurn = 0;
  uint64_t busyUntil = 0;                 // As far as can be told from what was moved.
  uint messagesSincePort = 0;
  size_t bytesSincePort = 0;
  uint64_t withoutPortSince = 0;          // When we first looked at the clock since then; or 0.
  bool portIsDue = false;
  uint64_t asleepSince = 0;               // Or 0 if the loop is awake.

  void schedule();
  void runLater(bool afterPort);
  void run();
  bool poll(kj::ArrayPtr<Member*> spinners);
  bool spin(kj::ArrayPtr<Member*> spinners);
  bool prepare(kj::ArrayPtr<Member*> spinners);
  bool lookAtPort(bool forSocketAnswer);
  bool hasLookedEnough();
  void lookAtClock();
  void portHasRun();
};

}  // namespace capnpshm
