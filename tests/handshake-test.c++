// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/handshake.h>
#include <capnp-shm/layout.h>
#include <capnp-shm/rpc-shm.h>

#include <capnp/any.h>
#include <capnp/rpc-twoparty.h>
#include <capnp/schema.h>
#include <capnp/serialize.h>
#include <gtest/gtest.h>
#include <kj/debug.h>
#include <set>
#include <string.h>

namespace capnpshm {
namespace {

using protocol::Control;

constexpr size_t MAX_CONTROL_WORDS = 64;
// Of what goes over the socket after the switch, as docs/PROTOCOL.md has it.

class OnTheWire {
  // A message as the peer gets it.

public:
  explicit OnTheWire(capnp::MessageBuilder& message)
      : words(capnp::messageToFlatArray(message)), reader(words) {}

  capnp::AnyPointer::Reader body() { return reader.getRoot<capnp::AnyPointer>(); }
  size_t segmentWords() { return reader.getSegment(0).size(); }
  bool hasOneSegment() { return reader.getSegment(1) == nullptr; }

private:
  kj::Array<capnp::word> words;
  capnp::FlatArrayMessageReader reader;
};

void fill(Control::Which which, Control::Builder control) {
  switch (which) {
    case Control::OFFER: {
      auto offer = control.initOffer();
      offer.setMinVersion(1);
      offer.setMaxVersion(2);
      offer.setNonce(0x123456789abcdef0);
      offer.setRegionBytes(uint64_t(1) << 40);
      offer.setTrustsPeer(true);
      offer.setMaxFdsPerMessage(7);
      offer.setTakesBellSocket(true);
      break;
    }
    case Control::MAPPED: control.setMapped(); break;
    case Control::DECLINED: control.setDeclined("because"); break;
    case Control::SWITCH: control.setSwitch(); break;
    case Control::REGION: {
      auto region = control.initRegion();
      region.setId(3);
      region.setBytes(uint64_t(1) << 33);
      break;
    }
    case Control::REGION_MAPPED: control.setRegionMapped(4); break;
    case Control::REGION_REFUSED: control.setRegionRefused(5); break;
    case Control::FDS: control.setFds(6); break;
    case Control::BELL: control.setBell(); break;
    case Control::END: control.setEnd(); break;
    case Control::BELL_SOCKET: control.setBellSocket(); break;
    case Control::BELL_SOCKET_TAKEN: control.setBellSocketTaken(true); break;
    case Control::TAKEN: control.setTaken(8); break;
    case Control::SEALED: control.initSealed().initBytes(2).set(1, 1 << 20); break;
  }
}

uint unionSize() {
  return capnp::Schema::from<Control>().asStruct().getUnionFields().size();
}

TEST(Handshake, EveryKindSurvivesTheWire) {
  ASSERT_EQ(14u, unionSize()) << "a new kind must be added to fill()";
  for (uint i = 0; i < unionSize(); i++) {
    auto which = static_cast<Control::Which>(i);
    ControlMessage message;
    fill(which, message.get());
    OnTheWire wire(message.getMessage());
    auto body = wire.body();

    // To anybody else it is an RPC message of a kind nobody knows, without capabilities.
    auto rpc = body.getAs<capnp::rpc::Message>();
    EXPECT_EQ(capnp::rpc::Message::OBSOLETE_SAVE, rpc.which());
    EXPECT_EQ(0u, body.targetSize().capCount);
    EXPECT_TRUE(wire.hasOneSegment());
    EXPECT_LE(wire.segmentWords(), MAX_CONTROL_WORDS);

    auto control = KJ_ASSERT_NONNULL(asControl(body));
    ASSERT_EQ(which, control.which());
    EXPECT_FALSE(isEchoOfOffer(body, 0x123456789abcdef0));
  }
}

TEST(Handshake, OfferKeepsItsFields) {
  ControlMessage message;
  fill(Control::OFFER, message.get());
  OnTheWire wire(message.getMessage());
  auto offer = KJ_ASSERT_NONNULL(asControl(wire.body())).getOffer();
  EXPECT_EQ(1u, offer.getMinVersion());
  EXPECT_EQ(2u, offer.getMaxVersion());
  EXPECT_EQ(0x123456789abcdef0u, offer.getNonce());
  EXPECT_EQ(uint64_t(1) << 40, offer.getRegionBytes());
  EXPECT_TRUE(offer.getTrustsPeer());
  EXPECT_EQ(7u, offer.getMaxFdsPerMessage());
  EXPECT_TRUE(offer.getTakesBellSocket());
}

TEST(Handshake, WhatIsNoControlMessage) {
  {
    capnp::MallocMessageBuilder empty;
    empty.initRoot<capnp::AnyPointer>();
    OnTheWire wire(empty);
    EXPECT_TRUE(asControl(wire.body()) == nullptr);
    EXPECT_FALSE(isEchoOfOffer(wire.body(), 0));
  }
  auto isNone = [](kj::Function<void(capnp::rpc::Message::Builder)> build) {
    capnp::MallocMessageBuilder message;
    build(message.initRoot<capnp::rpc::Message>());
    OnTheWire wire(message);
    return asControl(wire.body()) == nullptr && !isEchoOfOffer(wire.body(), 0);
  };
  EXPECT_TRUE(isNone([](auto m) { m.initCall(); }));
  EXPECT_TRUE(isNone([](auto m) { m.initBootstrap(); }));
  EXPECT_TRUE(isNone([](auto m) { m.initObsoleteDelete(); }));
  EXPECT_TRUE(isNone([](auto m) { m.initUnimplemented(); }));
  EXPECT_TRUE(isNone([](auto m) { m.initObsoleteSave(); }));
  EXPECT_TRUE(isNone([](auto m) {
    m.initObsoleteSave().template setAs<capnp::Text>("not a struct");
  }));
  EXPECT_TRUE(isNone([](auto m) {
    m.initObsoleteSave().template initAs<capnp::List<Control>>(1)[0]
        .setMagic(Control::MAGIC_VALUE);
  }));
  EXPECT_TRUE(isNone([](auto m) {
    m.initObsoleteSave().template initAs<Control>().setMagic(Control::MAGIC_VALUE + 1);
  }));
  // The same in another field is not for us.
  EXPECT_TRUE(isNone([](auto m) {
    m.initObsoleteDelete().template initAs<Control>().setMagic(Control::MAGIC_VALUE);
  }));
}

TEST(Handshake, EchoOfAPlainPeerIsRecognized) {
  // By a real one.
  auto io = kj::setupAsyncIo();
  auto pipe = io.provider->newTwoWayPipe();
  capnp::TwoPartyVatNetwork network(*pipe.ends[0], capnp::rpc::twoparty::Side::SERVER);
  auto plain = capnp::makeRpcServer(network, capnp::Capability::Client(nullptr));

  for (uint64_t nonce: { uint64_t(0), uint64_t(1), newNonce() }) {
    ControlMessage message;
    message.get().initOffer().setNonce(nonce);
    capnp::writeMessage(*pipe.ends[1], message.getMessage()).wait(io.waitScope);
    auto reply = capnp::readMessage(*pipe.ends[1]).wait(io.waitScope);
    auto body = reply->getRoot<capnp::AnyPointer>();
    EXPECT_TRUE(isEchoOfOffer(body, nonce));
    EXPECT_FALSE(isEchoOfOffer(body, nonce + 1)) << "not ours";
    EXPECT_TRUE(asControl(body) == nullptr);
  }

  // What it says of other messages is for the application.
  ControlMessage message;
  message.get().setMapped();
  capnp::writeMessage(*pipe.ends[1], message.getMessage()).wait(io.waitScope);
  auto reply = capnp::readMessage(*pipe.ends[1]).wait(io.waitScope);
  EXPECT_FALSE(isEchoOfOffer(reply->getRoot<capnp::AnyPointer>(), 0));
}

void makeUnknown(Control::Builder control, uint16_t which) {
  // A kind that a later version may have.
  auto proto = capnp::Schema::from<Control>().getProto().getStruct();
  auto data = capnp::toAny(control).getDataSection();
  memcpy(data.begin() + proto.getDiscriminantOffset() * 2, &which, 2);
}

TEST(Handshake, UnknownKindIsAControlMessageStill) {
  for (uint which: { unionSize(), unionSize() + 1, 65535u }) {
    ControlMessage message;
    makeUnknown(message.get(), which);
    OnTheWire wire(message.getMessage());
    auto control = KJ_ASSERT_NONNULL(asControl(wire.body()));
    EXPECT_EQ(which, uint(control.which()));
    EXPECT_FALSE(isEchoOfOffer(wire.body(), 0));
  }
}

TEST(Handshake, UnknownKindIsRefusedByAConnection) {
  // It may not be passed over: it would be part of an agreement which we do not understand.
  auto io = kj::setupAsyncIo();
  auto pipe = io.provider->newCapabilityPipe();
  SharedMemoryVatNetwork network(*pipe.ends[0], capnp::rpc::twoparty::Side::SERVER);
  auto connection = network.accept().wait(io.waitScope);
  ControlMessage message;
  makeUnknown(message.get(), 77);
  capnp::writeMessage(*pipe.ends[1], message.getMessage()).wait(io.waitScope);
  KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() {
    connection->receiveIncomingMessage().wait(io.waitScope);
  })) {
    EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), "unknown kind")) << kj::str(*e).cStr();
    EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), "77")) << kj::str(*e).cStr();
  } else {
    FAIL() << "not refused";
  }
}

