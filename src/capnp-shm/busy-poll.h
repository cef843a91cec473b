// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "layout.h"
#include "port-schedule.h"
#include "spin-budget.h"
#include <kj/refcount.h>
#include <kj/vector.h>

namespace capnpshm {

using kj::uint;

class TurnEnd final: public kj::Refcounted {
  // The end-of-turn event of one event loop, shared by all its connections. When the loop has
  // nothing more to do and would go to sleep, each connection that was active wakes its peer if
  // need be; then we look, once at each that is awake, whether something has come for it. If not,
  // we go on looking for a bounded time, and do meanwhile what would only cost time later; then we
  // look a few times at the port, where something may have come for others; and then the
  // connections announce that they sleep.
  //
  // All connections get the same: a turn begins with at most one message of each, however many
  // more are there, and ends when enough was done. So that none depends on the port, which a
  // loop that is never idle looks at rarely,
  //
  // - one that had something stays awake for many turns more: looking at it each time costs
  //   nanoseconds, a bell and what it takes to find it costs microseconds;
  // - and of those that sleep a few are looked at each time too, in turn. They have a bell as well.
  //
  // For all others on the loop the port is visited, at long intervals, but sooner after a socket
  // was used, and when a timer expires.
  //
  // Invariants:
  // - A member is in one crowd at most, and waits for nothing if it is in none.
  // - If one is active, awake or looks for something on its socket, run() is coming.
  // - At most one instance a thread at a time; a thread_local pointer, which owns nothing, finds
  //   it.
  //
  // Reference counted by the connections. Belongs to its loop's thread.

private:
  class Crowd;

public:
  static kj::Own<TurnEnd> forThisLoop();

  TurnEnd();
  ~TurnEnd() noexcept(false);

  void usePort(kj::UnixEventPort& port) { portSchedule.usePort(port); }
  // Tells which port the loop waits on. It must outlive this object. A visit to the port costs less
  // then, and timers need not wait for the next one.

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
    // want next. Before that changes active() is called.

    virtual bool poll() = 0;
    // Whether what this connection waits for is there. Cheap: called in a tight loop.

    virtual const SharedWord* watch() = 0;
    // A word that will change before poll() can find anything, so that looking at it is enough as
    // long as it does not; or null. It is looked at until the next call of active() or sleep().

    virtual void proceed() = 0;
    // poll() found something: goes on with it.

    virtual bool prepare() = 0;
    // There is time: does a little, a microsecond or so, of what would otherwise delay the next
    // message. Whether there is more of it. Called in a tight loop too.

    virtual void sleep() = 0;
    // Asks the peer for a bell, then looks once more.

    virtual bool peerSharesCpu() = 0;
    // Whether the peer, as far as it has told, last ran on the CPU on which this is called.

    TurnEnd& getTurnEnd() { return *turnEnd; }

  private:
    kj::Own<TurnEnd> turnEnd;
    uint64_t spinNanoseconds;    // At most; 0 for never.
    Crowd* crowd = nullptr;      // In which it is,
    size_t index = 0;            // and where.
    uint64_t lastActive = 0;     // Turn in which it was.
    friend class TurnEnd;
  };

  void count(size_t bytes) {
    // A message of `bytes` was taken, or published after it had waited.
    moved(bytes);
    ++messagesThisTurn;
    portSchedule.took(bytes);
  }

  void usedSocket();
  // A plain message was sent or received on the socket of a connection: there may soon be another.

  void moved(size_t bytes) { bytesThisTurn += bytes; }
  // So much was sent, or received: the peer is busy with it, or with the next of its size, for a
  // time that it would be premature to call a miss.

  void peerWasAwake(Member& member) {
    // A message was published and its receiver needed no bell. On our own CPU it did not run: the
    // scheduler let us go first.
    auto& budget = member.expectsAnswer() ? answers : requests;
    if (budget.isGivenUp() && !member.peerSharesCpu()) budget.peerWasAwake();
  }

  bool isLong() const {
    // Whether so much was done in this turn that it should end, for all to have theirs. (Those that
    // have something are not found before, nor are their peers woken up.)
    return messagesThisTurn >= enoughMessages() || bytesThisTurn >= MAX_BYTES_A_TURN || mustYield();
  }

  bool mustYield() const {
    // Whether so much was done since the loop last looked at its port that it must do that first,
    // or timers, other connections and other threads would starve: the port is never polled while
    // the loop has something to do.
    return portSchedule.isDue();
  }

  kj::Promise<void> yieldToPort() { return portSchedule.visit(); }
  // Resolves after the port has run. Costs about three system calls; one if the port is known.

