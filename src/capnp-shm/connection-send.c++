// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include "fault-point.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <capnp/serialize.h>
#include <kj/debug.h>

// The sending half of a SharedMemoryConnection: publishing, the chain of writes, bells, shutdown.
// Receiving is in connection-receive.c++, plain frames are in connection-plain.c++.

namespace capnpshm {

using capnp::word;

namespace {

constexpr uint MAX_UNRUNG_MESSAGES = 32;

constexpr uint MAX_FDS_PER_WRITE = 253;
// Linux passes no more at once (SCM_MAX_FD).

kj::Exception peerGone() {
  return KJ_EXCEPTION(DISCONNECTED, "peer disconnected before all messages were delivered");
}

kj::Array<kj::AutoCloseFd> duplicate(kj::ArrayPtr<const int> fds) {
  // The capabilities that own the fds may be gone before these are written.
  if (fds.size() == 0) return nullptr;  // Saves an allocation of no bytes.
  return KJ_MAP(fd, fds) -> kj::AutoCloseFd {
    int copy;
    faultPoint();
    KJ_SYSCALL(copy = fcntl(fd, F_DUPFD_CLOEXEC, 0), "cannot send a file descriptor", fd);
    faultPoint();
    return kj::AutoCloseFd(copy);
  };
}

}  // namespace

kj::Own<capnp::OutgoingRpcMessage> SharedMemoryConnection::newOutgoingMessage(
    uint firstSegmentWordSize) {
  MessageSender& sender = *this;
  if (owner.isCurrent() && switchPutOff && !mayStayPlain(firstSegmentWordSize)) {
    // Or it would have to be copied.
    beginSwitch();
  }
  if (owner.isCurrent() && outgoingShared) {
    return kj::atomicRefcounted<OutgoingMessage>(
        kj::atomicAddRef(*KJ_ASSERT_NONNULL(outbox)), sender, firstSegmentWordSize);
  } else {
    return kj::atomicRefcounted<OutgoingMessage>(sender, firstSegmentWordSize);
  }
}

void SharedMemoryConnection::sendMessage(OutgoingMessage& message) {
  if (owner.isForked()) return;
  KJ_REQUIRE(owner.isCurrent(), "messages must be sent on the thread of the event loop");

  auto segments = message.getSegments();
  auto kind = kindOf(segments.size() == 0 ? nullptr : segments[0]);
  size_t size = 0;
  for (auto& segment: segments) size += segment.size();
  KJ_REQUIRE(size < receiveOptions.traversalLimitInWords, size,
      "Trying to send Cap'n Proto message larger than our single-message size limit. The "
      "other side probably won't accept it (assuming its traversalLimitInWords matches "
      "ours) and would abort the connection, so I won't send it.") {
    return;
  }
  KJ_REQUIRE(previousWrite != nullptr && !shuttingDown, "already shut down");
  if (failure != nullptr) return;
  if (maxFdsPerMessage == 0) message.setFds(nullptr);

  auto fds = duplicate(message.getFds());
  size_t bytes = size * sizeof(word);
  if (getCurrentQueueCount() == 0) currentOutgoingMessageSendTime = clock.now();
  ++outgoingStats.messages;
  outgoingStats.bytes += bytes;
  countCall(kind);

  if (switchPutOff) switchBeforeSending(kind, size);
  if (failure != nullptr) return;
  if (!outgoingShared && !awaitsTaken) {
    sendPlain(message, kj::mv(fds), bytes);
    if (awaitsSocket()) active();
    return;
  }

  active();
  bool sealable = message.getSealed().countSealable() > 0;
  // An Abort waits for the end of the turn. It is of use only if the connection outlives that, as
  // after an error; else the end of the stream tells the peer as much, and spares it the exception
  // as which Cap'n Proto throws an Abort. (TwoPartyVatNetwork drops it likewise.)
  bool isAbort = kind == capnp::rpc::Message::ABORT;
  if (isAbort && peerWantsNothing()) return;
  if (outgoingShared && waiting.empty() && fds.size() == 0 && !sealable && !isAbort) {
    if (publishAtOnce(message, bytes) || failure != nullptr) return;
  }

  auto fdState = fds.size() > 0 || sealable ? WaitingMessage::UNSENT : WaitingMessage::NONE;
  ++heapWaits;
  ++queueCount;
  queueSize += bytes;
  waiting.push_back(
      WaitingMessage { kj::atomicAddRef(message), kj::mv(fds), fdState, bytes });
  if (isAbort) return;
  // Whatever the peer wrote that cannot be is no fault of this message.
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() { publishWaiting(); })) {
    fail(kj::mv(*exception));
  }
}

