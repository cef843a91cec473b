// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <kj/debug.h>

// The setting up of a SharedMemoryConnection: offer, answer, SWITCH, mapped or declined.

namespace capnpshm {

namespace {

constexpr uint FREE_RING_ENTRIES = 512;
constexpr size_t MIN_FIRST_REGION = 16 * 1024;
constexpr size_t GROW_AT_ONCE_BYTES = 8 << 20;
constexpr size_t MIN_WORDS_NOT_PUT_OFF = 256;
// For a message of so many, 2 KiB, shared memory is not put off.

size_t firstRegionBytes(const SharedMemoryOptions& options) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  size_t bytes = kj::max(options.firstRegionBytes, MIN_FIRST_REGION);
  return (bytes + pageSize - 1) / pageSize * pageSize;
}

}  // namespace

void SharedMemoryConnection::offer() {
  if (offered || plainReason != nullptr || failure != nullptr) return;
  writeOffer();
}

void SharedMemoryConnection::writeOffer() {
  offered = true;
  // An answer to an offer comes back from nobody.
  if (!gotOffer) nonce = newNonce();
  auto message = kj::heap<ControlMessage>();
  auto builder = message->get().initOffer();
  builder.setMinVersion(PROTOCOL_VERSION);
  builder.setMaxVersion(PROTOCOL_VERSION);
  builder.setNonce(nonce);
  builder.setRegionBytes(firstRegionBytes(options));
  builder.setTrustsPeer(options.trustPeer);
  builder.setMaxFdsPerMessage(maxFdsPerMessage);
  builder.setTakesBellSocket(port != nullptr);
  builder.setSealedBytes(acceptedSealedBytes());
  builder.setMaxFdsAhead(options.peerLimits.fdsAhead);
  if (previousWrite == nullptr) return;
  if (gotOffer) {
    // At once: the peer begins to wake up while we look at its first messages.
    writeControl(kj::mv(message));
  } else {
    // With the first messages.
    addPlain(PlainFrame { {}, kj::mv(message), nullptr, 0, clock.now() });
  }
}

void SharedMemoryConnection::handleControl(
    protocol::Control::Reader control, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  switch (control.which()) {
    case protocol::Control::OFFER:
      handleOffer(control.getOffer());
      return;

    case protocol::Control::MAPPED:
      handleMapped();
      return;

    case protocol::Control::DECLINED:
      KJ_REQUIRE(!gotDeclined, "peer declined shared memory twice");
      gotDeclined = true;
      KJ_REQUIRE(!gotMapped, "peer declined shared memory after it had mapped it");
      if (isSharing()) {
        auto message = kj::heap<ControlMessage>();
        message->get().setTaken(sharedMessagesTaken);
        writeControl(kj::mv(message));
      }
      stayPlain(kj::str("the peer declined: ", control.getDeclined()));
      // If we had too, it has taken nothing.
      if (awaitsTaken) sendAgain(0);
      return;

    case protocol::Control::TAKEN:
      KJ_REQUIRE(awaitsTaken && gotMapped, "peer tells what it has taken, but was not asked");
      KJ_REQUIRE(control.getTaken() <= unconfirmed.size(),
          "peer says that it has taken messages which it was not sent",
          control.getTaken(), unconfirmed.size());
      sendAgain(control.getTaken());
      return;

    case protocol::Control::SWITCH:
      handleSwitch(fds);
      return;

    case protocol::Control::REGION:
      handleRegion(control.getRegion(), fds);
      return;

    case protocol::Control::REGION_MAPPED:
    case protocol::Control::REGION_REFUSED:
      KJ_REQUIRE(isConfirmed(), "peer answered for a region before shared memory was agreed");
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
      KJ_REQUIRE(isConfirmed(), "peer ended its messages before shared memory was agreed");
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
      // It was under way when we declined.
      KJ_REQUIRE(gotMapped && plainReason != nullptr && isMutualTrust(),
          "peer sent an event bell at the wrong place");
      return;
  }
  KJ_FAIL_REQUIRE("peer sent a control message of an unknown kind", uint(control.which()));
}

