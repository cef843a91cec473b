// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-peer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize-async.h>

namespace capnpshm {
namespace hostile {

using conformance::Root;
using conformance::RootImpl;
using process::resourcesOf;

kj::AutoCloseFd file(int fd) {
  KJ_REQUIRE(fd >= 0, strerror(errno));
  return kj::AutoCloseFd(fd);
}

kj::AutoCloseFd makeMemfd(int seals, size_t bytes, bool allocated, unsigned flags) {
  auto result = file(memfd_create("hostile", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
  KJ_SYSCALL(ftruncate(result, bytes));
  if (allocated) {
    KJ_REQUIRE(posix_fallocate(result, 0, bytes) == 0);
  }
  KJ_SYSCALL(fcntl(result, F_ADD_SEALS, seals));
  return result;
}

kj::AutoCloseFd makeOrdinaryFile(size_t bytes) {
  char path[] = "hostile-XXXXXX";
  auto result = file(mkostemp(path, O_CLOEXEC));
  unlink(path);
  KJ_SYSCALL(ftruncate(result, bytes));
  return result;
}

HostilePeer::HostilePeer(kj::AsyncIoContext& io): io(io), region(createRegion(REGION_BYTES)) {
  auto pair = process::newSocketPair();
  victimsEnd = process::wrapSocket(io, kj::mv(pair.mine));
  stream = process::wrapSocket(io, kj::mv(pair.peers));
}

void HostilePeer::writeBytes(kj::ArrayPtr<const kj::byte> bytes, kj::ArrayPtr<const int> fds) {
  stream->writeWithFds(bytes, nullptr, fds).wait(io.waitScope);
}

void HostilePeer::writeWords(std::initializer_list<uint64_t> words) {
  writeBytes(kj::arrayPtr(words.begin(), words.size()).asBytes());
}

void HostilePeer::write(capnp::MessageBuilder& message, kj::ArrayPtr<const int> fds) {
  capnp::writeMessage(*stream, fds, message.getSegmentsForOutput()).wait(io.waitScope);
}

void HostilePeer::offer(uint64_t bytes, uint minVersion, uint maxVersion) {
  control([&](protocol::Control::Builder c) {
    auto offer = c.initOffer();
    offer.setMinVersion(minVersion);
    offer.setMaxVersion(maxVersion);
    offer.setNonce(1234);
    offer.setRegionBytes(bytes);
  });
}

void HostilePeer::sealed(kj::ArrayPtr<const uint64_t> bytes, kj::ArrayPtr<const int> fds) {
  control([&](protocol::Control::Builder c) {
    auto list = c.initSealed().initBytes(bytes.size());
    for (uint i = 0; i < bytes.size(); i++) list.set(i, bytes[i]);
  }, fds);
}

protocol::Control::Which HostilePeer::readControl() {
  kj::AutoCloseFd fdSpace[1];
  auto message = capnp::readMessage(*stream, fdSpace).wait(io.waitScope);
  auto control = KJ_ASSERT_NONNULL(asControl(message.reader->getRoot<capnp::AnyPointer>()));
  if (control.isOffer()) victimsRegionBytes = control.getOffer().getRegionBytes();
  if (control.isSwitch()) {
    victimsRegion = mapPeerRegion(fdSpace[0], victimsRegionBytes, victimsRegionBytes);
  }
  return control.which();
}

void HostilePeer::awaitHangUp() {
  auto timeout = io.provider->getTimer().afterDelay(60 * kj::SECONDS)
      .then([]() -> size_t { KJ_FAIL_REQUIRE("the victim does not hang up"); });
  auto reading = stream->readAllBytes().then([](auto&& bytes) { return bytes.size(); },
      [](kj::Exception&& exception) -> size_t {
    KJ_REQUIRE(exception.getType() == kj::Exception::Type::DISCONNECTED, exception);
    return 0;
  });
  reading.exclusiveJoin(kj::mv(timeout)).wait(io.waitScope);
}

void HostilePeer::writeHeader() {
  auto& h = header();
  h.version = PROTOCOL_VERSION;
  h.regionBytes = REGION_BYTES;
  h.freeOffset = sizeof(RegionHeader);
  h.freeEntries = FREE_ENTRIES;
  h.ringOffset = RING;
  h.ringLines = FIRST_RING_LINES;
  h.consumed = FIRST_RING_LINES;
  h.magic = REGION_MAGIC;
}

void HostilePeer::agree() {
  writeHeader();
  offer();
  KJ_REQUIRE(readControl() == protocol::Control::OFFER);
  switchOver();
  KJ_REQUIRE(readControl() == protocol::Control::SWITCH);
  KJ_REQUIRE(readControl() == protocol::Control::MAPPED);
}

void HostilePeer::upgrade() {
  agree();
  mapped();
}

void HostilePeer::publish(DescriptorHead head, std::vector<uint64_t> body) {
  uint lines = head.lines;
  if (lines == 0) lines = head.lines = linesForBody(body.size());
  uint writable = kj::min(lines, MAX_DESCRIPTOR_LINES);
  body.resize(MAX_BODY_WORDS);
  for (uint i = 1; i < writable; i++) {
    auto& l = line(position + i);
    for (uint j = 0; j < CONTINUATION_BODY_WORDS; j++) l.words[j] = body[bodyCapacity(i) + j];
    l.stamp = continuationStamp(position + i);
  }
  auto& first = line(position);
  first.words[0] = head.pack();
  for (uint j = 0; j < HEAD_BODY_WORDS; j++) first.words[1 + j] = body[j];
  first.stamp = headStamp(position);
  position += writable;
}

void HostilePeer::publishMessage() {
  capnp::MallocMessageBuilder message;
  message.initRoot<capnp::rpc::Message>().initBootstrap().setQuestionId(position);
  auto segment = message.getSegmentsForOutput()[0];
  std::vector<uint64_t> body(segment.size());
  memcpy(body.data(), segment.begin(), segment.asBytes().size());
  publish({ DescriptorKind::MESSAGE, 0, 1, 0, uint16_t(segment.size()) }, body);
}

std::vector<uint64_t> HostilePeer::handlesInVictimsRing() {
  auto bytes = KJ_ASSERT_NONNULL(victimsRegion).bytes();
  auto& h = *reinterpret_cast<const RegionHeader*>(bytes.begin());
  auto ring = reinterpret_cast<const DescriptorLine*>(bytes.begin() + h.ringOffset.load());
  std::vector<uint64_t> result;
  for (uint64_t p = FIRST_RING_LINES; p < 2 * FIRST_RING_LINES;) {
    auto& first = ring[p % FIRST_RING_LINES];
    if (first.stamp.load() != headStamp(p)) break;
    auto head = DescriptorHead::unpack(first.words[0].load());
    uint index = head.inlineWords;
    if (head.segments > (index > 0 ? 1 : 0)) {
      auto& next = ring[(p + linesForBody(index + 1) - 1) % FIRST_RING_LINES];
      result.push_back(index < HEAD_BODY_WORDS ? first.words[1 + index].load()
          : next.words[(index - HEAD_BODY_WORDS) % CONTINUATION_BODY_WORDS].load());
    }
    p += head.lines;
  }
  return result;
}

std::vector<uint64_t> entry(uint32_t region, uint32_t words, uint64_t offset) {
  return { SegmentEntry { region, words, offset }.packFirst(), offset };
}

std::vector<uint64_t> operator+(std::vector<uint64_t> a, const std::vector<uint64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// =======================================================================================

namespace {

class LogCounter final: public kj::ExceptionCallback {
  // What a peer does is no reason to fill the log.

public:
  void logMessage(kj::LogSeverity severity, const char* file, int line, int contextDepth,
                  kj::String&& text) override {
    if (severity >= kj::LogSeverity::WARNING) {
      ADD_FAILURE() << "logged: " << file << ":" << line << ": " << text.cStr();
    }
    kj::ExceptionCallback::logMessage(severity, file, line, contextDepth, kj::mv(text));
  }
};

kj::Promise<void> receiveAll(capnp::TwoPartyVatNetworkBase::Connection& connection) {
  return connection.receiveIncomingMessage().then(
      [&connection](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message)
          -> kj::Promise<void> {
    if (message == nullptr) return kj::READY_NOW;
    return receiveAll(connection);
  });
}

}  // namespace

void HostileTest::run(const Misdeed& misdeed) {
  LogCounter logs;
  for (bool trust: { false, true }) {
    SCOPED_TRACE(trust ? "trusting" : "untrusting");
    SharedMemoryContext context;
    context.port = &io.unixEventPort;
    context.options.trustPeer = trust;
    context.options.maxBytes = 4 << 20;
    context.options.plainCalls = 1;
    if (misdeed.acceptSealed) {
      if (trust) continue;
      context.options.sealedThresholdBytes = 16 * 1024;
    }
    {
      SCOPED_TRACE("network");
      runAgainstNetwork(misdeed, context);
    }
    if (!misdeed.bareNetworkOnly) {
      SCOPED_TRACE("server");
      runAgainstServer(misdeed, context);
    }
  }
}

void HostileTest::runAgainstNetwork(
    const Misdeed& misdeed, const SharedMemoryContext& context) {
  auto before = resourcesOf();
  {
    HostilePeer peer(io);
    auto end = kj::mv(peer.victimsEnd);
    capnp::ReaderOptions options;
    options.traversalLimitInWords = LIMIT_WORDS;
    SharedMemoryVatNetwork network(context, *end, 1, conformance::Side::SERVER, options);
    auto connection = network.accept().wait(io.waitScope);
    peer.letVictimSend = [&](size_t bytes) { process::sendNumbered(*connection, 0, bytes); };
    uint complaints = 0;
    kj::String first;
    auto receiving = receiveAll(*connection).then([]() { ADD_FAILURE() << "a clean end"; },
        [&](kj::Exception&& exception) {
      ++complaints;
      first = kj::str(exception.getDescription());
    }).eagerlyEvaluate(nullptr);

    misdeed.commit(peer);
    await(kj::mv(receiving));
    EXPECT_NE(nullptr, strstr(first.cStr(), misdeed.complaint)) << first.cStr();
    EXPECT_EQ(1, complaints);

    // It stays at that: the same is said to whoever asks again, and sending does not throw.
    if (misdeed.plain) {
      // No more is promised.
    } else KJ_IF_MAYBE(again, kj::runCatchingExceptions([&]() {
      await(receiveAll(*connection));
    })) {
      EXPECT_EQ(first, again->getDescription());
    } else {
      ADD_FAILURE() << "the connection goes on";
    }
    EXPECT_NO_THROW(process::sendNumbered(*connection, 1, 1000));
  }
  EXPECT_EQ(before, resourcesOf());
}

void HostileTest::runAgainstServer(
    const Misdeed& misdeed, const SharedMemoryContext& context) {
  conformance::ServerState state;
  SharedMemoryServer server(context, kj::heap<RootImpl>(state));
  auto pipe = io.provider->newCapabilityPipe();
  server.accept(kj::mv(pipe.ends[0]));
  SharedMemoryClient honest(context, *pipe.ends[1]);
  auto root = honest.bootstrap().castAs<Root>();
  uint sequence = 0;
  auto check = [&]() {
    EXPECT_EQ(sequence++, await(root.sequenceRequest().send().then(
        [](auto&& response) { return response.getValue(); })));
  };
  // Until the bells have sockets of their own, so that no descriptor comes later.
  settle(check, honest);
  ASSERT_EQ(Transport::SHARED_MEMORY, honest.getStats().outgoing.transport);

  auto before = resourcesOf();
  {
    HostilePeer peer(io);
    server.accept(kj::mv(peer.victimsEnd), 1);
    misdeed.commit(peer);
    if (peer.stream.get() != nullptr) peer.awaitHangUp();
    check();
  }
  // A loop that finds what it has to do without its port hears of a hang-up a little later.
  await(io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS));
  for (uint i = 0; i < 2; i++) check();
  EXPECT_EQ(before, resourcesOf());
}

}  // namespace hostile
}  // namespace capnpshm
