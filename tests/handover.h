// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// How a test with several processes gives a server its connections: a socket on which it sends it
// the other ends of socket pairs, each with a tag.

#include <kj/async-io.h>
#include <kj/io.h>

namespace capnpshm {
namespace process {

void handOver(int socket, uint64_t tag, int fd);
// Sends a copy of `fd`. Any process that holds `socket` may; blocks while the server is behind.

kj::AutoCloseFd handOverNewPair(int socket, uint64_t tag);
// Makes a pair, sends one end and returns the other.

class Handover {
  // The server's end.

public:
  Handover(kj::AsyncIoContext& io, kj::AutoCloseFd socket);

  struct Connection {
    uint64_t tag;
    kj::Own<kj::AsyncCapabilityStream> stream;
  };
  kj::Promise<kj::Maybe<Connection>> next();
  // Null once nobody can send any more.

private:
  kj::AsyncIoContext& io;
  kj::Own<kj::AsyncCapabilityStream> stream;
};

}  // namespace process
}  // namespace capnpshm