void SharedMemoryConnection::handleFds(
    kj::Array<SealedFile> sealed, kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(isConfirmed(), "peer sent file descriptors before shared memory was agreed");
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

void SharedMemoryConnection::handleOffer(protocol::Offer::Reader peerOffer) {
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

  peerFirstRegionBytes = peerOffer.getRegionBytes();
  if (peerFirstRegionBytes > options.maxBytes) {
    // Each side chooses its sizes for itself; that they do not fit is nobody's fault.
    decline(kj::str("the peer's first region has ", peerFirstRegionBytes,
        " bytes, and this side maps no more than ", options.maxBytes));
    return;
  }
  peerTrustsUs = peerOffer.getTrustsPeer();
  peerTakesBellSocket = peerOffer.getTakesBellSocket();
  peersFdsAhead = peerOffer.getMaxFdsAhead();
  peersSealedBytes = peerOffer.getSealedBytes();

  // Only confirmation is missing, and no more agreement.
  outgoingStats.transport = Transport::SHARED_MEMORY;
  if (offered) {
    switchPutOff = true;
    active();  // See flush().
  } else {
    writeOffer();
  }
}

// Many connections are made for a few calls, and regions cost more than such calls do: as much as
// some five of them over a socket. So the side that offered first puts its switch off for calls
// that follow each other without a pause. Over the socket too they are faster than
// TwoPartyVatNetwork's, as both sides look for what comes before they sleep; it puts off until that
// has paid for the switch, or nearly. It switches when it goes to sleep with all answers and
// without having closed the connection, which costs no call any time; or when it is clear before
// that there will be more: further calls, a large message, or anything else that one of the sides
// begins. The other side follows.

bool SharedMemoryConnection::mayStayPlain(size_t words) const {
  // For a message of that size, which belongs to one of our calls.
  return words < MIN_WORDS_NOT_PUT_OFF && callsSent <= options.plainCalls;
}

void SharedMemoryConnection::switchBeforeSending(capnp::rpc::Message::Which kind, size_t words) {
  switch (kind) {
    case capnp::rpc::Message::FINISH:
    case capnp::rpc::Message::RELEASE:
    case capnp::rpc::Message::ABORT:
      return;
    case capnp::rpc::Message::CALL:
      if (mayStayPlain(words)) return;
      break;
    default:
      break;
  }
  beginSwitch();
}

void SharedMemoryConnection::switchAfterReceiving(
    kj::ArrayPtr<const capnp::word> firstSegment, size_t words) {
  // Of a plain frame that is a message of Cap'n Proto's.
  if (!switchPutOff) return;
  if (kindOf(firstSegment) == capnp::rpc::Message::RETURN && mayStayPlain(words)) {
    active();  // See flush().
    return;
  }
  beginSwitch();
}

void SharedMemoryConnection::beginSwitch() {
  if (!switchOutgoing()) return;
  // Whether the peer can map our region must not depend on whether the application reads: from here
  // on the answer is awaited. Should a message come instead, it waits for the application.
  if (readAhead == nullptr && !readingPlain) {
    readAhead = receivePlain().eagerlyEvaluate(nullptr);
  }
}

bool SharedMemoryConnection::switchOutgoing() {
  // From here on our messages are published, in a region that the peer has yet to map. False if the
  // system refuses one, and then the connection stays plain.
  switchPutOff = false;
  if (previousWrite == nullptr) return false;
  auto message = kj::heap<ControlMessage>();
  message->get().setSwitch();
  auto fds = kj::heapArray<kj::AutoCloseFd>(1);
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    OutboxLimits limits;
    limits.firstRegionBytes = firstRegionBytes(options);
    limits.maxBytes = kj::max(options.maxBytes, limits.firstRegionBytes);
    limits.freeEntries = options.trustPeer ? FREE_RING_ENTRIES : 0;
    limits.retiredBytes = options.peerLimits.retiredBytes;
    // Without spinning, the sides sleep after each few parts.
    limits.growAtOnceBytes = options.spinMicroseconds > 0 ? GROW_AT_ONCE_BYTES : 0;
    auto& o = outbox.emplace(kj::atomicRefcounted<Outbox>(
        limits, kj::atomicAddRef(*foreignWake), version));
    fds[0] = o->takeFirstRegionFd();
  })) {
    decline(kj::str("this side cannot make shared memory: ", exception->getDescription()));
    return false;
  }
  writeControl(kj::mv(message), kj::mv(fds));
  outgoingShared = true;
  return true;
}

