// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <kj/debug.h>

// The setting up of a SharedMemoryConnection: offer, answer, mapped or declined, SWITCH.

namespace capnpshm {

namespace {

constexpr uint FREE_RING_ENTRIES = 512;
constexpr size_t MIN_FIRST_REGION = 16 * 1024;
constexpr size_t GROW_AT_ONCE_BYTES = 8 << 20;

constexpr uint RETURNS_OF_ONE_CALL = 2;
// That of Bootstrap, and its own.

size_t firstRegionBytes(const SharedMemoryOptions& options) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  size_t bytes = kj::max(options.firstRegionBytes, MIN_FIRST_REGION);
  return (bytes + pageSize - 1) / pageSize * pageSize;
}

}  // namespace

void SharedMemoryConnection::offer() {
  if (offered || plainReason != nullptr || failure != nullptr) return;
  if (createOutbox()) writeOffer();
}

bool SharedMemoryConnection::createOutbox(kj::Maybe<uint32_t> agreedVersion) {
  if (outbox != nullptr) return true;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    OutboxLimits limits;
    limits.firstRegionBytes = firstRegionBytes(options);
    limits.maxBytes = kj::max(options.maxBytes, limits.firstRegionBytes);
    limits.freeEntries = options.trustPeer ? FREE_RING_ENTRIES : 0;
    limits.retiredBytes = options.peerLimits.retiredBytes;
    // Without spinning, the sides sleep after each few parts.
    limits.growAtOnceBytes = options.spinMicroseconds > 0 ? GROW_AT_ONCE_BYTES : 0;
    outbox = kj::atomicRefcounted<Outbox>(
        limits, kj::atomicAddRef(*foreignWake), agreedVersion);
  })) {
    stayPlain(kj::str("this side cannot make shared memory: ", exception->getDescription()));
    return false;
  }
  return true;
}

void SharedMemoryConnection::writeOffer() {
  auto& o = *KJ_ASSERT_NONNULL(outbox);
  offered = true;
  nonce = newNonce();
  auto message = kj::heap<ControlMessage>();
  auto builder = message->get().initOffer();
  builder.setMinVersion(PROTOCOL_VERSION);
  builder.setMaxVersion(PROTOCOL_VERSION);
  builder.setNonce(nonce);
  builder.setRegionBytes(o.getFirstRegionBytes());
  builder.setTrustsPeer(options.trustPeer);
  builder.setMaxFdsPerMessage(maxFdsPerMessage);
  builder.setTakesBellSocket(port != nullptr);
  builder.setSealedBytes(acceptedSealedBytes());
  builder.setMaxFdsAhead(options.peerLimits.fdsAhead);
  auto fds = kj::heapArray<kj::AutoCloseFd>(1);
  fds[0] = o.takeFirstRegionFd();
  writeControl(kj::mv(message), kj::mv(fds));
}

bool SharedMemoryConnection::handlePlainBody(
    kj::Maybe<capnp::AnyPointer::Reader> body, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  // True if the message was for the transport; false if it is Cap'n Proto's. The body is null if
  // it is too long for the transport.

  KJ_IF_MAYBE(b, body) {
    KJ_IF_MAYBE(control, asControl(*b)) {
      handleControl(*control, fds);
      return true;
    }
    // Of one that has offered, and so knows what that is, it is no echo.
    if (offered && !gotOffer && !gotEcho && isEchoOfOffer(*b, nonce)) {
      gotEcho = true;
      stayPlain("the peer does not know shared memory");
      return true;
    }
  }
  if (!offered && plainReason == nullptr) {
    // An offer comes before everything else or not at all.
    stayPlain("the peer did not offer shared memory");
  }
  return false;
}

