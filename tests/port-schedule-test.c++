// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// When it says that the port is due; what comes of that is in busy-port-test.c++.

#include <capnp-shm/port-schedule.h>

#include "loop-fixture.h"

#include <gtest/gtest.h>

namespace capnpshm {
namespace {

constexpr uint64_t MICROSECONDS = 1000;
constexpr uint64_t MILLISECONDS = 1000000;
constexpr uint64_t START = 1000000 * MILLISECONDS;

class PortScheduleTest: public ::testing::TestWithParam<bool>, protected LoopFixture {
  // Whose port is known or not.

protected:
  PortScheduleTest() {
    if (GetParam()) schedule.usePort(io.unixEventPort);
    schedule.lookAtClock(START);
  }
  ~PortScheduleTest() noexcept override {}

  void take(uint messages) {
    for (uint i = 0; i < messages; i++) schedule.took(8);
  }

  void visit(uint64_t time) {
    schedule.wasVisited();
    EXPECT_FALSE(schedule.isDue());
    schedule.lookAtClock(time);
  }

  void expectDueAfter(uint64_t nanoseconds, uint64_t since = START) {
    // By its own account, and if it sees that time.
    EXPECT_EQ(since + nanoseconds, schedule.dueAt());
    schedule.lookAtClock(since + nanoseconds - 1);
    EXPECT_FALSE(schedule.isDue());
    schedule.lookAtClock(since + nanoseconds);
    EXPECT_TRUE(schedule.isDue());
    EXPECT_EQ(0u, schedule.dueAt());
  }

  PortSchedule schedule;
};

TEST_P(PortScheduleTest, AfterMessagesBytesOrSleepers) {
  take(2047);
  EXPECT_FALSE(schedule.isDue());
  take(1);
  EXPECT_TRUE(schedule.isDue());
  EXPECT_EQ(0u, schedule.dueAt());

  visit(START);
  schedule.took((4 << 20) - 1);
  EXPECT_FALSE(schedule.isDue());
  schedule.took(1);
  EXPECT_TRUE(schedule.isDue());

  visit(START);
  schedule.foundSleepers(3);
  EXPECT_FALSE(schedule.isDue());
  schedule.foundSleepers(1);
  EXPECT_TRUE(schedule.isDue());
  visit(START);
}

TEST_P(PortScheduleTest, AfterATime) {
  expectDueAfter(4 * MILLISECONDS);
  // Counted from the first look at the clock after the visit: the loop may have been idle since.
  visit(2 * START);
  schedule.lookAtClock(2 * START + MILLISECONDS);
  expectDueAfter(4 * MILLISECONDS, 2 * START);
}

TEST_P(PortScheduleTest, AfterALessTimeAndManyMessagesWhereItCostsLittle) {
  take(1023);
  EXPECT_EQ(START + 4 * MILLISECONDS, schedule.dueAt());
  take(1);
  expectDueAfter((GetParam() ? 1 : 4) * MILLISECONDS);
}

TEST_P(PortScheduleTest, SoonAfterASocketWasUsed) {
  // And then less and less often: after an eighth of the time since.
  schedule.usedSocket(START);
  expectDueAfter(20 * MICROSECONDS);
  visit(START + 80 * MICROSECONDS);
  expectDueAfter(20 * MICROSECONDS, START + 80 * MICROSECONDS);
  visit(START + 8 * MILLISECONDS);
  expectDueAfter(1 * MILLISECONDS, START + 8 * MILLISECONDS);
  visit(START + 80 * MILLISECONDS);
  expectDueAfter(4 * MILLISECONDS, START + 80 * MILLISECONDS);
  schedule.usedSocket(START + 81 * MILLISECONDS);
  visit(START + 81 * MILLISECONDS);
  expectDueAfter(20 * MICROSECONDS, START + 81 * MILLISECONDS);
}

TEST_P(PortScheduleTest, WhenATimerExpires) {
  auto& timer = io.provider->getTimer();
  auto due = timer.now() + 2 * kj::MILLISECONDS;
  uint64_t time = (due - kj::origin<kj::TimePoint>()) / kj::NANOSECONDS;
  visit(time - 2 * MILLISECONDS);
  auto promise = timer.atTime(due).eagerlyEvaluate(nullptr);
  expectDueAfter((GetParam() ? 2 : 4) * MILLISECONDS, time - 2 * MILLISECONDS);
}

TEST_P(PortScheduleTest, VisitLetsThePortRun) {
  auto pipe = io.provider->newTwoWayPipe();
  kj::byte buffer[1];
  bool read = false;
  auto reading = pipe.ends[0]->read(buffer, 1).then([&]() { read = true; })
      .eagerlyEvaluate(nullptr);
  pipe.ends[1]->write("x", 1).wait(io.waitScope);
  take(2048);
  auto visited = schedule.visit();
  EXPECT_TRUE(schedule.isDue()) << "for others too, until then";
  visited.wait(io.waitScope);
  EXPECT_FALSE(schedule.isDue());
  turn();
  EXPECT_TRUE(read);
}

INSTANTIATE_TEST_SUITE_P(, PortScheduleTest, ::testing::Values(false, true),
    [](auto& info) { return info.param ? "Known" : "Unknown"; });

}  // namespace
}  // namespace capnpshm