bool SharedMemoryConnection::publishAtOnce(OutgoingMessage& message, size_t bytes) {
  // False if it must wait, or the connection is broken.
  announceRegions();
  auto& o = *KJ_ASSERT_NONNULL(outbox);
  uint64_t before = o.getPosition();
  bool published = false;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    published = o.tryPublish(message, 0);
  })) {
    fail(kj::mv(*exception));
    return false;
  }
  if (o.getPosition() != before) servedInterests |= WANT_DATA;  // Perhaps only a part.
  if (published) {
    keepUnconfirmed(message, bytes);
    getTurnEnd().moved(bytes);
    ++unflushedCount;
    unflushedSize += bytes;
    if (unflushedCount % MAX_UNRUNG_MESSAGES == 0) ringPeer();
  } else {
    announceRegions();
  }
  return published;
}

void SharedMemoryConnection::keepUnconfirmed(OutgoingMessage& message, size_t bytes) {
  // After `message` was published.
  if (isConfirmed()) return;
  if (KJ_ASSERT_NONNULL(outbox)->getConsumed() > FIRST_RING_LINES) {
    // Who takes messages has mapped our region, though we have not read yet that it says so.
    unconfirmed.clear();
  } else {
    unconfirmed.push_back(
        WaitingMessage { kj::atomicAddRef(message), nullptr, WaitingMessage::NONE, bytes });
  }
}

void SharedMemoryConnection::countCall(capnp::rpc::Message::Which kind) {
  // Of a message to be sent.
  if (kind == capnp::rpc::Message::CALL) {
    ++callsSent;
    ++unansweredCalls;
  } else if (kind == capnp::rpc::Message::BOOTSTRAP) {
    ++unansweredCalls;
  }
}

kj::Promise<void> SharedMemoryConnection::enqueueWrite(
    kj::Function<kj::Promise<void>()> write, bool rpcMessage) {
  ++pendingWrites;
  return KJ_ASSERT_NONNULL(previousWrite, "already shut down")
      .then([write = kj::mv(write)]() mutable { return write(); })
      .then([this]() { --pendingWrites; },
          [this, rpcMessage](kj::Exception&& exception) {
    // Since no one checks write failures, they become read failures, or a caller would wait for
    // ever for a reply. In shared memory the read side learns it from the socket by itself, after
    // everything that the peer had published; so it does when only the setting up was disturbed,
    // because the peer left after its last words.
    writeFailed = true;
    bool peerLeft = exception.getType() == kj::Exception::Type::DISCONNECTED;
    if (!peerLeft || (rpcMessage && !isSharing())) fail(kj::cp(exception));
    kj::throwRecoverableException(kj::mv(exception));
  });
}

void SharedMemoryConnection::writeControl(kj::Own<ControlMessage> control,
    kj::Array<kj::AutoCloseFd> fds, kj::Maybe<int> borrowedFd) {
  if (owner.isForked()) return;
  if (previousWrite == nullptr) return;  // Shut down; nobody wants it any more.
  openBatch = nullptr;
  auto segments = control->getMessage().getSegmentsForOutput();
  outgoingStats.socketBytes += frameBytes(segments);
  auto builder = kj::heapArrayBuilder<int>(fds.size() + (borrowedFd == nullptr ? 0 : 1));
  for (auto& fd: fds) builder.add(fd.get());
  KJ_IF_MAYBE(fd, borrowedFd) builder.add(*fd);
  auto numbers = builder.finish();
  bool isSwitch = control->get().isSwitch();
  previousWrite = enqueueWrite([this, segments, isSwitch, numbers = numbers.asPtr()]() {
    if (isSwitch) switchWritten = true;
    return capnp::writeMessage(stream, numbers, segments);
  }).attach(kj::mv(control), kj::mv(numbers), kj::mv(fds)).eagerlyEvaluate(nullptr);
}

