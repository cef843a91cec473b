// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/async.h>
#include <kj/list.h>
#include <kj/refcount.h>
#include <kj/vector.h>

namespace capnpshm {

using kj::uint;

class TurnEnd final: public kj::Refcounted {
  // The end-of-turn event of one event loop, shared by all its connections: when the loop has
  // nothing more to do and would go to sleep, each connection that was active wakes its peer if
  // need be and announces that it sleeps itself.
  //
  // Invariant: at most one instance a thread at a time; a thread_local pointer, which owns
  // nothing, finds it. Reference counted by the connections. Belongs to its loop's thread.

public:
  static kj::Own<TurnEnd> forThisLoop();

  TurnEnd();
  ~TurnEnd() noexcept(false);

  class Member {
    // A connection, as this class sees it.

  public:
    explicit Member(kj::Own<TurnEnd> turnEnd): turnEnd(kj::mv(turnEnd)) {}
    ~Member() noexcept(false);
    KJ_DISALLOW_COPY(Member);

  protected:
    void active();
    // Asks for endOfTurn() at the end of this turn. To be called as early in the turn as possible:
    // evalLast() runs last in, first out, and we want to come after Cap'n Proto's own flushes.

    virtual void endOfTurn() = 0;
    // The loop is about to sleep. Runs no application code and does not throw.

    TurnEnd& getTurnEnd() { return *turnEnd; }

  private:
    kj::Own<TurnEnd> turnEnd;
    bool listed = false;
    kj::ListLink<Member> link;
    friend class TurnEnd;
  };

  void count(size_t bytes) {
    // A message of `bytes` was taken or published.
    ++messagesSincePort;
    bytesSincePort += bytes;
  }

  bool mustYield() const {
    // Whether so much was done since the loop last looked at its port that it must do that first,
    // or timers, other connections and other threads would starve: the port is never polled while
    // the loop has something to do.
    return messagesSincePort >= MAX_MESSAGES_WITHOUT_PORT ||
        bytesSincePort >= MAX_BYTES_WITHOUT_PORT;
  }

  kj::Promise<void> yieldToPort();
  // Resolves after the port has run.

private:
  static constexpr uint MAX_MESSAGES_WITHOUT_PORT = 128;
  static constexpr size_t MAX_BYTES_WITHOUT_PORT = 4 << 20;

  kj::List<Member, &Member::link> members;
  kj::Maybe<kj::Promise<void>> pending;   // That will call run().
  kj::Maybe<kj::Promise<void>> finished;  // That called it last.
  uint messagesSincePort = 0;
  size_t bytesSincePort = 0;

  void schedule();
  void run();
};

}  // namespace capnpshm