void SharedMemoryConnection::handleControl(
    protocol::Control::Reader control, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  switch (control.which()) {
    case protocol::Control::OFFER:
      handleOffer(control.getOffer(), fds);
      return;

    case protocol::Control::MAPPED:
      handleMapped();
      return;

    case protocol::Control::DECLINED:
      KJ_REQUIRE(!gotDeclined, "peer declined shared memory twice");
      gotDeclined = true;
      KJ_REQUIRE(!gotMapped, "peer declined shared memory after it had mapped it");
      stayPlain(kj::str("the peer declined: ", control.getDeclined()));
      return;

    case protocol::Control::SWITCH:
      KJ_REQUIRE(gotMapped && outgoingShared && !incomingShared,
          "peer switched to shared memory before that was agreed");
      switchIncoming(isMutualTrust());
      return;

    case protocol::Control::REGION:
      handleRegion(control.getRegion(), fds);
      return;

    case protocol::Control::REGION_MAPPED:
    case protocol::Control::REGION_REFUSED:
      KJ_REQUIRE(outgoingShared, "peer answered for a region before shared memory was agreed");
      KJ_IF_MAYBE(o, outbox) {
        if (control.isRegionMapped()) {
          (*o)->regionMapped(control.getRegionMapped());
        } else {
          (*o)->regionRefused(control.getRegionRefused());
        }
      }
      publishWaiting();
      return;

    case protocol::Control::FDS:
      handleFds(nullptr, fds);
      return;

    case protocol::Control::SEALED:
      handleSealed(control.getSealed(), fds);
      return;

    case protocol::Control::END:
      KJ_REQUIRE(!ended, "peer ended its messages twice");
      if (putOff && gotMapped) confirm();
      if (plainReason == nullptr && !incomingShared) {
        KJ_REQUIRE(gotMapped && outgoingShared,
            "peer ended its messages before shared memory was agreed");
        switchIncoming(false);
      }
      ended = true;
      return;

    case protocol::Control::BELL_SOCKET:
      handleBellSocket(fds);
      return;

    case protocol::Control::BELL_SOCKET_TAKEN:
      if (isMutualTrust() && !control.getBellSocketTaken() && !eventBellLost) {
        eventBellLost = true;
        if (peerBell == nullptr) return;
        // What was rung there was not heard.
        peerBell = nullptr;
        enqueueBell();
        return;
      }
      KJ_REQUIRE(bellSocketState == OFFERED && bellSocket != nullptr,
          "peer answers for a bell that was not offered to it");
      if (control.getBellSocketTaken()) {
        bellSocketState = TAKEN;
      } else {
        bellSocket = nullptr;
      }
      return;

    case protocol::Control::BELL:
      KJ_FAIL_REQUIRE("peer sent an event bell at the wrong place");
  }
  KJ_FAIL_REQUIRE("peer sent a control message of an unknown kind", uint(control.which()));
}

void SharedMemoryConnection::handleFds(
    kj::Array<SealedFile> sealed, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(incomingShared, "peer sent file descriptors before it switched to shared memory");
  auto kept = kj::heapArrayBuilder<kj::AutoCloseFd>(
      kj::min(fds.size(), size_t(maxFdsPerMessage)));
  for (auto& fd: fds) {
    if (kept.size() < kept.capacity() && fd != nullptr) kept.add(kj::mv(fd));
  }
  FdRecord record { kept.finish(), kj::mv(sealed) };
  KJ_REQUIRE(fdRecords.empty() || fdRecordsCost + record.cost() <= options.peerLimits.fdsAhead,
      "peer sent file descriptors too far ahead of its messages; see PeerLimits::fdsAhead",
      fdRecordsCost, record.cost(), options.peerLimits.fdsAhead);
  fdRecordsCost += record.cost();
  fdRecords.push_back(kj::mv(record));
}

void SharedMemoryConnection::handleSealed(
    protocol::Sealed::Reader sealed, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(acceptedSealedBytes() > 0,
      "peer sent sealed segments, which this side does not accept");
  auto bytes = sealed.getBytes();
  KJ_REQUIRE(bytes.size() > 0 && bytes.size() <= MAX_SEALED_SEGMENTS,
      "peer sent an impossible number of sealed segments", bytes.size());
  // If there are fewer fds than there should be, somebody had none to spare; then the connection
  // ends, but not before the messages that came before.
  auto files = KJ_MAP(size, bytes) { return SealedFile { nullptr, size }; };
  size_t arrived = kj::min(files.size(), fds.size());
  for (size_t i = 0; i < arrived; i++) files[i].fd = kj::mv(fds[i]);
  handleFds(kj::mv(files), fds.slice(arrived, fds.size()));
}

uint64_t SharedMemoryConnection::acceptedSealedBytes() const {
  // Who reads in place anyway has no use for them.
  if (options.sealedThresholdBytes == 0 || options.trustPeer) return 0;
  return options.sealedHeldBytes;
}

void SharedMemoryConnection::switchIncoming(bool bellExpected) {
  // From here on the peer's messages come through shared memory.
  incomingShared = true;
  controlTask = readControl(bellExpected).eagerlyEvaluate([this](kj::Exception&& exception) {
    fail(kj::mv(exception));
  });
}

