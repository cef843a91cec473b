// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

namespace capnpshm {
namespace conformance {

void fillMessage(capnp::OutgoingRpcMessage& message, uint n, size_t bytes) {
  auto call = message.getBody().initAs<capnp::rpc::Message>().initCall();
  call.setQuestionId(n);
  fillPattern(call.getParams().getContent().initAs<capnp::Data>(bytes), n);
}

Outgoing newMessage(Connection& connection, uint n, size_t bytes, uint firstSegmentWords) {
  auto message = connection.newOutgoingMessage(firstSegmentWords);
  fillMessage(*message, n, bytes);
  return message;
}

void sendMessage(Connection& connection, uint n, size_t bytes, uint firstSegmentWords) {
  newMessage(connection, n, bytes, firstSegmentWords)->send();
}

testing::AssertionResult isMessage(capnp::IncomingRpcMessage& message, uint n, size_t bytes) {
  auto body = message.getBody().getAs<capnp::rpc::Message>();
  if (!body.isCall()) return testing::AssertionFailure() << "not a Call: " << uint(body.which());
  auto call = body.getCall();
  if (call.getQuestionId() != n) {
    return testing::AssertionFailure() << "message " << call.getQuestionId() << " instead of " << n;
  }
  auto data = call.getParams().getContent().getAs<capnp::Data>();
  if (data.size() != bytes) {
    return testing::AssertionFailure() << data.size() << " bytes instead of " << bytes;
  }
  if (!isPattern(data, n)) {
    return testing::AssertionFailure() << "message " << n << " of " << bytes << " bytes is wrong";
  }
  return testing::AssertionSuccess();
}

kj::Own<RawLink> RawConformance::connectRaw(LinkOptions options) {
  return kj::heap<RawLink>(mode(), io, options);
}

kj::Promise<kj::Maybe<Incoming>> RawConformance::receive(Connection& connection) {
  return connection.receiveIncomingMessage().then(
      [this, &connection](kj::Maybe<Incoming>&& received) -> kj::Promise<kj::Maybe<Incoming>> {
    KJ_IF_MAYBE(message, received) {
      auto body = (*message)->getBody().getAs<capnp::rpc::Message>();
      if (body.isObsoleteSave()) {
        auto answer = connection.newOutgoingMessage(0);
        answer->getBody().initAs<capnp::rpc::Message>().setUnimplemented(body);
        answer->send();
        return receive(connection);
      }
    }
    return kj::mv(received);
  });
}

void RawConformance::settle(RawLink& raw) {
  for (uint i = 0; i < 4; i++) {
    sendMessage(*raw.client, i, 8);
    EXPECT_TRUE(isMessage(*next(*raw.server), i, 8));
    sendMessage(*raw.server, i, 8);
    EXPECT_TRUE(isMessage(*next(*raw.client), i, 8));
  }
  turn();
}

}  // namespace conformance
}  // namespace capnpshm
