// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// A connection against a peer that the test writes by hand, frame by frame: docs/PROTOCOL.md from
// the other side.

#include <capnp-shm/frame-reader.h>
#include <capnp-shm/handshake.h>
#include <capnp-shm/memfd.h>
#include <capnp-shm/ring.h>
#include <capnp-shm/rpc-shm.h>
#include <capnp/message.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize-async.h>
#include <gtest/gtest.h>
#include <kj/async-io.h>
#include <kj/debug.h>
#include <string.h>

namespace capnpshm {
namespace testing {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using capnp::rpc::twoparty::Side;

constexpr size_t REGION_BYTES = 32 * 1024;

class HandMadePeer {
  // A network and, at the other end of its socket, whatever the test writes.

public:
  explicit HandMadePeer(
      SharedMemoryOptions options = SharedMemoryOptions(), kj::uint maxFdsPerMessage = 1)
      : io(kj::setupAsyncIo()), pipe(io.provider->newCapabilityPipe()),
        network(SharedMemoryContext { &io.unixEventPort, options }, *pipe.ends[0],
                maxFdsPerMessage, Side::CLIENT),
        region(createRegion(REGION_BYTES)), receiving(nullptr) {
    capnp::MallocMessageBuilder message;
    auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
    vatId.setSide(Side::SERVER);
    connection = KJ_ASSERT_NONNULL(network.connect(vatId));
  }

  // Frames --------------------------------------------------------------------

  void write(capnp::MessageBuilder& message, kj::ArrayPtr<const int> fds = nullptr) {
    capnp::writeMessage(*pipe.ends[1], fds, message.getSegmentsForOutput()).wait(io.waitScope);
  }

  template <typename Func>
  void writeControl(Func&& fill, kj::ArrayPtr<const int> fds = nullptr) {
    ControlMessage message;
    fill(message.get());
    write(message.getMessage(), fds);
  }

  void writeOffer(uint64_t bytes = REGION_BYTES) {
    writeControl([&](protocol::Control::Builder control) {
      auto offer = control.initOffer();
      offer.setMinVersion(1);
      offer.setMaxVersion(1);
      offer.setNonce(1234);
      offer.setRegionBytes(bytes);
      offer.setTakesBellSocket(takesBellSocket);
      offer.setTrustsPeer(trustsPeer);
      KJ_IF_MAYBE(limit, maxFdsAhead) offer.setMaxFdsAhead(*limit);
    });
  }

  void writeSwitch(bool withFd = true) {
    int fd = region.fd;
    writeControl([](protocol::Control::Builder control) { control.setSwitch(); },
        withFd ? kj::arrayPtr(&fd, 1) : nullptr);
  }

  void writeMapped() {
    writeControl([](protocol::Control::Builder control) { control.setMapped(); });
  }

  void writeTaken(uint64_t count) {
    writeControl([&](protocol::Control::Builder control) { control.setTaken(count); });
  }

  void writeDeclined() {
    writeControl([](protocol::Control::Builder control) { control.setDeclined("not here"); });
  }

  void writeFinish(kj::uint questionId) {
    capnp::MallocMessageBuilder message;
    message.initRoot<capnp::rpc::Message>().initFinish().setQuestionId(questionId);
    write(message);
  }

  kj::Own<capnp::MessageReader> read() {
    return capnp::readMessage(*pipe.ends[1]).wait(io.waitScope);
  }

  protocol::Control::Which readControl() {
    auto message = read();
    return KJ_ASSERT_NONNULL(asControl(message->getRoot<capnp::AnyPointer>())).which();
  }

  // Shared memory -------------------------------------------------------------

  void startReceiving() {
    receiving = connection->receiveIncomingMessage().then(
        [this](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) {
      ended = message == nullptr;
    }, [this](kj::Exception&& exception) {
      failure = kj::str(exception.getDescription());
    }).eagerlyEvaluate(nullptr);
  }

  uint64_t readOffer() {
    // Returns the size of the network's first region.
    auto message = read();
    auto control = KJ_ASSERT_NONNULL(asControl(message->getRoot<capnp::AnyPointer>()));
    KJ_REQUIRE(control.isOffer());
    return control.getOffer().getRegionBytes();
  }

  void readSwitch(uint64_t bytes) {
    // Maps the network's first region.
    kj::AutoCloseFd fdSpace[1];
    auto message = capnp::readMessage(*pipe.ends[1], fdSpace).wait(io.waitScope);
    auto control = KJ_ASSERT_NONNULL(asControl(message.reader->getRoot<capnp::AnyPointer>()));
    KJ_REQUIRE(control.isSwitch() && message.fds.size() == 1);
    peerMemory = mapPeerRegion(message.fds[0], bytes, bytes);
  }

