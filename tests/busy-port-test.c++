// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// When a loop that is never idle looks at its port, and how those fare that wait for it; when it
// should is in port-schedule-test.c++.

#include "turn-end-fixture.h"

#include <chrono>
#include <kj/async-io.h>
#include <kj/thread.h>
#include <unistd.h>

namespace capnpshm {
namespace {

using testing::BusyMember;
using testing::FakeMember;
using testing::FOREVER;

typedef testing::TurnEndWithoutLooks BusyPort;

class PortOfABusyLoop: public BusyPort, public ::testing::WithParamInterface<bool> {
  // Known to TurnEnd or not.

protected:
  PortOfABusyLoop() {
    if (GetParam()) turnEnd->usePort(io.unixEventPort);
  }
  ~PortOfABusyLoop() noexcept override {}
};

TEST_P(PortOfABusyLoop, ServesTimers) {
  for (size_t bytes: { 8, 1 << 20 }) {
    BusyMember busy(log, bytes);
    uint64_t previous = 0;
    for (uint i = 0; i < 20; i++) {
      io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
      EXPECT_GT(busy.turns, previous) << "and it is not held up itself";
      previous = busy.turns;
    }
    EXPECT_LT(busy.turns, FOREVER);
    busy.running = false;
    turn();
  }
}

TEST_P(PortOfABusyLoop, ServesExecutors) {
  constexpr uint CALLS = 200;
  BusyMember busy(log, 8);
  auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
  auto& executor = kj::getCurrentThreadExecutor();
  uint calls = 0;
  uint64_t turnsAtLast = 0;
  kj::Thread thread([&]() {
    for (uint i = 0; i < CALLS; i++) {
      executor.executeSync([&]() {
        ++calls;
        turnsAtLast = busy.turns;
      });
    }
    paf.fulfiller->fulfill();
  });
  paf.promise.wait(io.waitScope);
  EXPECT_EQ(CALLS, calls);
  EXPECT_GT(turnsAtLast, 0u);
  EXPECT_LT(turnsAtLast, FOREVER);
  busy.running = false;
  turn();
}

TEST_P(PortOfABusyLoop, ServesSockets) {
  BusyMember busy(log, 8);
  auto pipe = io.provider->newTwoWayPipe();
  kj::byte buffer[1];
  for (uint i = 0; i < 200; i++) {
    auto read = pipe.ends[0]->read(buffer, 1);
    pipe.ends[1]->write("x", 1).wait(io.waitScope);
    read.wait(io.waitScope);
  }
  EXPECT_LT(busy.turns, FOREVER);
  busy.running = false;
  turn();
}

TEST_P(PortOfABusyLoop, IsDueAfterMessagesBytesOrTime) {
  FakeMember a(log, "a");
  auto& turnEnd = a.turnEnd();
  auto yield = [&]() {
    auto promise = turnEnd.yieldToPort();
    EXPECT_TRUE(turnEnd.mustYield()) << "all must";
    promise.wait(io.waitScope);
    EXPECT_FALSE(turnEnd.mustYield());
  };

  uint messages = 0;
  while (!turnEnd.mustYield()) {
    turnEnd.count(8);
    ASSERT_LE(++messages, 2048u);
  }
  yield();
  for (uint i = 0; i < 3; i++) {
    EXPECT_FALSE(turnEnd.mustYield());
    turnEnd.count(1 << 20);
  }
  turnEnd.count(1 << 20);
  EXPECT_TRUE(turnEnd.mustYield());
  yield();

  // Few messages, but slow ones. The time is that of the machine, so only that it ends is sure.
  BusyMember busy(log, 0);
  messages = 0;
  busy.onTurn = [&]() {
    busy.running = !turnEnd.mustYield();
    if (!busy.running) return;
    ++messages;
    usleep(3000);
  };
  turn();
  EXPECT_LE(messages, 3u);
}

TEST_P(PortOfABusyLoop, IsDueSoonerAfterASocketWasUsed) {
  auto countDue = [this]() {
    // In 10 ms, of turns of 5 µs.
    BusyMember busy(log, 0);
    auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(10);
    uint due = 0;
    busy.onTurn = [&]() {
      due += turnEnd->mustYield();
      auto now = std::chrono::steady_clock::now();
      busy.running = now < end;
      while (std::chrono::steady_clock::now() < now + std::chrono::microseconds(5)) {}
    };
    turn();
    return due;
  };
  uint usual = countDue();
  bool sooner = false;
  for (uint i = 0; i < 10 && !sooner; i++) {
    // The machine may interrupt us.
    turnEnd->usedSocket();
    uint first = countDue(), second = countDue();
    sooner = first > 4 * usual && second < first / 2;
  }
  EXPECT_TRUE(sooner) << "and less and less";
}

TEST_F(BusyPort, TimersOfAKnownPortAreInTime) {
  constexpr uint64_t SOON = 64;
  turnEnd->usePort(io.unixEventPort);
  BusyMember busy(log, 8);
  for (uint i = 0; i < 20; i++) {
    // Counted in turns, of which each takes a message, since the machine may interrupt us. (None
    // if the port was due just then.)
    auto due = io.provider->getTimer().now() + 1 * kj::MILLISECONDS;
    uint64_t turnsThen = FOREVER;
    busy.onTurn = [&]() {
      std::chrono::nanoseconds time = std::chrono::steady_clock::now().time_since_epoch();
      if (kj::origin<kj::TimePoint>() + time.count() * kj::NANOSECONDS >= due) {
        turnsThen = kj::min(turnsThen, busy.turns);
      }
    };
    io.provider->getTimer().atTime(due).wait(io.waitScope);
    EXPECT_LE(busy.turns, turnsThen + SOON);
  }
  busy.running = false;
  turn();
}

INSTANTIATE_TEST_SUITE_P(, PortOfABusyLoop, ::testing::Values(false, true),
    [](auto& info) { return info.param ? "Known" : "Unknown"; });

}  // namespace
}  // namespace capnpshm
