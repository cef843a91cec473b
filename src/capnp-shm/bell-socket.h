// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "event-bell.h"

namespace capnpshm {

class BellSocket {
  // A pair of sockets that carries nothing but bells, for two sides that need not trust each other.
  // This is the ringing end; we make the pair and the peer waits on its other end.
  //
  // Why, when the control socket can carry bells as well: the event loop reads that one after each
  // bell, twice; and each read tells the ringer's loop that it may write again, for which it wakes
  // up. Here the ringer's end is in no event loop, and the other is read now and then.
  //
  // Why not an eventfd: see event-bell.h. On a socket each call says for itself that it must not
  // block. And why the ringer makes it: to write into a socket of the peer's choosing might be to
  // speak to somebody else.

public:
  BellSocket();
  // Throws if the system has no sockets for us.

  kj::AutoCloseFd takePeersEnd() { return kj::mv(peersEnd); }
  // What the peer is to get. Once.

  bool ring();
  // False if the peer will not notice: it has not read for long, or is gone.

  static kj::Own<EventBellListener> newListener(kj::UnixEventPort& port, kj::AutoCloseFd fd);
  // The waiting end, on an fd that the peer sent. Throws type FAILED if it is not a Unix stream
  // socket, on which no call of ours can block, whatever the peer does to it.

private:
  kj::AutoCloseFd ownEnd;
  kj::AutoCloseFd peersEnd;
};

}  // namespace capnpshm