  void writeHeader(uint64_t ringLines = FIRST_RING_LINES) {
    auto& h = header();
    h.version.store(PROTOCOL_VERSION);
    h.regionBytes.store(REGION_BYTES);
    h.freeOffset.store(sizeof(RegionHeader));
    h.ringOffset.store(sizeof(RegionHeader));
    h.ringLines.store(ringLines);
    h.consumed.store(FIRST_RING_LINES);
    h.magic.store(REGION_MAGIC);
    ring = DescriptorProducer(kj::arrayPtr(reinterpret_cast<DescriptorLine*>(
        region.mapping.bytes().begin() + sizeof(RegionHeader)), FIRST_RING_LINES));
  }

  void answerSwitch() {
    // Up to and without our `mapped`.
    writeHeader();
    writeSwitch();
    ASSERT_EQ(readControl(), protocol::Control::MAPPED);
  }

  void upgrade(uint64_t ringLines = FIRST_RING_LINES) {
    // Through the whole set-up.
    startReceiving();
    uint64_t bytes = readOffer();
    writeOffer();
    readSwitch(bytes);
    if (ringLines != FIRST_RING_LINES) {
      writeHeader(ringLines);
      writeSwitch();
      return;
    }
    answerSwitch();
    writeMapped();
    settle();
    ASSERT_EQ(network.getStats().incoming.transport, Transport::SHARED_MEMORY);
    ASSERT_EQ(failure, "");
  }

  void publishFinish(kj::uint questionId) {
    capnp::MallocMessageBuilder message;
    message.initRoot<capnp::rpc::Message>().initFinish().setQuestionId(questionId);
    auto segment = message.getSegmentsForOutput()[0];
    uint64_t body[8] = {};
    KJ_REQUIRE(segment.asBytes().size() <= sizeof(body));
    memcpy(body, segment.begin(), segment.asBytes().size());
    KJ_ASSERT_NONNULL(ring).publish(
        { DescriptorKind::MESSAGE, 0, 1, 0, uint16_t(segment.size()) },
        kj::arrayPtr(body, segment.size()));
  }

  DescriptorConsumer networksRing() {
    auto bytes = KJ_ASSERT_NONNULL(peerMemory).bytes();
    return DescriptorConsumer(kj::arrayPtr(reinterpret_cast<const DescriptorLine*>(
        bytes.begin() + networksHeader().ringOffset.load()), FIRST_RING_LINES));
  }

  const RegionHeader& networksHeader() {
    return *reinterpret_cast<const RegionHeader*>(KJ_ASSERT_NONNULL(peerMemory).bytes().begin());
  }

  RegionHeader& header() {
    return *reinterpret_cast<RegionHeader*>(region.mapping.bytes().begin());
  }

  void settle() {
    // Lets the network do what it can.
    for (int i = 0; i < 5; i++) {
      io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
    }
  }

  void send(size_t textSize) {
    auto message = connection->newOutgoingMessage(0);
    message->getBody().initAs<capnp::rpc::Message>().initResolve().initException()
        .initReason(textSize);
    message->send();
  }

  void expectFailure(const char* text) {
    settle();
    EXPECT_NE(nullptr, strstr(failure.cStr(), text)) << "failure: " << failure.cStr();
  }

  protocol::Control::Which announce(kj::uint id) {
    // A further region, for which the same memory does. Returns the answer.
    int fd = region.fd;
    writeControl([&](protocol::Control::Builder control) {
      control.initRegion().setId(id);
      control.getRegion().setBytes(REGION_BYTES);
    }, kj::arrayPtr(&fd, 1));
    return readControl();
  }

  void expectBell() {
    // On the control socket, next.
    uint64_t bell = 0;
    pipe.ends[1]->read(&bell, sizeof(bell)).wait(io.waitScope);
    EXPECT_EQ(BELL, bell);
  }

  void ringBell(kj::uint times = 1) {
    auto bells = kj::heapArray<uint64_t>(times);
    for (auto& bell: bells) bell = BELL;
    pipe.ends[1]->write(bells.begin(), bells.asBytes().size()).wait(io.waitScope);
  }

  void writeFds(kj::uint count) {
    auto fds = kj::heapArray<int>(count);
    for (auto& fd: fds) fd = region.fd;
    writeControl([&](protocol::Control::Builder control) { control.setFds(count); }, fds);
  }

  kj::AsyncIoContext io;
  kj::CapabilityPipe pipe;
  SharedMemoryVatNetwork network;
  OwnRegion region;
  kj::Maybe<Mapping> peerMemory;
  kj::Maybe<DescriptorProducer> ring;
  kj::Own<Connection> connection;
  kj::Promise<void> receiving;
  bool takesBellSocket = false;
  bool trustsPeer = false;
  kj::Maybe<kj::uint> maxFdsAhead;  // What it offers, if not what is usual.
  kj::String failure = kj::str("");
  bool ended = false;
};

}  // namespace testing
}  // namespace capnpshm
