// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// For tests of the conformance suite that send and receive the messages of a connection themselves,
// without an RPC system.

#include "conformance-fixture.h"
#include <capnp/rpc.capnp.h>

namespace capnpshm {
namespace conformance {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using Incoming = kj::Own<capnp::IncomingRpcMessage>;
using Outgoing = kj::Own<capnp::OutgoingRpcMessage>;

struct RawLink {
  // Destroyed from the last member to the first, so the connections go before their networks.

  RawLink(const Mode& mode, kj::AsyncIoContext& io, const LinkOptions& options)
      : link(mode, io, options), client(link.client->connect()), server(link.server->connect()) {}

  Link link;
  kj::Own<Connection> client;
  kj::Own<Connection> server;
};

void fillMessage(capnp::OutgoingRpcMessage& message, uint n, size_t bytes);
Outgoing newMessage(Connection& connection, uint n, size_t bytes, uint firstSegmentWords = 0);
void sendMessage(Connection& connection, uint n, size_t bytes, uint firstSegmentWords = 0);
// A Call with question id `n` and so much data.

testing::AssertionResult isMessage(capnp::IncomingRpcMessage& message, uint n, size_t bytes);
// Whether it is what newMessage() made.

class RawConformance: public Conformance {
protected:
  kj::Own<RawLink> connectRaw(LinkOptions options = LinkOptions());

  kj::Promise<kj::Maybe<Incoming>> receive(Connection& connection);
  // The next message. An offer of shared memory that comes to a peer without it is answered as an
  // RPC system would.

  Incoming next(Connection& connection) {
    return KJ_ASSERT_NONNULL(await(receive(connection)), "the connection ended");
  }

  void settle(RawLink& raw);
  // Sends messages to and fro until it is decided what carries them, and leaves nothing under way.

  static bool isOurs(const Mode& mode, const EndMode& end) {
    // Whether the end is a SharedMemoryVatNetwork that does not just forward to TwoPartyVatNetwork.
    return (end.kind == EndMode::DROP_IN || end.kind == EndMode::CONTEXT) &&
        (mode.stream == StreamKind::SOCKET || mode.stream == StreamKind::PROXY);
  }
  bool isShared() { return mode().expected == Transport::SHARED_MEMORY; }
};

}  // namespace conformance
}  // namespace capnpshm