void SharedMemoryConnection::handleOffer(
    protocol::Offer::Reader peerOffer, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(!gotOffer, "peer offered shared memory twice");
  gotOffer = true;

  if (plainReason != nullptr) {
    // We cannot, and if we had offered before, have said so.
    decline(KJ_ASSERT_NONNULL(plainReason));
    return;
  }

  KJ_IF_MAYBE(v, agreeOnVersion(peerOffer)) {
    version = *v;
  } else {
    decline(kj::str("no common version: peer speaks ", peerOffer.getMinVersion(), " to ",
        peerOffer.getMaxVersion(), ", this side ", PROTOCOL_VERSION));
    return;
  }

  if (fds.size() == 0 || fds[0] == nullptr) {
    decline("file descriptors do not pass through this connection");
    return;
  }

  if (peerOffer.getRegionBytes() > options.maxBytes) {
    // Each side chooses its sizes for itself; that they do not fit is nobody's fault.
    decline(kj::str("the peer's first region has ", peerOffer.getRegionBytes(),
        " bytes, and this side maps no more than ", options.maxBytes));
    return;
  }

  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    peerFirstRegion = kj::atomicRefcounted<PeerRegion>(
        0, mapPeerRegion(fds[0], peerOffer.getRegionBytes(), options.maxBytes));
  })) {
    if (exception->getType() != kj::Exception::Type::OVERLOADED) {
      kj::throwFatalException(kj::mv(*exception));
    }
    decline(exception->getDescription());
    return;
  }
  peerTrustsUs = peerOffer.getTrustsPeer();
  peerTakesBellSocket = peerOffer.getTakesBellSocket();
  peersFdsAhead = peerOffer.getMaxFdsAhead();
  peersSealedBytes = peerOffer.getSealedBytes();

  if (offered) {
    putOff = true;
    return;
  }
  if (!createOutbox(version)) {
    decline(KJ_ASSERT_NONNULL(plainReason));
    return;
  }
  writeOffer();
  writeMapped();
}

void SharedMemoryConnection::writeMapped() {
  auto message = kj::heap<ControlMessage>();
  message->get().setMapped();
  writeControl(kj::mv(message));
  sentMapped = true;
}

// Many connections are made for one call. When its answer is there both sides' regions are made and
// mapped, but no page of them was touched yet, and each that is costs page faults, and more when it is
// unmapped. So the side that offered first leaves them alone until it goes to sleep with the
// answer and without having closed the connection, or until it is clear before that there will be
// more: its next message that begins something, whatever the peer begins, or more answers than one
// call has.

void SharedMemoryConnection::confirm() {
  // Says that the peer's region is mapped, which was put off, and if the peer has said so too begins
  // to share. Throws if the peer's header is wrong.
  putOff = false;
  KJ_ASSERT_NONNULL(outbox)->writeHeader(version);
  writeMapped();
  if (gotMapped) startSharing();
}

void SharedMemoryConnection::confirmBeforeSending(
    kj::ArrayPtr<const kj::ArrayPtr<const capnp::word>> segments) {
  if (!gotMapped) return;
  if (segments.size() > 0) {
    KJ_IF_MAYBE(kind, kindOf(segments[0])) {
      switch (*kind) {
        case capnp::rpc::Message::FINISH:
        case capnp::rpc::Message::RELEASE:
        case capnp::rpc::Message::ABORT:
          return;
        default:
          break;
      }
    }
  }
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() { confirm(); })) {
    fail(kj::mv(*exception));
  }
}

void SharedMemoryConnection::confirmAfterReceiving(kj::ArrayPtr<const capnp::word> firstSegment) {
  // Of a plain frame that is a message of Cap'n Proto's.
  if (!putOff) return;
  if (gotMapped) {
    KJ_IF_MAYBE(kind, kindOf(firstSegment)) {
      if (*kind == capnp::rpc::Message::RETURN && ++returnsWhilePutOff <= RETURNS_OF_ONE_CALL) {
        active();  // See flush().
        return;
      }
    }
  }
  // Without `mapped` the peer's offer was no answer: both sides offered at once, and both would wait
  // for the other.
  confirm();
}

void SharedMemoryConnection::handleRegion(
    protocol::Region::Reader region, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  // Or a peer that does not read could make us queue answers without bounds.
  KJ_REQUIRE(unwrittenAnswers < MAX_UNANSWERED_REGIONS,
      "peer announced more regions than it may before they are answered");
  admitRegion();
  KJ_IF_MAYBE(i, inbox) {
    kj::Maybe<int> fd;
    if (fds.size() > 0 && fds[0] != nullptr) fd = fds[0].get();
    auto message = kj::heap<ControlMessage>();
    if ((*i)->addRegion(region.getId(), fd, region.getBytes())) {
      message->get().setRegionMapped(region.getId());
    } else {
      message->get().setRegionRefused(region.getId());
    }
    ++unwrittenAnswers;
    writeControl(message.attach(kj::defer([this]() { --unwrittenAnswers; })));
    return;
  }
  KJ_FAIL_REQUIRE("peer announced a region before shared memory was agreed");
}

