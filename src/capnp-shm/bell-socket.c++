// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "bell-socket.h"

#include "fault-point.h"
#include <errno.h>
#include <sys/socket.h>
#include <kj/debug.h>

namespace capnpshm {

namespace {

constexpr kj::uint WAITS_BETWEEN_READS = 8;
// The socket's buffer has room for some hundred bells, but to read and free each of them takes one
// or two microseconds, and somebody waits meanwhile: no call shall wait for many.

int socketOption(int fd, int name) {
  int value = -1;
  socklen_t length = sizeof(value);
  if (getsockopt(fd, SOL_SOCKET, name, &value, &length) < 0) return -1;
  return value;
}

class SocketListener final: public EventBellListener {
public:
  SocketListener(kj::UnixEventPort& port, kj::AutoCloseFd fdParam)
      : fd(kj::mv(fdParam)),
        observer(port, fd.get(), kj::UnixEventPort::FdObserver::OBSERVE_READ) {}

  kj::Promise<void> wait() override {
    // The observer is edge-triggered and whatever arrives is an edge, also behind what was not
    // read.
    if (++waits % WAITS_BETWEEN_READS == 0) {
      // Once is enough: a peer that sends more than bells fills its own socket.
      kj::byte buffer[1024];
      ssize_t n;
      do {
        n = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
      } while (n < 0 && errno == EINTR);
    }
    return observer->whenBecomesReadable();
  }

private:
  kj::AutoCloseFd fd;
  NotInForkChild<kj::UnixEventPort::FdObserver> observer;  // Destroyed before the fd is closed.
  kj::uint waits = 0;
};

}  // namespace

BellSocket::BellSocket() {
  int fds[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
  faultPoint();
  ownEnd = kj::AutoCloseFd(fds[0]);
  peersEnd = kj::AutoCloseFd(fds[1]);
}

bool BellSocket::ring() {
  kj::byte bell = 0;
  ssize_t n;
  do {
    faultPoint();
    n = send(ownEnd, &bell, sizeof(bell), MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  faultPoint();
  return n == sizeof(bell);
}

kj::Own<EventBellListener> BellSocket::newListener(kj::UnixEventPort& port, kj::AutoCloseFd fd) {
  int domain = socketOption(fd, SO_DOMAIN);
  int type = socketOption(fd, SO_TYPE);
  KJ_REQUIRE(domain == AF_UNIX && type == SOCK_STREAM,
      "peer sent something else for a bell than a Unix stream socket", domain, type);
  return kj::heap<SocketListener>(port, kj::mv(fd));
}

}  // namespace capnpshm
