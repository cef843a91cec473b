// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "event-bell.h"

#include "fault-point.h"
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {

namespace {

kj::AutoCloseFd newEventFd() {
  int fd;
  faultPoint();
  KJ_SYSCALL(fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  faultPoint();
  return kj::AutoCloseFd(fd);
}

class PortListener final: public EventBellListener {
public:
  PortListener(kj::UnixEventPort& port, kj::AutoCloseFd fdParam)
      : fd(kj::mv(fdParam)),
        observer(port, fd.get(), kj::UnixEventPort::FdObserver::OBSERVE_READ) {}

  kj::Promise<void> wait() override {
    // The observer is edge-triggered and every write to an eventfd is an edge, so it is never read.
    return observer->whenBecomesReadable();
  }

private:
  kj::AutoCloseFd fd;
  NotInForkChild<kj::UnixEventPort::FdObserver> observer;  // Destroyed before the fd is closed.
};

class StreamListener final: public EventBellListener {
public:
  explicit StreamListener(kj::Own<kj::AsyncCapabilityStream> stream): stream(kj::mv(stream)) {}

  kj::Promise<void> wait() override {
    return (*stream)->tryRead(&value, sizeof(value), sizeof(value)).ignoreResult();
  }

private:
  NotInForkChild<kj::Own<kj::AsyncCapabilityStream>> stream;
  uint64_t value = 0;
};

}  // namespace

EventBell::EventBell(): fd(newEventFd()) {}

void EventBell::ring() {
  // EAGAIN means that the counter is full: then the peer has been rung often enough. It cannot fail
  // otherwise.
  uint64_t one = 1;
  ssize_t n;
  faultPoint();
  do {
    n = write(fd, &one, sizeof(one));
  } while (n < 0 && errno == EINTR);
  faultPoint();
}

kj::Own<EventBellListener> EventBellListener::newListener(
    kj::UnixEventPort& port, kj::AutoCloseFd eventFd) {
  return kj::heap<PortListener>(port, kj::mv(eventFd));
}

kj::Own<EventBellListener> EventBellListener::newListener(
    kj::Own<kj::AsyncCapabilityStream> eventStream) {
  return kj::heap<StreamListener>(kj::mv(eventStream));
}

}  // namespace capnpshm
