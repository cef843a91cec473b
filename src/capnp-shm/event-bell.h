// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "memfd.h"
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <kj/io.h>

namespace capnpshm {

// Eventfds by which two sides that trust each other wake one another. Never between others:
// O_NONBLOCK belongs to the open file, which both share, so a hostile peer could clear it, fill the
// counter and make our loop block in a read or write of it.

class EventBell {
  // The ringing end. We make the eventfd and the peer waits on it.

public:
  EventBell();
  // Throws if the system has no eventfd for us.

  int getFd() const { return fd; }
  void ring();

private:
  kj::AutoCloseFd fd;
};

template <typename T>
class NotInForkChild {
  // A T whose destructor is left out in a fork child: destroying a watcher of the event port there
  // would reach into the epoll instance that the child shares with its parent.

public:
  template <typename... Params>
  explicit NotInForkChild(Params&&... params): generation(forkGeneration()) {
    kj::ctor(value, kj::fwd<Params>(params)...);
  }
  ~NotInForkChild() noexcept(false) {
    if (generation == forkGeneration()) kj::dtor(value);
  }
  KJ_DISALLOW_COPY(NotInForkChild);

  T& operator*() { return value; }
  T* operator->() { return &value; }

private:
  uint64_t generation;
  union { T value; };
};

class EventBellListener {
  // The waiting end, on an eventfd that the peer sent. Belongs to its event loop's thread.

public:
  virtual ~EventBellListener() noexcept(false) {}

  virtual kj::Promise<void> wait() = 0;
  // Resolves when the bell was rung; perhaps once too often. A ring between two calls may be lost,
  // so call it again first and then look for what the bell may have been about.

  static kj::Own<EventBellListener> newListener(kj::UnixEventPort& port, kj::AutoCloseFd eventFd);
  // Costs one system call a bell.

  static kj::Own<EventBellListener> newListener(kj::Own<kj::AsyncCapabilityStream> eventStream);
  // For want of a port: the eventfd as KJ wraps it when it is received as a stream. The fd must be
  // read each time.
};

}  // namespace capnpshm