TEST(Handshake, OffersOfOtherVersionsCanBeRead) {
  // With more fields than we know, as a later version may have, and with fewer.
  ControlMessage message;
  fill(Control::OFFER, message.get());
  auto known = message.get().asReader();
  auto copyOf = [](capnp::AnyStruct::Builder to, capnp::AnyStruct::Reader from) {
    auto a = to.getDataSection();
    auto b = from.getDataSection();
    memset(a.begin(), 0xff, a.size());
    memcpy(a.begin(), b.begin(), kj::min(a.size(), b.size()));
  };

  for (bool larger: { true, false }) {
    capnp::MallocMessageBuilder other;
    auto pointer = other.initRoot<capnp::rpc::Message>().initObsoleteSave();
    auto control = pointer.initAsAnyStruct(larger ? 20 : 2, larger ? 9 : 1);
    copyOf(control, capnp::toAny(known));
    auto offer = control.getPointerSection()[0].initAsAnyStruct(larger ? 12 : 2, larger ? 3 : 0);
    copyOf(offer, capnp::toAny(known.getOffer()));
    OnTheWire wire(other);
    auto read = KJ_ASSERT_NONNULL(asControl(wire.body())).getOffer();
    EXPECT_EQ(1u, read.getMinVersion());
    EXPECT_EQ(2u, read.getMaxVersion());
    EXPECT_EQ(0x123456789abcdef0u, read.getNonce());
    EXPECT_EQ(larger ? uint64_t(1) << 40 : 0, read.getRegionBytes());
    EXPECT_EQ(larger ? 7u : 0, read.getMaxFdsPerMessage());
  }
}

TEST(Handshake, AgreesOnTheHighestCommonVersion) {
  auto agree = [](uint32_t min, uint32_t max) -> uint32_t {
    capnp::MallocMessageBuilder message;
    auto offer = message.initRoot<protocol::Offer>();
    offer.setMinVersion(min);
    offer.setMaxVersion(max);
    return agreeOnVersion(offer).orDefault(0);
  };
  EXPECT_EQ(1u, PROTOCOL_VERSION) << "then there are more cases";
  EXPECT_EQ(1u, agree(1, 1));
  EXPECT_EQ(1u, agree(0, 1));
  EXPECT_EQ(1u, agree(1, 1000000));
  EXPECT_EQ(0u, agree(2, 3));
  EXPECT_EQ(0u, agree(0, 0));
  EXPECT_EQ(0u, agree(2, 1)) << "nonsense";
}

TEST(Handshake, NoncesDiffer) {
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; i++) seen.insert(newNonce());
  EXPECT_EQ(1000u, seen.size());
}

}  // namespace
}  // namespace capnpshm
