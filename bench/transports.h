// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The transports that are compared.

#include <capnp-shm/rpc-shm.h>
#include <kj/async-io.h>
#include <kj/vector.h>

namespace capnpshm {
namespace bench {

using kj::uint;

struct TransportSpec {
  enum Kind {
    TWO_PARTY,   // capnp::TwoPartyVatNetwork.
    DROP_IN,     // SharedMemoryVatNetwork, constructed with TwoPartyVatNetwork's parameters.
    CONTEXT,     // SharedMemoryVatNetwork with a context that has the event port, and options.
    IN_PROCESS,  // InProcessNetwork: both vats in the client process.
    RAW,         // No RPC: a limit of the machine itself.
    PEER         // Another library that a user might take instead.
  };

  kj::StringPtr name;
  Kind kind;
  bool trustPeer = false;
  kj::Maybe<uint> spinMicroseconds = nullptr;  // Otherwise the default.
  size_t sealedThresholdBytes = 0;

  bool isShared() const { return kind == DROP_IN || kind == CONTEXT; }
  bool hasServer() const { return kind != IN_PROCESS && kind != RAW; }
};

const TransportSpec& findTransport(kj::StringPtr name);
// Throws if there is none of this name.

class Link {
  // One end of a connection with its RpcSystem.

public:
  virtual ~Link() noexcept(false) {}
  virtual capnp::Capability::Client bootstrap() = 0;
  virtual kj::Promise<void> onDisconnect() = 0;
  virtual kj::Maybe<SharedMemoryStats> getStats() { return nullptr; }
};

kj::Own<Link> newClientLink(const TransportSpec& transport, kj::AsyncIoContext& io,
                            kj::Own<kj::AsyncIoStream> stream);
kj::Own<Link> newServerLink(const TransportSpec& transport, kj::AsyncIoContext& io,
                            kj::Own<kj::AsyncIoStream> stream,
                            capnp::Capability::Client bootstrap);
kj::Own<Link> newInProcessLink(capnp::Capability::Client bootstrap);
// Both ends in one object.

}  // namespace bench
}  // namespace capnpshm
