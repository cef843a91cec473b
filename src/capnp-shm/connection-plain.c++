// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include "compat.h"
#include "fault-point.h"
#include <errno.h>
#include <poll.h>
#include <capnp/serialize.h>
#include <kj/debug.h>

// Plain frames of a SharedMemoryConnection, in both directions: what comes before the switch, and
// everything if there is none.

namespace capnpshm {

using capnp::word;

namespace {

constexpr size_t MAX_PLAIN_CONTROL_WORDS = 1024;
// As a plain frame: there it may be a refusal with its reason, or an offer that comes back.

constexpr size_t PLAIN_AHEAD_WORDS = 512;
// What a client has to say at first, several times.

constexpr uint MAX_PLAIN_SEGMENTS = 511;
// As of capnp::readMessage().

struct FrameSize {
  size_t payloadWords;
  size_t wireBytes;
};

FrameSize measure(capnp::MessageReader& message) {
  // How large a message that came as a plain frame is, without and with the frame's header. (The
  // library's own sizeInWords() counts the first segment twice in 0.9.2.)
  uint segments = 0;
  size_t words = 0;
  for (;;) {
    auto segment = message.getSegment(segments);
    if (segment.begin() == nullptr) break;
    words += segment.size();
    ++segments;
  }
  return { words, (segments / 2 + 1 + words) * sizeof(word) };
}

class PlainIncomingMessage final: public capnp::IncomingRpcMessage {
  // A message that came as a plain frame.

public:
  PlainIncomingMessage(kj::Own<capnp::MessageReader> reader, size_t words,
                       kj::Array<kj::AutoCloseFd> fds, size_t fdCount)
      : reader(kj::mv(reader)), words(words), fds(kj::mv(fds)), fdCount(fdCount) {}

  capnp::AnyPointer::Reader getBody() override { return reader->getRoot<capnp::AnyPointer>(); }
  kj::ArrayPtr<kj::AutoCloseFd> getAttachedFds() override { return fds.slice(0, fdCount); }
  size_t sizeInWords() override { return words; }

private:
  kj::Own<capnp::MessageReader> reader;
  size_t words;
  kj::Array<kj::AutoCloseFd> fds;
  size_t fdCount;
};

}  // namespace

// =======================================================================================
// Receiving

kj::Promise<SharedMemoryConnection::MaybeMessage> SharedMemoryConnection::receivePlain() {
  if (ended) return MaybeMessage(nullptr);
  readingPlain = true;
  if (getTurnEnd().mustYield()) {
    // Or a peer that sends all the time would not even get our answer to its offer.
    return getTurnEnd().yieldToPort().then([this]() -> kj::Promise<MaybeMessage> {
      readingPlain = false;
      KJ_IF_MAYBE(exception, failure) return kj::cp(*exception);
      return receivePlain();
    });
  }
  return readCanceler.wrap(readPlain()).then(
      [this](kj::Maybe<PlainMessage>&& message) -> kj::Promise<MaybeMessage> {
    readingPlain = false;
    KJ_IF_MAYBE(m, message) {
      auto size = measure(*m->reader);
      getTurnEnd().count(size.wireBytes);
      getTurnEnd().usedSocket();
      incomingStats.socketBytes += size.wireBytes;
      // Also if it is decided: what the peer sent before it knew may still be under way.
      // Not into long ones: what is read here counts against the application's traversal limit.
      bool mine = false;
      KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
        kj::Maybe<capnp::AnyPointer::Reader> body;
        if (size.payloadWords <= MAX_PLAIN_CONTROL_WORDS) {
          body = m->reader->getRoot<capnp::AnyPointer>();
        }
        mine = handlePlainBody(body, m->fds);
        if (!mine) switchAfterReceiving(m->reader->getSegment(0), size.payloadWords);
      })) {
        fail(kj::mv(*exception));
      }
      KJ_IF_MAYBE(exception, failure) return kj::cp(*exception);
      if (mine) {
        // Cap'n Proto 1.x reads the next message only once the previous one is gone.
        message = nullptr;
        if (isSharing()) return receiveShared();
        return receivePlain();
      }
      countReturn(m->reader->getSegment(0));
      ++incomingStats.messages;
      incomingStats.bytes += size.payloadWords * sizeof(word);
      ++incomingStats.socketMessages;
      incomingStats.socketMessageBytes += size.wireBytes;
      // Never more than the application allows, closed before it sees the message.
      for (size_t i = maxFdsPerMessage; i < m->fds.size(); i++) m->fds[i] = nullptr;
      size_t fdCount = kj::min(m->fds.size(), size_t(maxFdsPerMessage));
      return MaybeMessage(kj::Own<capnp::IncomingRpcMessage>(kj::heap<PlainIncomingMessage>(
          kj::mv(m->reader), size.payloadWords, kj::mv(m->fds), fdCount)));
    }
    return plainEnded(nullptr);
  }, [this](kj::Exception&& exception) -> kj::Promise<MaybeMessage> {
    readingPlain = false;
    if (exception.getType() != kj::Exception::Type::DISCONNECTED) return kj::mv(exception);
    return plainEnded(kj::mv(exception));
  });
}