void SharedMemoryConnection::handleSwitch(kj::ArrayPtr<kj::AutoCloseFd> fds) {
  KJ_REQUIRE(offered && gotOffer && !gotSwitch && !gotDeclined,
      "peer switched to shared memory before that was agreed, or twice", gotSwitch, gotDeclined);
  gotSwitch = true;
  // If we have declined already, or can answer no more (which the peer learns from our end of the
  // stream), its messages come as plain frames.
  if (plainReason != nullptr || previousWrite == nullptr) return;

  if (fds.size() == 0 || fds[0] == nullptr) {
    decline("file descriptors do not pass through this connection");
    return;
  }
  kj::Own<PeerRegion> region;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    region = kj::atomicRefcounted<PeerRegion>(
        0, mapPeerRegion(fds[0], peerFirstRegionBytes, options.maxBytes));
  })) {
    if (exception->getType() != kj::Exception::Type::OVERLOADED) {
      kj::throwFatalException(kj::mv(*exception));
    }
    decline(exception->getDescription());
    return;
  }

  if (!outgoingShared && !switchOutgoing()) return;
  startSharing(kj::mv(region));
  auto message = kj::heap<ControlMessage>();
  message->get().setMapped();
  writeControl(kj::mv(message));
  if (isMutualTrust()) sendBell();
}

void SharedMemoryConnection::handleMapped() {
  KJ_REQUIRE(switchWritten && !gotMapped, "peer mapped a region that was not offered to it");
  KJ_REQUIRE(gotSwitch && !gotDeclined,
      "peer mapped a region, but has not switched or has declined ours", gotSwitch, gotDeclined);
  gotMapped = true;
  if (!isSharing()) return;  // We have declined.
  unconfirmed.clear();
  publishWaiting();
  active();
}

void SharedMemoryConnection::startSharing(kj::Own<PeerRegion> region) {
  // Begins to read the peer's ring, in its first region. That the peer cannot map ours may still be
  // said; else it will soon confirm that it has. Throws if its header is wrong.
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
      kj::mv(region), version, limits,
      kj::atomicAddRef(*foreignWake)));
  i->onRelease([this]() { active(); });
  foreignTask = listenToForeignThreads().eagerlyEvaluate(nullptr);
  o->start(i->getPeerHeader(), i->getPeerFreeRing());
  sleepWord = SleepWord(o->getHeader().sleepWord);
  peerSleepWord = PeerSleepWord(i->getPeerHeader().sleepWord);
  controlTask = readControl().eagerlyEvaluate([this](kj::Exception&& exception) {
    fail(kj::mv(exception));
  });
  // The peer may have gone to sleep before we could see it.
  active();
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
  KJ_REQUIRE(isConfirmed() && port != nullptr && ownBell == nullptr,
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
  // Messages come with pauses, so now and then the peer will have to be woken for an answer. At
  // once, so that a connection does not go on to need descriptors at any later time.
  if (taken && bellSocketState == UNTRIED) offerBellSocket();
}

void SharedMemoryConnection::decline(kj::StringPtr reason) {
  auto message = kj::heap<ControlMessage>();
  message->get().setDeclined(reason);
  writeControl(kj::mv(message));
  // The peer may be reading what we have published already.
  awaitsTaken = outgoingShared;
  stayPlain(reason);
}

}  // namespace capnpshm