void SharedMemoryConnection::announceRegions() {
  if (!isConfirmed()) return;
  auto& o = *KJ_ASSERT_NONNULL(outbox);
  for (;;) {
    KJ_IF_MAYBE(announcement, o.takeAnnouncement()) {
      auto message = kj::heap<ControlMessage>();
      auto region = message->get().initRegion();
      region.setId(announcement->id);
      region.setBytes(announcement->bytes);
      auto fds = kj::heapArray<kj::AutoCloseFd>(1);
      fds[0] = kj::mv(announcement->fd);
      writeControl(kj::mv(message), kj::mv(fds));
    } else {
      return;
    }
  }
}

bool SharedMemoryConnection::sendFds(WaitingMessage& message) {
  // Sends what must go over the socket before the message is published. False if too much of that
  // is ahead of the peer.
  auto& sealed = message.message->getSealed();
  if (!fdsAhead.empty() &&
      totalFdsAhead + message.fds.size() + sealed.countSealable() > peersFdsAhead) {
    return false;
  }
  kj::Vector<SealedSegments::File> files;
  if (message.fds.size() + MAX_SEALED_SEGMENTS <= MAX_FDS_PER_WRITE) {
    files = sealed.seal(message.message->getSegments());
  }
  if (files.size() == 0 && message.fds.size() == 0) {
    // No segment could be sealed, or was worth it.
    message.fdState = WaitingMessage::NONE;
    return true;
  }

  auto control = kj::heap<ControlMessage>();
  auto fds = kj::heapArrayBuilder<kj::AutoCloseFd>(files.size() + message.fds.size());
  if (files.size() == 0) {
    control->get().setFds(message.fds.size());
  } else {
    auto builder = control->get().initSealed();
    builder.setFds(message.fds.size());
    auto bytes = builder.initBytes(files.size());
    for (uint i = 0; i < files.size(); i++) {
      bytes.set(i, files[i].bytes);
      fds.add(kj::mv(files[i].fd));
    }
  }
  for (auto& fd: message.fds) fds.add(kj::mv(fd));
  message.fds = nullptr;
  message.fdState = WaitingMessage::WRITING;
  writeControl(kj::mv(control), fds.finish());
  previousWrite = KJ_ASSERT_NONNULL(previousWrite).then([this]() {
    if (waiting.empty()) return;
    waiting.front().fdState = WaitingMessage::WRITTEN;
    active();
  }).eagerlyEvaluate(nullptr);
  return true;
}

void SharedMemoryConnection::publishWaiting() {
  if (awaitsTaken) return;
  auto& o = *KJ_ASSERT_NONNULL(outbox);
  o.reclaim();
  while (!fdsAhead.empty() && fdsAhead.front().position <= o.getConsumed()) {
    totalFdsAhead -= fdsAhead.front().fds;
    fdsAhead.pop_front();
  }

  while (!waiting.empty()) {
    auto& front = waiting.front();
    if (front.fdState == WaitingMessage::UNSENT && !(isConfirmed() && sendFds(front))) break;
    if (front.fdState == WaitingMessage::WRITING) break;

    uint sealedCount = front.message->getSealed().countSealed();
    uint fdCount = front.message->getFds().size() + sealedCount;
    uint64_t before = o.getPosition();
    bool published = o.tryPublish(*front.message, fdCount);
    announceRegions();
    if (o.getPosition() != before) servedInterests |= WANT_DATA;  // Perhaps only a part.
    if (!published) break;
    if (fdCount > 0) {
      fdsAhead.push_back({ o.getPosition(), fdCount });
      totalFdsAhead += fdCount;
    }
    getTurnEnd().count(front.bytes);
    --queueCount;
    queueSize -= front.bytes;
    ++unflushedCount;
    unflushedSize += front.bytes;
    keepUnconfirmed(*front.message, front.bytes);
    waiting.pop_front();
  }

  if (waiting.empty() && isConfirmed()) {
    KJ_IF_MAYBE(fulfiller, drainedFulfiller) (*fulfiller)->fulfill();
  }
}