void SharedMemoryConnection::handleMapped() {
  KJ_REQUIRE(offered && !gotMapped, "peer mapped a region that was not offered to it");
  KJ_REQUIRE(gotOffer && !gotDeclined,
      "peer mapped a region, but has not offered one or has declined ours", gotDeclined);
  gotMapped = true;
  if (putOff) {
    // Only confirm() is missing, and no more agreement.
    outgoingStats.transport = Transport::SHARED_MEMORY;
    active();  // See flush().
    return;
  }
  if (!sentMapped) return;   // We declined.
  startSharing();
}

void SharedMemoryConnection::startSharing() {
  auto& o = KJ_ASSERT_NONNULL(outbox);
  if (options.sealedThresholdBytes > 0 && peersSealedBytes > 0) {
    o->allowSealed({ options.sealedThresholdBytes, peersSealedBytes,
        options.trustPeer ? uint64_t(kj::maxValue) : options.sealedTotalBytes });
  }
  InboxLimits limits;
  limits.traversalLimitInWords = receiveOptions.traversalLimitInWords;
  limits.nestingLimit = receiveOptions.nestingLimit;
  limits.maxBytes = options.maxBytes;
  limits.inPlace = options.trustPeer;
  limits.sealedBytes = acceptedSealedBytes();
  limits.furtherRegions = options.peerLimits.regions;
  auto& i = inbox.emplace(kj::atomicRefcounted<Inbox>(kj::atomicAddRef(*o),
      kj::mv(KJ_ASSERT_NONNULL(peerFirstRegion)), version, limits,
      kj::atomicAddRef(*foreignWake)));
  i->onRelease([this]() { active(); });
  foreignTask = listenToForeignThreads().eagerlyEvaluate(nullptr);
  o->start(i->getPeerHeader(), i->getPeerFreeRing());
  sleepWord = SleepWord(o->getHeader().sleepWord);
  peerSleepWord = PeerSleepWord(i->getPeerHeader().sleepWord);

  outgoingShared = true;
  outgoingStats.transport = Transport::SHARED_MEMORY;
  if (shuttingDown) return;  // The peer has taken our `end`, or will, for the switch.
  auto message = kj::heap<ControlMessage>();
  message->get().setSwitch();
  writeControl(kj::mv(message));
  if (isMutualTrust()) sendBell();
}

void SharedMemoryConnection::sendBell() {
  auto message = kj::heap<ControlMessage>();
  message->get().setBell();
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() {
    peerBell = kj::heap<EventBell>();
  })) {
    // Without a descriptor to spare the socket does as well.
    (void)exception;
    writeControl(kj::mv(message));
    return;
  }
  writeControl(kj::mv(message), nullptr, KJ_ASSERT_NONNULL(peerBell)->getFd());
}

void SharedMemoryConnection::offerBellSocket() {
  bellSocketState = OFFERED;
  if (!peerTakesBellSocket || peerBell != nullptr) return;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() {
    bellSocket = kj::heap<BellSocket>();
  })) {
    // Without a descriptor to spare the control socket does as well.
    (void)exception;
    return;
  }
  auto message = kj::heap<ControlMessage>();
  message->get().setBellSocket();
  auto fds = kj::heapArray<kj::AutoCloseFd>(1);
  fds[0] = KJ_ASSERT_NONNULL(bellSocket)->takePeersEnd();
  writeControl(kj::mv(message), kj::mv(fds));
}

void SharedMemoryConnection::handleBellSocket(kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(incomingShared && port != nullptr && ownBell == nullptr,
      "peer sent a bell that this side cannot take");
  bool taken = fds.size() > 0 && fds[0] != nullptr;
  if (taken) {
    ownBell = BellSocket::newListener(*port, kj::mv(fds[0]));
    bellTask = listenToBell().eagerlyEvaluate([this](kj::Exception&& exception) {
      fail(kj::mv(exception));
    });
  }
  auto message = kj::heap<ControlMessage>();
  message->get().setBellSocketTaken(taken);
  writeControl(kj::mv(message));
}

void SharedMemoryConnection::decline(kj::StringPtr reason) {
  auto message = kj::heap<ControlMessage>();
  message->get().setDeclined(reason);
  writeControl(kj::mv(message));
  stayPlain(reason);
}

void SharedMemoryConnection::stayPlain(kj::StringPtr reason) {
  if (plainReason != nullptr) return;
  plainReason = kj::str(reason);
  outgoingStats.transport = Transport::PLAIN;
  incomingStats.transport = Transport::PLAIN;
  putOff = false;
  peerFirstRegion = nullptr;
  outbox = nullptr;
  if (shuttingDown) endTask = endWriting();
  if (options.requireSharedMemory) {
    fail(KJ_EXCEPTION(FAILED, "shared memory is required, but cannot be used", reason));
  }
}

}  // namespace capnpshm