kj::Promise<kj::Maybe<SharedMemoryConnection::PlainMessage>> SharedMemoryConnection::readPlain() {
  bool decided = plainReason != nullptr;
  if (decided && plainStream == nullptr) plainStream = compat::newMessageStream(stream);
  if (decided && frames.isEmpty()) {
    auto fdSpace = kj::heapArray<kj::AutoCloseFd>(maxFdsPerMessage);
    // KJ may also throw here and now; see FrameReader.
    auto promise = kj::evalNow([&]() {
      return KJ_ASSERT_NONNULL(plainStream)->tryReadMessage(fdSpace, receiveOptions);
    });
    return promise.then([fdSpace = kj::mv(fdSpace)](kj::Maybe<capnp::MessageReaderAndFds>&& message)
        mutable -> kj::Maybe<PlainMessage> {
      KJ_IF_MAYBE(m, message) {
        size_t count = m->fds.size();
        return PlainMessage { kj::mv(m->reader), moveFirst(fdSpace, count) };
      }
      return nullptr;
    });
  }

  FrameReader::Limits limits;
  limits.segments = MAX_PLAIN_SEGMENTS;
  limits.words = receiveOptions.traversalLimitInWords;
  limits.aheadWords = decided || readsExactly() ? 1 : PLAIN_AHEAD_WORDS;
  // Room for the fd of a region even if RPC messages may have none.
  limits.fds = kj::max(maxFdsPerMessage, 1u);
  return frames.next(limits).then([this](kj::Maybe<FrameReader::Frame>&& frame)
      -> kj::Maybe<PlainMessage> {
    KJ_IF_MAYBE(f, frame) {
      if (f->words.size() == 0) {
        uint64_t segments = uint64_t(uint32_t(f->header)) + 1;
        KJ_REQUIRE(segments <= MAX_PLAIN_SEGMENTS,
            "peer sent a message of too many segments", segments);
        KJ_FAIL_REQUIRE("peer sent a message that is too large; to allow larger ones, see "
            "capnp::ReaderOptions::traversalLimitInWords", receiveOptions.traversalLimitInWords);
      }
      auto reader = kj::heap<capnp::FlatArrayMessageReader>(f->words, receiveOptions);
      return PlainMessage { reader.attach(kj::mv(f->words)), kj::mv(f->fds) };
    }
    return nullptr;
  });
}