void SharedMemoryConnection::ringPeer() {
  if (!isSharing()) return;  // Later; see startSharing().
  uint64_t served = servedInterests;
  servedInterests = 0;
  if (owner.isForked()) return;
  KJ_IF_MAYBE(p, peerSleepWord) {
    if (!p->mustRing(served)) {
      if (served & WANT_DATA) {
        ++bellsSaved;
        getTurnEnd().peerWasAwake(*this);
      }
      return;
    }
  } else {
    return;
  }
  ++bellsRung;
  KJ_IF_MAYBE(b, peerBell) {
    (*b)->ring();
    return;
  }
  if (bellSocketState == TAKEN && KJ_ASSERT_NONNULL(bellSocket)->ring()) return;
  if (pendingWrites > 0) {
    // Behind the frame that is being written.
    enqueueBell();
    return;
  }
  // A full socket buffer means that there are bells in it already. If the peer is gone, that is for
  // the read side to find.
  ssize_t n;
  faultPoint();
  do {
    n = ::send(socket, &BELL, sizeof(BELL), MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  int error = errno;
  faultPoint();
  if (n >= 0) outgoingStats.socketBytes += n;
  if (n >= 0 || error == EAGAIN || error == EPIPE || error == ECONNRESET) return;
  // The kernel has no memory for it, say. As a write it is either made or breaks the connection; or
  // the peer would sleep for ever.
  enqueueBell();
}

void SharedMemoryConnection::enqueueBell() {
  // Only one, or a peer that reads nothing could make us queue them without bounds.
  if (previousWrite == nullptr || writeFailed || bellQueued) return;
  openBatch = nullptr;
  bellQueued = true;
  previousWrite = enqueueWrite([this]() {
    bellQueued = false;
    outgoingStats.socketBytes += sizeof(BELL);
    return stream.write(&BELL, sizeof(BELL));
  }).eagerlyEvaluate(nullptr);
}

kj::Promise<void> SharedMemoryConnection::shutdown() {
  if (owner.isForked()) return kj::READY_NOW;
  KJ_REQUIRE(previousWrite != nullptr && !shuttingDown, "already shut down");
  if ((!outgoingShared && !awaitsTaken) || failure != nullptr) return endWriting();

  kj::Promise<void> drained = kj::READY_NOW;
  // The queue of control writes stays open while messages wait: they may need announcements.
  shuttingDown = true;
  if (!waiting.empty() || !isConfirmed()) {
    // KJ tells only of a disconnection that happens from now on.
    if (isHungUp()) {
      if (waiting.empty()) return kj::READY_NOW;
      return peerGone();
    }
    auto paf = kj::newPromiseAndFulfiller<void>();
    drained = kj::mv(paf.promise);
    drainedFulfiller = kj::mv(paf.fulfiller);
  }
  return drained.then([this]() -> kj::Promise<void> {
    if (!isConfirmed()) return endWriting();  // It became a plain stream.
    // Nobody wants to read it, mostly because it is the peer that has ended the connection. Two
    // exceptions would come of trying, and cost more than all the rest of a connection's end.
    if (peerWantsNothing()) return kj::READY_NOW;
    // The peer may have messages waiting for room in shared memory, so the socket must stay open
    // for our bells until nobody wants those messages.
    auto message = kj::heap<ControlMessage>();
    message->get().setEnd();
    writeControl(kj::mv(message));
    return whenWritten();
  }).exclusiveJoin(stream.whenWriteDisconnected().then([]() -> kj::Promise<void> {
    return peerGone();
  }));
}

void SharedMemoryConnection::dropped() {
  if (shuttingDown && !owner.isForked()) endTask = endWriting();
}

kj::Promise<void> SharedMemoryConnection::whenWritten() {
  // Resolves when everything that is queued now was written.
  if (previousWrite == nullptr) return kj::READY_NOW;
  auto forked = KJ_ASSERT_NONNULL(previousWrite).fork();
  previousWrite = forked.addBranch();
  return forked.addBranch();
}

kj::Promise<void> SharedMemoryConnection::endWriting() {
  // Ends the stream behind what is queued, as long as the result lives; nothing can be queued any
  // more.
  if (previousWrite == nullptr) return kj::READY_NOW;
  kj::Promise<void> result = KJ_ASSERT_NONNULL(previousWrite).then([this]() {
    writeEnded = true;
    stream.shutdownWrite();
  }).eagerlyEvaluate(nullptr);
  previousWrite = nullptr;
  return result;
}

}  // namespace capnpshm
