// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/event-bell.h>
#include <capnp-shm/foreign-wake.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

// The two ways in which a loop is woken from outside: the peer's eventfd, and our own other
// threads.

namespace capnpshm {
namespace {

kj::AutoCloseFd duplicate(int fd) {
  int copy;
  KJ_SYSCALL(copy = fcntl(fd, F_DUPFD_CLOEXEC, 0));
  return kj::AutoCloseFd(copy);
}

class EventBellTest: public ::testing::TestWithParam<bool> {
  // With an event port, and without.

protected:
  EventBellTest(): io(kj::setupAsyncIo()) {}
  ~EventBellTest() noexcept override {}

  kj::Own<EventBellListener> listenTo(EventBell& bell) {
    if (GetParam()) {
      return EventBellListener::newListener(io.unixEventPort, duplicate(bell.getFd()));
    }
    // As a stream, which only a socket can make of it.
    auto pipe = io.provider->newCapabilityPipe();
    received = nullptr;
    auto sent = pipe.ends[0]->writeWithFds("x"_kj.asBytes(), nullptr, fdOf(bell));
    kj::byte buffer;
    auto n = pipe.ends[1]->tryReadWithStreams(&buffer, 1, 1, &received, 1).wait(io.waitScope);
    sent.wait(io.waitScope);
    KJ_ASSERT(n.capCount == 1);
    return EventBellListener::newListener(kj::mv(received));
  }

  bool isRung(kj::Promise<void>& promise) { return promise.poll(io.waitScope); }

  kj::AsyncIoContext io;

private:
  kj::Own<kj::AsyncCapabilityStream> received;
  int number = -1;

  kj::ArrayPtr<const int> fdOf(EventBell& bell) {
    number = bell.getFd();
    return kj::arrayPtr(&number, 1);
  }
};

INSTANTIATE_TEST_SUITE_P(Port, EventBellTest, ::testing::Bool(),
    [](const ::testing::TestParamInfo<bool>& info) { return info.param ? "With" : "Without"; });

TEST_P(EventBellTest, EveryRingWakes) {
  EventBell bell;
  auto listener = listenTo(bell);
  for (uint i = 0; i < 100; i++) {
    auto promise = listener->wait();
    EXPECT_FALSE(isRung(promise)) << i;
    bell.ring();
    promise.wait(io.waitScope);
  }
}

TEST_P(EventBellTest, RingOfAFullBellNeitherBlocksNorIsLost) {
  EventBell bell;
  auto listener = listenTo(bell);
  uint64_t full = ~uint64_t(0) - 1;
  KJ_SYSCALL(write(bell.getFd(), &full, sizeof(full)));
  auto promise = listener->wait();
  for (uint i = 0; i < 10; i++) bell.ring();
  promise.wait(io.waitScope);
}

TEST_P(EventBellTest, ManyRingsMayBeOne) {
  EventBell bell;
  auto listener = listenTo(bell);
  auto promise = listener->wait();
  for (uint i = 0; i < 1000; i++) bell.ring();
  promise.wait(io.waitScope);
  // Now it is quiet, after one more at most, and can be rung again.
  promise = listener->wait();
  if (isRung(promise)) promise = listener->wait();
  EXPECT_FALSE(isRung(promise));
  bell.ring();
  promise.wait(io.waitScope);
}

TEST_P(EventBellTest, FullCounterDoesNotBlockTheRinger) {
  EventBell bell;
  uint64_t most = ~uint64_t(0) - 1;
  KJ_ASSERT(write(bell.getFd(), &most, sizeof(most)) == sizeof(most));
  bell.ring();  // Would block for ever.
  auto listener = listenTo(bell);
  listener->wait().wait(io.waitScope);
}

TEST_P(EventBellTest, RingFromAnotherThreadWakesASleepingLoop) {
  EventBell bell;
  auto listener = listenTo(bell);
  for (uint i = 0; i < 20; i++) {
    auto promise = listener->wait();
    kj::Thread thread([&]() { bell.ring(); });
    promise.wait(io.waitScope);
  }
}

TEST_P(EventBellTest, ListenerMayGoWhileWaitedFor) {
  EventBell bell;
  auto listener = listenTo(bell);
  {
    auto promise = listener->wait();
    EXPECT_FALSE(isRung(promise));
  }
  listener = nullptr;
  bell.ring();
  auto other = listenTo(bell);
  other->wait().wait(io.waitScope);
}

TEST_P(EventBellTest, ForkChildLeavesTheParentsListenerAlone) {
  // Destroying it in a child must not take it out of the event port that both share. (Forks count
  // from the first region on; no connection has bells without.)
  createRegion(sysconf(_SC_PAGESIZE));
  EventBell bell;
  auto listener = listenTo(bell);
  auto promise = listener->wait();
  EXPECT_FALSE(isRung(promise));
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    listener = nullptr;
    _exit(0);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  EXPECT_EQ(0, status);
  bell.ring();
  promise.wait(io.waitScope);
}

TEST(EventBell, DescriptorIsNotInheritedByExecAndDoesNotBlock) {
  EventBell bell;
  EXPECT_TRUE(fcntl(bell.getFd(), F_GETFD) & FD_CLOEXEC);
  EXPECT_TRUE(fcntl(bell.getFd(), F_GETFL) & O_NONBLOCK);
}

// =======================================================================================

class ForeignWakeTest: public ::testing::Test {
protected:
  ForeignWakeTest(): io(kj::setupAsyncIo()), foreign(kj::atomicRefcounted<ForeignWake>()) {}
  ~ForeignWakeTest() noexcept override {}

