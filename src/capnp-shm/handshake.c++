// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "handshake.h"

#include "fault-point.h"
#include "layout.h"
#include <errno.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

namespace capnpshm {

ControlMessage::ControlMessage()
    : message(64),
      control(message.initRoot<capnp::rpc::Message>().initObsoleteSave()
          .initAs<protocol::Control>()) {
  control.setMagic(protocol::Control::MAGIC_VALUE);
}

namespace {

kj::Maybe<protocol::Control::Reader> controlIn(capnp::rpc::Message::Reader message) {
  if (message.which() != capnp::rpc::Message::OBSOLETE_SAVE) return nullptr;
  auto pointer = message.getObsoleteSave();
  if (!pointer.isStruct()) return nullptr;
  auto control = pointer.getAs<protocol::Control>();
  if (control.getMagic() != protocol::Control::MAGIC_VALUE) return nullptr;
  return control;
}

}  // namespace

kj::Maybe<protocol::Control::Reader> asControl(capnp::AnyPointer::Reader body) {
  return controlIn(body.getAs<capnp::rpc::Message>());
}

bool isEchoOfOffer(capnp::AnyPointer::Reader body, uint64_t nonce) {
  auto message = body.getAs<capnp::rpc::Message>();
  if (message.which() != capnp::rpc::Message::UNIMPLEMENTED) return false;
  KJ_IF_MAYBE(control, controlIn(message.getUnimplemented())) {
    return control->isOffer() && control->getOffer().getNonce() == nonce;
  }
  return false;
}

uint64_t newNonce() {
  uint64_t result;
  ssize_t n;
  faultPoint();
  do {
    n = getrandom(&result, sizeof(result), 0);
  } while (n < 0 && errno == EINTR);
  faultPoint();
  if (n != ssize_t(sizeof(result))) {
    // A sandbox forbids it. Nothing depends on its being hard to guess: it tells our own offer,
    // come back, from a stranger's message.
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    result = (uint64_t(getpid()) << 32 | uint32_t(time.tv_nsec)) ^ uint64_t(time.tv_sec) << 48 ^
        reinterpret_cast<uintptr_t>(&result);
  }
  return result;
}

kj::Maybe<uint32_t> agreeOnVersion(protocol::Offer::Reader offer) {
  if (offer.getMinVersion() <= PROTOCOL_VERSION && offer.getMaxVersion() >= PROTOCOL_VERSION) {
    return PROTOCOL_VERSION;
  }
  return nullptr;
}

}  // namespace capnpshm