kj::Promise<SharedMemoryConnection::MaybeMessage> SharedMemoryConnection::plainEnded(
    kj::Maybe<kj::Exception> reason) {
  plainEndSeen = true;
  KJ_IF_MAYBE(exception, failure) return kj::cp(*exception);
  // The peer can say no more that it has mapped our region.
  if (outgoingShared) stayPlain("the peer ended its messages before it could switch");
  KJ_IF_MAYBE(exception, reason) return kj::mv(*exception);
  return MaybeMessage(nullptr);
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

// =======================================================================================
// Sending

size_t SharedMemoryConnection::frameBytes(
    kj::ArrayPtr<const kj::ArrayPtr<const word>> segments) {
  return capnp::computeSerializedSizeInWords(segments) * sizeof(word);
}

bool SharedMemoryConnection::isHungUp() {
  // Whether the peer has closed its end; not if it has only shut it down for writing.
  pollfd request { socket, 0, 0 };
  int n;
  faultPoint();
  do {
    n = ::poll(&request, 1, 0);
  } while (n < 0 && errno == EINTR);
  faultPoint();
  return n > 0 && (request.revents & POLLHUP) != 0;
}

void SharedMemoryConnection::sendPlain(
    OutgoingMessage& message, kj::Array<kj::AutoCloseFd> fds, size_t bytes) {
  // To a peer that has closed its end, say of what the end of its messages cut off: an exception
  // for each connection, of which nobody would hear.
  if (plainEndSeen && isHungUp()) return;

  ++queueCount;
  queueSize += bytes;
  addPlain(PlainFrame { kj::atomicAddRef(message), {}, kj::mv(fds), bytes, clock.now() });
}

void SharedMemoryConnection::addPlain(PlainFrame&& frame) {
  getTurnEnd().usedSocket();
  // Frames of one turn of the event loop leave with one write, which wakes the peer once.
  bool alone = frame.fds.size() > 0;
  if (alone) openBatch = nullptr;
  KJ_IF_MAYBE(b, openBatch) {
    (*b)->frames.add(kj::mv(frame));
    return;
  }
  auto batch = kj::refcounted<PlainBatch>();
  batch->frames.add(kj::mv(frame));
  if (!alone) openBatch = kj::addRef(*batch);
  auto done = kj::defer([this, &b = *batch]() {
    for (auto& frame: b.frames) {
      if (frame.message.get() == nullptr) continue;
      queueSize -= frame.bytes;
      --queueCount;
    }
  });
  // eagerlyEvaluate() after attach(), so that the messages are released as soon as they are
  // written.
  previousWrite = enqueueWrite([this, &b = *batch]() {
    return kj::evalLast([this, &b]() { return writeBatch(b); });
  }, true).attach(kj::mv(done)).attach(kj::mv(batch)).eagerlyEvaluate(nullptr);
}

kj::Promise<void> SharedMemoryConnection::writeBatch(PlainBatch& batch) {
  KJ_IF_MAYBE(b, openBatch) {
    if (b->get() == &batch) openBatch = nullptr;
  }
  currentOutgoingMessageSendTime = batch.frames[0].sendTime;
  auto messages = KJ_MAP(frame, batch.frames) -> kj::ArrayPtr<const kj::ArrayPtr<const word>> {
    if (frame.message.get() == nullptr) {
      auto segments = frame.control->getMessage().getSegmentsForOutput();
      outgoingStats.socketBytes += frameBytes(segments);
      return segments;
    }
    auto segments = frame.message->getSegments();
    countPlain(frameBytes(segments));
    return segments;
  };
  auto numbers = KJ_MAP(fd, batch.frames[0].fds) { return fd.get(); };
  auto promise = kj::evalNow([&]() {
    if (numbers.size() > 0) {
      KJ_IF_MAYBE(s, plainStream) return (*s)->writeMessage(numbers, messages[0]);
      return capnp::writeMessage(stream, numbers, messages[0]);
    }
    KJ_IF_MAYBE(s, plainStream) return (*s)->writeMessages(messages);
    return capnp::writeMessages(stream, messages);
  });
  return promise.attach(kj::mv(messages), kj::mv(numbers));
}

void SharedMemoryConnection::countPlain(size_t wireBytes) {
  ++outgoingStats.socketMessages;
  outgoingStats.socketMessageBytes += wireBytes;
  outgoingStats.socketBytes += wireBytes;
  if (switchWritten && plainReason == nullptr) {
    outgoingStats.socketMessageBytesAfterSwitch += wireBytes;
  }
}

// =======================================================================================
// For good

void SharedMemoryConnection::stayPlain(kj::StringPtr reason) {
  if (plainReason != nullptr) return;
  plainReason = kj::str(reason);
  outgoingStats.transport = Transport::PLAIN;
  incomingStats.transport = Transport::PLAIN;
  switchPutOff = false;
  outgoingShared = false;
  peerBell = nullptr;
  sleepWord = nullptr;
  peerSleepWord = nullptr;
  KJ_IF_MAYBE(o, outbox) (*o)->stop();
  KJ_IF_MAYBE(i, inbox) (*i)->close();
  active();  // What was looked at for us is going.
  inbox = nullptr;
  outbox = nullptr;
  if (options.requireSharedMemory) {
    fail(KJ_EXCEPTION(FAILED, "shared memory is required, but cannot be used", reason));
    return;
  }
  if (!awaitsTaken) sendAgain(0);
}

void SharedMemoryConnection::sendAgain(size_t taken) {
  // As plain frames, all but the first `taken` of what we have published, and what waits.
  awaitsTaken = false;
  for (; taken > 0; taken--) unconfirmed.pop_front();
  for (auto list: { &unconfirmed, &waiting }) {
    while (!list->empty()) {
      auto& front = list->front();
      if (list == &waiting) {
        --queueCount;
        queueSize -= front.bytes;
      }
      if (previousWrite != nullptr) sendPlain(*front.message, kj::mv(front.fds), front.bytes);
      list->pop_front();
    }
  }
  KJ_IF_MAYBE(fulfiller, drainedFulfiller) (*fulfiller)->fulfill();
}

}  // namespace capnpshm
