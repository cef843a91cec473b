// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Other libraries that a user might take instead. They do the small call and the payloads, one
// after the other. Built in only if their packages were there.

#include <kj/memory.h>
#include <kj/string.h>
#include <stdint.h>

namespace capnpshm {
namespace bench {

class Peer {
  // A client of such a library.

public:
  virtual ~Peer() noexcept(false) {}
  virtual void echo() = 0;
  virtual void put(uint64_t bytes, bool readAndWrite) = 0;
  virtual void get(uint64_t bytes, bool readAndWrite) = 0;
  // As Target's methods: a payload in the params, and in the results.
};

bool hasPeer(kj::StringPtr name);
kj::Own<Peer> newPeer(kj::StringPtr name, kj::StringPtr address);
void servePeer(kj::StringPtr name, kj::StringPtr address);
// `address`: in the abstract namespace of Unix sockets. The server never returns.

kj::Own<Peer> newGrpcPeer(kj::StringPtr address);
void serveGrpc(kj::StringPtr address);
kj::Own<Peer> newZeroMqPeer(kj::StringPtr address);
void serveZeroMq(kj::StringPtr address);

}  // namespace bench
}  // namespace capnpshm
