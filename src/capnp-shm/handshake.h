// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <capnp/message.h>
#include <capnp/rpc.capnp.h>
#include <capnp-shm/transport.capnp.h>
#include <kj/common.h>

namespace capnpshm {

// The messages of the control protocol (schema/transport.capnp), as framed rpc.capnp messages, and
// the rules of agreement. No I/O; connection.c++ says when each is sent.

class ControlMessage {
  // A control message being built.

public:
  ControlMessage();
  KJ_DISALLOW_COPY(ControlMessage);

  protocol::Control::Builder get() { return control; }
  capnp::MessageBuilder& getMessage() { return message; }

private:
  capnp::MallocMessageBuilder message;
  protocol::Control::Builder control;
};

kj::Maybe<protocol::Control::Reader> asControl(capnp::AnyPointer::Reader body);
// The control message in an incoming RPC message, if it is one.

bool isEchoOfOffer(capnp::AnyPointer::Reader body, uint64_t nonce);
// Whether an incoming RPC message is the `unimplemented` with which a peer that knows nothing of
// shared memory answers our offer.

uint64_t newNonce();

kj::Maybe<uint32_t> agreeOnVersion(protocol::Offer::Reader offer);
// The highest version that both speak.

}  // namespace capnpshm
