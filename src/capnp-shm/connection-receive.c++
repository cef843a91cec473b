// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include <capnp/serialize.h>
#include <kj/debug.h>

// The receiving half of a SharedMemoryConnection: messages from shared memory, the control socket
// and bells. Sending is in connection-send.c++, plain frames are in connection-plain.c++.

namespace capnpshm {

using capnp::word;

namespace {

constexpr size_t MAX_CONTROL_WORDS = 64;

}  // namespace

class SharedMemoryConnection::Receiver {
  // The adapter of the promise for the next message. Only one exists at a time.

public:
  Receiver(kj::PromiseFulfiller<MaybeMessage>& fulfiller, SharedMemoryConnection& connection)
      : fulfiller(fulfiller), connection(connection) {
    connection.receiver = *this;
    connection.active();
  }
  ~Receiver() noexcept(false) { leave(); }
  KJ_DISALLOW_COPY(Receiver);

  void fulfill(MaybeMessage&& message) {
    leave();
    fulfiller.fulfill(kj::mv(message));
  }
  void reject(kj::Exception&& exception) {
    leave();
    fulfiller.reject(kj::mv(exception));
  }

private:
  kj::PromiseFulfiller<MaybeMessage>& fulfiller;
  SharedMemoryConnection& connection;
  bool listed = true;

  void leave() {
    if (listed) connection.receiver = nullptr;
    listed = false;
  }
};

kj::Promise<SharedMemoryConnection::MaybeMessage>
SharedMemoryConnection::receiveIncomingMessage() {
  KJ_IF_MAYBE(exception, failure) return kj::cp(*exception);
  if (owner.isForked()) {
    return KJ_EXCEPTION(DISCONNECTED, "the connection belongs to the parent process");
  }
  if (isSharing()) return receiveNext();
  return kj::evalLater([this]() -> kj::Promise<MaybeMessage> {
    KJ_IF_MAYBE(exception, failure) return kj::cp(*exception);
    return receiveNext();
  });
}

kj::Promise<SharedMemoryConnection::MaybeMessage> SharedMemoryConnection::receiveNext() {
  KJ_IF_MAYBE(promise, readAhead) {
    auto result = kj::mv(*promise);
    readAhead = nullptr;
    return kj::mv(result);
  }
  if (isSharing()) return receiveShared();
  return receivePlain();
}

kj::Promise<SharedMemoryConnection::MaybeMessage> SharedMemoryConnection::receiveShared() {
  if (!isSharing()) return receivePlain();  // The peer has declined meanwhile.
  wake();
  // If enough was done in this turn, the next message waits for the next one. (What is left once
  // the peer has ended is bounded, and nothing will come to wait for.)
  if (getTurnEnd().isLong() && !ended) return kj::newAdaptedPromise<MaybeMessage, Receiver>(*this);

  MaybeMessage message;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { message = takeOne(); })) {
    fail(kj::cp(*exception));
    return kj::mv(*exception);
  }
  if (message != nullptr) return kj::mv(message);
  if (ended) {
    KJ_IF_MAYBE(exception, endOfDelivery()) return kj::mv(*exception);
    return MaybeMessage(nullptr);
  }
  return kj::newAdaptedPromise<MaybeMessage, Receiver>(*this);
}

kj::Maybe<kj::Exception> SharedMemoryConnection::endOfDelivery() {
  // How the stream of messages ended, once everything that the peer had published was delivered.
  KJ_IF_MAYBE(reason, endReason) return kj::cp(*reason);
  if (KJ_ASSERT_NONNULL(inbox)->isIncomplete()) {
    return KJ_EXCEPTION(DISCONNECTED, "peer disconnected within a message");
  }
  return nullptr;
}

