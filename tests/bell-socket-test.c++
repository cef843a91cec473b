// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/bell-socket.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace capnpshm {
namespace {

class BellSocketTest: public ::testing::Test {
protected:
  BellSocketTest(): io(kj::setupAsyncIo()) {}
  ~BellSocketTest() noexcept override {}

  kj::Own<EventBellListener> listenTo(BellSocket& bell) {
    return BellSocket::newListener(io.unixEventPort, bell.takePeersEnd());
  }

  bool isRung(kj::Promise<void>& promise) { return promise.poll(io.waitScope); }

  kj::AsyncIoContext io;
  BellSocket bell;
};

TEST_F(BellSocketTest, EveryRingWakes) {
  // Far more of them than its buffer has room for.
  auto listener = listenTo(bell);
  for (uint i = 0; i < 5000; i++) {
    auto promise = listener->wait();
    if (i % 512 == 0) { EXPECT_FALSE(isRung(promise)) << i; }
    ASSERT_TRUE(bell.ring()) << i;
    promise.wait(io.waitScope);
  }
}

TEST_F(BellSocketTest, NoWakeUpHasManyBellsToRead) {
  // Each takes microseconds, and who rang waits meanwhile.
  auto peersEnd = bell.takePeersEnd();
  int own;
  KJ_SYSCALL(own = fcntl(peersEnd, F_DUPFD_CLOEXEC, 0));
  kj::AutoCloseFd observed(own);
  auto listener = BellSocket::newListener(io.unixEventPort, kj::mv(peersEnd));
  for (uint i = 0; i < 200; i++) {
    auto promise = listener->wait();
    ASSERT_TRUE(bell.ring());
    promise.wait(io.waitScope);
    int unread;
    KJ_SYSCALL(ioctl(observed, FIONREAD, &unread));
    ASSERT_LE(unread, 8);
  }
}

TEST_F(BellSocketTest, RingBeforeAnybodyListensIsNotLost) {
  EXPECT_TRUE(bell.ring());
  listenTo(bell)->wait().wait(io.waitScope);
}

TEST_F(BellSocketTest, FullSocketDoesNotBlockTheRingerAndIsToldOf) {
  auto listener = listenTo(bell);
  uint count = 0;
  while (bell.ring()) { ASSERT_LT(++count, 1000000u); }
  EXPECT_GT(count, 100u);
  // As soon as the listener has read, it works again. Each wait is woken by a ring at least.
  uint waits = 0;
  while (!bell.ring()) {
    auto promise = listener->wait();
    isRung(promise);
    ASSERT_LT(++waits, 100000u);
  }
}

TEST_F(BellSocketTest, NoFlagThatThePeerCanChangeMakesTheRingerBlock) {
  auto peersEnd = bell.takePeersEnd();
  KJ_SYSCALL(fcntl(peersEnd, F_SETFL, 0));
  int least = 1;
  KJ_SYSCALL(setsockopt(peersEnd, SOL_SOCKET, SO_RCVBUF, &least, sizeof(least)));
  while (bell.ring()) {}
  EXPECT_FALSE(bell.ring());
}

TEST_F(BellSocketTest, ListenerThatIsGoneIsToldOf) {
  auto listener = listenTo(bell);
  {
    auto promise = listener->wait();
    EXPECT_FALSE(isRung(promise));
  }
  listener = nullptr;
  EXPECT_FALSE(bell.ring()) << "and no signal";
}

TEST_F(BellSocketTest, RingFromAnotherThreadWakesASleepingLoop) {
  auto listener = listenTo(bell);
  for (uint i = 0; i < 20; i++) {
    auto promise = listener->wait();
    kj::Thread thread([&]() { bell.ring(); });
    promise.wait(io.waitScope);
  }
}

TEST_F(BellSocketTest, RingerThatIsGoneDoesNotKeepTheListenerBusy) {
  kj::Own<EventBellListener> listener;
  {
    BellSocket other;
    listener = listenTo(other);
  }
  // Once or twice for the hang-up, and then no more.
  uint woken = 0;
  for (uint i = 0; i < 10; i++) {
    auto promise = listener->wait();
    woken += isRung(promise);
  }
  EXPECT_LE(woken, 2u);
}

TEST_F(BellSocketTest, WhateverElseThePeerSendsIsRefused) {
  int fds[2];
  auto expectRefused = [&](int fd) {
    kj::AutoCloseFd own(fd);
    EXPECT_THROW(BellSocket::newListener(io.unixEventPort, kj::mv(own)), kj::Exception);
  };
  KJ_SYSCALL(pipe(fds));
  expectRefused(fds[0]);
  expectRefused(fds[1]);
  expectRefused(eventfd(0, EFD_CLOEXEC));
  expectRefused(socket(AF_INET, SOCK_STREAM, 0));
  expectRefused(socket(AF_UNIX, SOCK_DGRAM, 0));
  expectRefused(open("/dev/null", O_RDONLY));
}

TEST_F(BellSocketTest, ForkChildLeavesTheParentsListenerAlone) {
  // See EventBellTest.
  createRegion(sysconf(_SC_PAGESIZE));
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

}  // namespace
}  // namespace capnpshm
