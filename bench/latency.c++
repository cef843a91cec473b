// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// Small calls: one after the other, with pauses between them, and many at once.

#include "client.h"
#include "lanes.h"

#include <kj/debug.h>
#include <sys/timerfd.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

class Pause {
  // Pauses that are exact to microseconds, with the event loop asleep as between a user's calls.
  // (KJ's own timer counts in milliseconds.)

public:
  Pause(kj::AsyncIoContext& io, uint64_t microseconds)
      : waitScope(io.waitScope), nanoseconds(microseconds * 1000),
        fd(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)),
        observer(io.unixEventPort, fd, kj::UnixEventPort::FdObserver::OBSERVE_READ) {}

  void operator()() {
    struct itimerspec time = {};
    time.it_value.tv_sec = nanoseconds / 1000000000;
    time.it_value.tv_nsec = nanoseconds % 1000000000;
    auto readable = observer.whenBecomesReadable();
    KJ_SYSCALL(timerfd_settime(fd, 0, &time, nullptr));
    readable.wait(waitScope);
    uint64_t expirations;
    KJ_NONBLOCKING_SYSCALL(read(fd, &expirations, sizeof(expirations)));
  }

private:
  kj::WaitScope& waitScope;
  uint64_t nanoseconds;
  kj::AutoCloseFd fd;
  kj::UnixEventPort::FdObserver observer;  // Goes before the fd.
};

}  // namespace

void smallCall(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  Slice slice(session, task);
  slice.run([&]() { session.echo(target).wait(session.waitScope()); });
  slice.report(figures);
}

void idleGap(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  Pause pause(session.io, task.getGapMicroseconds());
  Slice slice(session, task);
  slice.run([&]() { session.echo(target).wait(session.waitScope()); }, pause);
  slice.report(figures);
}

void besideBusy(Session& session, Task::Reader task, Figures& figures) {
  // What those wait for who call now and then by a timer, while another connection of the same loop
  // is never idle: from when the timer expires. (Else what comes late would be few calls, and
  // those that begin when the loop happens to have nothing to do.)
  session.openConnections(2);
  Lanes lanes(session);
  for (uint i = 0; i < task.getWindow(); i++) lanes.add(session.targetAt(1));
  auto& timer = session.io.provider->getTimer();
  uint64_t gap = task.getGapMicroseconds() * 1000;
  auto callInTime = [&]() {
    uint64_t due = now() + gap;
    timer.atTime(kj::origin<kj::TimePoint>() + due * kj::NANOSECONDS).wait(session.waitScope());
    session.echo(session.target()).wait(session.waitScope());
    return now() - due;
  };
  Slice slice(session, task);
  auto busy = lanes.goOn();
  slice.runBeside(callInTime);
  slice.reportLatencies(figures);
}

void window(Session& session, Task::Reader task, Figures& figures) {
  Lanes lanes(session);
  for (uint i = 0; i < task.getWindow(); i++) lanes.add(session.target());
  Slice slice(session, task);
  lanes.run(slice);
  slice.report(figures);
}

}  // namespace bench
}  // namespace capnpshm