SharedMemoryConnection::MaybeMessage SharedMemoryConnection::takeOne() {
  auto& i = *KJ_ASSERT_NONNULL(inbox);
  active();  // First, since what is looked at for us may not be there any more afterwards.
  uint64_t copied = i.getCopiedBytes();
  kj::ArrayPtr<SealedFile> sealed;
  if (!fdRecords.empty()) sealed = fdRecords.front().sealed;
  KJ_IF_MAYBE(m, i.tryTake(!fdRecords.empty(), sealed)) {
    auto& message = **m;
    if (message.getFdCount() > 0) {
      fdRecordsCost -= fdRecords.front().cost();
      message.attachFds(kj::mv(fdRecords.front().fds));
      fdRecords.pop_front();
    }
    countReturn(message.getFirstSegment());
    size_t bytes = message.sizeInWords() * sizeof(word);
    ++incomingStats.messages;
    incomingStats.bytes += bytes;
    ++sharedMessagesTaken;
    sharedBytesTaken += bytes;
    getTurnEnd().count(bytes);
    if (i.publishConsumed(false)) servedInterests |= WANT_ROOM;
    return kj::Own<capnp::IncomingRpcMessage>(kj::mv(*m));
  }
  if (i.getCopiedBytes() != copied) {
    // Parts of a message are work too, and for the next ones room must be made.
    getTurnEnd().count(i.getCopiedBytes() - copied);
    if (i.publishConsumed(false)) servedInterests |= WANT_ROOM;
  }
  return nullptr;
}

void SharedMemoryConnection::countReturn(kj::ArrayPtr<const word> firstSegment) {
  if (unansweredCalls > 0 && kindOf(firstSegment) == capnp::rpc::Message::RETURN) {
    --unansweredCalls;
  }
}

void SharedMemoryConnection::deliver() {
  // Hands the next message, or the end, to whoever waits for it.
  KJ_IF_MAYBE(r, receiver) {
    KJ_IF_MAYBE(exception, failure) {
      r->reject(kj::cp(*exception));
      return;
    }
    if (!isSharing()) return;
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      auto message = takeOne();
      if (message != nullptr) {
        r->fulfill(kj::mv(message));
      } else if (ended) {
        KJ_IF_MAYBE(reason, endOfDelivery()) {
          r->reject(kj::mv(*reason));
        } else {
          r->fulfill(nullptr);
        }
      }
    })) {
      fail(kj::mv(*exception));
    }
  }
}

kj::Promise<void> SharedMemoryConnection::deliverPlain() {
  // The peer has declined: what it sends comes as plain frames again, also to whoever waits
  // already.
  if (receiver == nullptr) return kj::READY_NOW;
  return receivePlain().then([this](MaybeMessage&& message) {
    KJ_IF_MAYBE(r, receiver) r->fulfill(kj::mv(message));
  }, [this](kj::Exception&& exception) {
    KJ_IF_MAYBE(r, receiver) r->reject(kj::mv(exception));
  });
}

kj::Promise<void> SharedMemoryConnection::readControl() {
  bool bellExpected = isMutualTrust() && gotMapped && !gotBell;
  FrameReader::Limits limits;
  limits.segments = 1;
  limits.words = MAX_CONTROL_WORDS;
  limits.aheadWords = readsExactly() ? 1 : 1 + MAX_CONTROL_WORDS;
  limits.fds = kj::max(maxFdsPerMessage, 1u) +
      (acceptedSealedBytes() > 0 ? MAX_SEALED_SEGMENTS : 0);
  limits.fdAsStream = bellExpected && port == nullptr;

  return frames.next(limits).then([this, bellExpected](kj::Maybe<FrameReader::Frame>&& frame) {
    KJ_IF_MAYBE(f, frame) {
      wake();
      getTurnEnd().count(0);
      handleFrame(*f, bellExpected);
      return true;
    }
    controlEnded(nullptr);
    return false;
  }).then([this](bool more) -> kj::Promise<void> {
    if (!more || failure != nullptr) return kj::READY_NOW;
    if (!isSharing()) return deliverPlain();
    // As long as there is something to read, the port does not run by itself.
    if (getTurnEnd().mustYield()) {
      return getTurnEnd().yieldToPort().then([this]() -> kj::Promise<void> {
        if (failure != nullptr) return kj::READY_NOW;
        return readControl();
      });
    }
    return readControl();
  }, [this](kj::Exception&& exception) -> kj::Promise<void> {
    if (exception.getType() == kj::Exception::Type::DISCONNECTED) {
      controlEnded(kj::mv(exception));
      return kj::READY_NOW;
    }
    return kj::mv(exception);
  });
}

