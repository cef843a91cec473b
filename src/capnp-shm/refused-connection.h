// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "message.h"
#include <capnp/rpc-twoparty.h>

namespace capnpshm {

class RefusedConnection final: public capnp::TwoPartyVatNetworkBase::Connection,
                               private MessageSender {
  // The connection over a stream that cannot carry shared memory when plain frames are not wanted
  // instead (SharedMemoryOptions::requireSharedMemory): every receive fails, nothing is sent.

public:
  RefusedConnection(kj::Exception&& reason, capnp::rpc::twoparty::Side peer)
      : reason(kj::mv(reason)), peerVatId(4) {
    peerVatId.initRoot<capnp::rpc::twoparty::VatId>().setSide(peer);
  }

  capnp::rpc::twoparty::VatId::Reader getPeerVatId() override {
    return peerVatId.getRoot<capnp::rpc::twoparty::VatId>();
  }
  kj::Own<capnp::OutgoingRpcMessage> newOutgoingMessage(kj::uint firstSegmentWords) override {
    MessageSender& sender = *this;
    return kj::atomicRefcounted<OutgoingMessage>(sender, firstSegmentWords);
  }
  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> receiveIncomingMessage() override {
    return kj::cp(reason);
  }
  kj::Promise<void> shutdown() override { return kj::READY_NOW; }

private:
  kj::Exception reason;
  capnp::MallocMessageBuilder peerVatId;

  void sendMessage(OutgoingMessage&) override {}
};

}  // namespace capnpshm