  kj::AsyncIoContext io;
  kj::Own<ForeignWake> foreign;
};

TEST_F(ForeignWakeTest, WakesOnceForEachNext) {
  for (uint i = 0; i < 20; i++) {
    auto promise = foreign->next();
    EXPECT_FALSE(promise.poll(io.waitScope));
    kj::Thread thread([&]() {
      foreign->wake();
      foreign->wake();  // Of no effect: nobody waits any more.
    });
    promise.wait(io.waitScope);
  }
  auto promise = foreign->next();
  EXPECT_FALSE(promise.poll(io.waitScope));
}

TEST_F(ForeignWakeTest, DoesNothingOnceClosed) {
  foreign->wake();
  {
    auto promise = foreign->next();
  }
  foreign->close();
  auto own = kj::atomicAddRef(*foreign);
  foreign = nullptr;
  kj::Thread thread([own = kj::mv(own)]() mutable { own->wake(); });
}

TEST_F(ForeignWakeTest, PromiseMayBeDroppedWhileAnotherThreadWakes) {
  for (uint i = 0; i < 200; i++) {
    kj::Own<kj::Thread> thread;
    {
      auto promise = foreign->next();
      thread = kj::heap<kj::Thread>([own = kj::atomicAddRef(*foreign)]() mutable { own->wake(); });
      if (i % 2) promise.poll(io.waitScope);
    }
    foreign->close();
  }
}

TEST_F(ForeignWakeTest, NothingThatThreadsLeaveIsOverlooked) {
  // The pattern of the connection: take note again, then look. Threads leave something and wake.
  constexpr uint THREADS = 4, EACH = 500;
  std::atomic<uint> left{0};
  kj::Vector<kj::Own<kj::Thread>> threads;
  auto promise = foreign->next();
  for (uint i = 0; i < THREADS; i++) {
    threads.add(kj::heap<kj::Thread>([&left, own = kj::atomicAddRef(*foreign)]() mutable {
      for (uint j = 0; j < EACH; j++) {
        left.fetch_add(1);
        own->wake();
      }
    }));
  }
  while (left.load() < THREADS * EACH) {
    promise.wait(io.waitScope);
    promise = foreign->next();
  }
}

}  // namespace
}  // namespace capnpshm