void SharedMemoryConnection::handleFrame(FrameReader::Frame& frame, bool bellExpected) {
  // From the control socket.
  size_t bytes = kj::max(frame.words.asBytes().size(), sizeof(frame.header));
  incomingStats.socketBytes += bytes;
  if (frame.header == BELL && !bellExpected) {
    admitBell();
    bellRang();
    return;
  }
  if (frame.words.size() <= 1) {
    // Perhaps the beginning of a plain message; what follows is not read.
    incomingStats.socketMessageBytes += bytes;
    incomingStats.socketMessageBytesAfterSwitch += bytes;
    KJ_FAIL_REQUIRE("peer sent something that is not a control message", frame.header);
  }

  auto segment = frame.words.slice(1, frame.words.size()).asConst();
  capnp::SegmentArrayMessageReader reader(kj::arrayPtr(&segment, 1));
  KJ_IF_MAYBE(control, asControl(reader.getRoot<capnp::AnyPointer>())) {
    KJ_REQUIRE(control->isBell() == bellExpected &&
        (gotMapped || control->isMapped() || control->isDeclined()),
        "peer sent control messages in an impossible order", uint(control->which()));
    if (bellExpected) {
      handleEventBell(frame);
    } else {
      handleControl(*control, frame.fds);
    }
  } else {
    ++incomingStats.socketMessages;
    incomingStats.socketMessageBytes += bytes;
    incomingStats.socketMessageBytesAfterSwitch += bytes;
    KJ_FAIL_REQUIRE("peer sent a plain message after it had switched to shared memory");
  }
  deliver();
  active();
}

void SharedMemoryConnection::handleEventBell(FrameReader::Frame& frame) {
  gotBell = true;
  if (port == nullptr ? frame.fdStream.get() == nullptr : frame.fds.size() == 0) {
    // Perhaps there was one, and this process had no descriptor to spare.
    auto message = kj::heap<ControlMessage>();
    message->get().setBellSocketTaken(false);
    writeControl(kj::mv(message));
    return;
  }
  ownBell = port == nullptr ? EventBellListener::newListener(kj::mv(frame.fdStream))
                            : EventBellListener::newListener(*port, kj::mv(frame.fds[0]));
  bellTask = listenToBell().eagerlyEvaluate([this](kj::Exception&& exception) {
    fail(kj::mv(exception));
  });
}

// What comes on the control socket is bounded by what it belongs to: answers by our announcements,
// `fds` by PeerLimits::fdsAhead, and the rest may come once, except for these two.

void SharedMemoryConnection::admitBell() {
  // An honest peer rings at most once for each epoch of our sleep word in which we ask for
  // something, and each of those is one of `sleeps`.
  ++bellsTaken;
  KJ_REQUIRE(bellsTaken <= sleeps + options.peerLimits.controlMessages,
      "peer sent too many bells; see PeerLimits::controlMessages", bellsTaken, sleeps);
}

void SharedMemoryConnection::admitRegion() {
  // An honest peer announces a region only if something is to lie there, and each is as large as
  // all that it has, up to its limit, so that their number is a logarithm; except for those which
  // take the place of retired ones. Before it retires one it has published thousands of messages,
  // and we have taken those, but for what its ring holds. (Not for each sleep: the announcement
  // itself may have ended that.)
  ++regionsTaken;
  KJ_REQUIRE(regionsTaken <= sharedMessagesTaken + options.peerLimits.controlMessages,
      "peer announced too many regions; see PeerLimits::controlMessages",
      regionsTaken, sharedMessagesTaken);
}

void SharedMemoryConnection::bellRang() {
  wake();
  publishWaiting();
  deliver();
  active();
}

kj::Promise<void> SharedMemoryConnection::listenToBell() {
  return KJ_ASSERT_NONNULL(ownBell)->wait().then([this]() {
    // First wait again, then look: a ring in between would be lost.
    auto next = listenToBell();
    if (failure == nullptr) bellRang();
    return next;
  });
}

kj::Promise<void> SharedMemoryConnection::listenToForeignThreads() {
  return foreignWake->next().then([this]() {
    auto next = listenToForeignThreads();
    active();
    return next;
  });
}

void SharedMemoryConnection::controlEnded(kj::Maybe<kj::Exception> reason) {
  controlEndSeen = true;
  if (ended) return;  // The peer had said so.
  ended = true;
  endReason = kj::mv(reason);
  wake();
  deliver();
}

}  // namespace capnpshm
