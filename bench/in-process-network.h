// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The limit of what any transport can reach: two vats in one event loop, which hand each other
// messages by pointer. What remains is what Cap'n Proto RPC itself costs.

#include <capnp/rpc-twoparty.h>
#include <kj/refcount.h>

namespace capnpshm {
namespace bench {

using kj::uint;

class InProcessNetwork final: public capnp::TwoPartyVatNetworkBase {
  // One of the two vats' view of the other.

public:
  static kj::Own<InProcessNetwork> newClient();
  kj::Own<InProcessNetwork> newServer();
  // The other end of this one, which is a client.

  ~InProcessNetwork() noexcept(false);
  KJ_DISALLOW_COPY(InProcessNetwork);

  // implements VatNetwork -----------------------------------------------------

  kj::Maybe<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> connect(
      capnp::rpc::twoparty::VatId::Reader ref) override;
  kj::Promise<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> accept() override;

  class Queue;

  InProcessNetwork(
      capnp::rpc::twoparty::Side side, kj::Own<Queue> incoming, kj::Own<Queue> outgoing);
  // Use newClient() and newServer().

private:
  class ConnectionImpl;

  capnp::rpc::twoparty::Side side;
  kj::Own<Queue> incoming;
  kj::Own<Queue> outgoing;
  bool connected = false;

  kj::Own<capnp::TwoPartyVatNetworkBase::Connection> newConnection();
};

}  // namespace bench
}  // namespace capnpshm