  uint64_t getLooks() const { return looksMade; }
  // At the port so far, before going to sleep.

private:
  static constexpr uint MAX_MESSAGES_A_TURN = 64;
  static constexpr uint MIN_MESSAGES_A_TURN = 16;
  // If there are others that are awake: few enough that they do not wait for long, and enough that
  // the end of a turn costs little beside them.
  static constexpr size_t MAX_BYTES_A_TURN = 512 << 10;
  static constexpr uint64_t MAX_IDLE_TURNS = 4096;
  static constexpr uint64_t MAX_IDLE_LOOKS = 65536;
  // For how many turns a member stays awake that finds nothing, and for how many looks at all that
  // do. The former cost less than a bell, which takes both sides some 15 µs: as in the ski rental
  // problem, twice the best that could be done at most. The latter keep a round of looking short.
  static constexpr size_t DISMISSALS_A_TURN = 4;
  // At most, and so many members are looked at for that, in turn.
  static constexpr size_t OTHERS_A_LOOK = 16;
  // So many of those that sleep, or are awake but were not active lately.
  static constexpr size_t LATELY = 8;
  // So many members were.
  static constexpr uint ROUNDS_PER_LOOK_AT_CLOCK = 8;

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
  // At the port, before going to sleep, each of which takes 1 to 3 µs. What comes next may come
  // on a connection that we do not spin on, and be a bell; or spins are not allowed. While they
  // pay, the first or second finds something, so that we make fewer system calls for each message
  // than TwoPartyVatNetwork, whose own keep it from sleeping too early. (With two, both sides
  // lost each other for a tenth of a second now and then.)
  static constexpr uint64_t NANOSECONDS_BETWEEN_LOOKS = 8000;
  // If there are more than these, spins are allowed, and nobody waits for a socket.
  static constexpr uint64_t ANSWER_LOOKS_TRIAL = 45000;
  static constexpr uint64_t REQUEST_LOOKS_TRIAL = 30000;
  // In nanoseconds, and as many looks as go into it. As with spins, a side whose peer sleeps must
  // wait for it to wake up before both can find each other awake. And after that again, until the
  // peer has found out too: so looks go on for somewhat longer than they took lately.
  static constexpr uint64_t SOCKET_LOOKS_TRIAL = 50000;
  static constexpr uint64_t SOCKET_SLEEP_COST = 90000;
  // In nanoseconds, for connections that have no shared memory yet: a trial lasts 100 µs at that
  // cost. What comes first there comes from a peer that was probably asleep, and has a connection
  // to accept; and what comes then takes longer, even between two sides that stay awake, than what
  // a sleep costs at least. (With a cost of 60 µs, on a slow machine, a server that once slept
  // between such calls did so for good.)
  static constexpr uint64_t LONGEST_LOOKS = 100000;
  // Whatever is learned of this machine.

  class Crowd {
    // Members in the same state, roughly in the order in which they came. To add or remove one
    // takes constant time. What must be looked at lies close together, since for most members that
    // is all there is to do, many times.

  public:
    ~Crowd() noexcept(false);
    size_t size() const { return entries.size(); }
    bool empty() const { return entries.empty(); }
    Member& operator[](size_t index) { return *entries[index].member; }
    bool expectsAnswer() const { return answersExpected > 0; }
    // Whether any of them does.
    uint64_t getSpinNanoseconds() const { return spinNanoseconds; }
    // The most of any since it was last empty. Not to be asked while it is.
    void add(Member& member, const SharedWord* word = nullptr);
    void remove(Member& member);               // The last one takes its place.
    void moveTo(kj::Vector<Member*>& target);  // All, in order.
    void moveReadyTo(kj::Vector<Member*>& target, uint most);
    // The first of those for which there is something.
    void moveReadyTo(kj::Vector<Member*>& target, size_t& index, size_t count);
    // Likewise, but of so many from `index` on, cyclically; it is then the next one's.

  private:
    struct Entry {
      Member* member;
      const SharedWord* word;  // Null if poll() must be asked,
      uint64_t value;          // else what it was,
      bool asked;              // and whether poll() was since.
      bool expectsAnswer;
    };
    kj::Vector<Entry> entries;
    size_t answersExpected = 0;
    uint64_t spinNanoseconds = 0;

    bool poll(Entry& entry);
  };

  Crowd active;                           // Have something to do at the end of this turn.
  Crowd awake;                            // Are looked at at the end of each turn.
  Crowd atSocket;                         // Wait for what will come through the port.
  Crowd asleep;                           // Wait, and have asked their peers for a bell.
  size_t nextSleeper = 0;                 // To be looked at,
  size_t nextAwake = 0;                   // between turns.
  size_t nextToPrepare = 0;               // Of those awake, counted from the last.
  size_t nextToDismiss = 0;               // Of those awake, if it has been idle for long.
  uint64_t turns = 0;
  kj::Maybe<kj::Promise<void>> pending;   // That will call run().
  kj::Maybe<kj::Promise<void>> finished;  // That called it last.
  kj::Vector<Member*> batch;              // Of run(); kept for its memory.
  bool severalCpus;
  PortSchedule portSchedule;
  SpinBudget answers;
  SpinBudget requests;
  SpinBudget answerLooks;
  SpinBudget requestLooks;
  SpinBudget socketAnswerLooks;
  SpinBudget socketRequestLooks;
  SpinBudget* lookBudget = &requestLooks; // One of these four, that of the last looks.
  uint64_t looksMade = 0;
  uint lookCount = 0;                     // Of looks since there was last anything to do,
  uint64_t lookingSince = 0;              // and when they began.
  SpinBudget* budget = &requests;         // That of the last run(),
  uint64_t spinningSince = 0;             // and when its spin began, or 0; a visit interrupts it.
  uint messagesThisTurn = 0;
  size_t bytesThisTurn = 0;
  uint64_t busyUntil = 0;                 // As far as can be told from what was moved.
  uint64_t asleepSince = 0;               // Or 0 if the loop is awake,
  bool peersShareCpu = false;             // and whether we wait for peers on our own CPU only.

  uint enoughMessages() const {
    // For one turn: one of each member that is awake, within reason.
    size_t members = active.size() + awake.size();
    if (members <= 1) return MAX_MESSAGES_A_TURN;
    return kj::min(kj::max(members, MIN_MESSAGES_A_TURN), MAX_MESSAGES_A_TURN);
  }

  void schedule();
  void runLater(bool afterPort);
  void run();
  void flush();
  bool poll();
  bool pollSome();
  void moveReadySleepers();
  bool proceed();
  void chooseBudget();
  bool spin();
  bool prepare();
  bool prepareOne();
  bool lookAtPort();
  bool spinBetweenLooks();
  bool hasLookedEnough();
  void putToSleep(Member& member);
  void dismissIdle();
};

}  // namespace capnpshm
