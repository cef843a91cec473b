// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "connection.h"

#include <sched.h>
#include <sys/socket.h>
#include <kj/debug.h>

// What the halves of a SharedMemoryConnection have in common: its beginning and end, failure, the
// end of a turn, figures.

namespace capnpshm {

namespace {

constexpr uint64_t BELLS_BEFORE_SOCKET = 8;
// A connection that is used now and then needs no further descriptors, and one of a few calls would
// pay as much for the socket as for all of its bells.

uint64_t currentCpu() {
  // As RegionHeader::cpu has it. Nanoseconds, without a system call.
  return sched_getcpu() + 1;
}

}  // namespace

class SharedMemoryConnection::WindowState final
    : public kj::Refcounted, public capnp::RpcFlowController::WindowGetter {
  // The stream window; owned by the connection and by its flow controllers, which may outlive it.

public:
  explicit WindowState(SharedMemoryConnection& connection): connection(connection) {}
  void disconnect() { connection = nullptr; }

  size_t getWindow() override {
    KJ_IF_MAYBE(c, connection) {
      if (c->outgoingShared) {
        if (c->options.streamWindowBytes > 0) return c->options.streamWindowBytes;
        return kj::min(size_t(256) << 10, c->options.maxBytes / 4);
      }
      int size = 0;
      uint length = sizeof(size);
      if (kj::runCatchingExceptions([&]() {
            c->stream.getsockopt(SOL_SOCKET, SO_SNDBUF, &size, &length);
          }) == nullptr) {
        return size;
      }
    }
    return capnp::RpcFlowController::DEFAULT_WINDOW_SIZE;
  }

private:
  kj::Maybe<SharedMemoryConnection&> connection;
};

SharedMemoryConnection::SharedMemoryConnection(
    const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream, uint maxFdsPerMessage,
    capnp::rpc::twoparty::Side side, capnp::ReaderOptions receiveOptions,
    const kj::MonotonicClock& clock)
    : Member(TurnEnd::forThisLoop(), uint64_t(context.options.spinMicroseconds) * 1000),
      options(context.options),
      port(context.port),
      stream(stream),
      socket(KJ_ASSERT_NONNULL(stream.getFd())),
      maxFdsPerMessage(maxFdsPerMessage),
      receiveOptions(receiveOptions),
      clock(clock),
      peerVatId(4),
      foreignWake(kj::atomicRefcounted<ForeignWake>()),
      previousWrite(kj::READY_NOW),
      frames(stream),
      currentOutgoingMessageSendTime(clock.now()),
      window(kj::refcounted<WindowState>(*this)),
      controlTask(kj::READY_NOW),
      bellTask(kj::READY_NOW),
      foreignTask(kj::READY_NOW),
      endTask(kj::READY_NOW) {
  if (port != nullptr) getTurnEnd().usePort(*port);
  peerVatId.initRoot<capnp::rpc::twoparty::VatId>().setSide(
      side == capnp::rpc::twoparty::Side::CLIENT ? capnp::rpc::twoparty::Side::SERVER
                                                 : capnp::rpc::twoparty::Side::CLIENT);
}

SharedMemoryConnection::~SharedMemoryConnection() noexcept(false) {
  window->disconnect();
  foreignTask = kj::READY_NOW;
  foreignWake->close();
  KJ_IF_MAYBE(i, inbox) (*i)->close();
  KJ_IF_MAYBE(o, outbox) (*o)->stop();
  // What was published this turn must not wait for a bell that never comes; EOF will wake the
  // peer, but only if nobody else holds the socket.
  if (servedInterests != 0) ringPeer();
  if (shuttingDown && !writeEnded && !owner.isForked()) {
    // If the peer is gone already it needs no end of the stream.
    kj::runCatchingExceptions([this]() { stream.shutdownWrite(); });
  }
}

void SharedMemoryConnection::fail(kj::Exception&& exception) {
  // Breaks the connection: nothing more is sent or received.
  if (failure != nullptr) return;
  failure = kj::cp(exception);
  switchPutOff = false;
  unconfirmed.clear();
  waiting.clear();
  KJ_IF_MAYBE(fulfiller, drainedFulfiller) (*fulfiller)->reject(kj::cp(exception));
  if (!readCanceler.isEmpty()) readCanceler.cancel(kj::cp(exception));
  deliver();
}

void SharedMemoryConnection::wake() {
  KJ_IF_MAYBE(s, sleepWord) s->wake();
}

// =======================================================================================
// The end of a turn

void SharedMemoryConnection::flush() {
  // At the end, since messages that waited may be published here.
  KJ_DEFER(unflushedCount = 0; unflushedSize = 0);
  if (switchPutOff && unansweredCalls == 0 && !owner.isForked()) {
    // The first calls are over, and the connection is not.
    beginSwitch();
  }
  if (failure != nullptr || owner.isForked()) return;
  if (!isSharing()) {
    // An Abort waits only for this; see sendMessage().
    if (outgoingShared) proceed();
    return;
  }
  // We are about to look for what comes, so the peer need not ring; before it hears of what we
  // sent.
  wake();
  uint64_t cpu = currentCpu();
  if (cpu != publishedCpu) {
    // Relaxed: a hint, which orders nothing. Only now, since the peer reads that line in each turn.
    KJ_ASSERT_NONNULL(outbox)->getHeader().cpu.store(cpu, std::memory_order_relaxed);
    publishedCpu = cpu;
  }
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    announceRegions();
    if (isConfirmed() && bellSocketState == UNTRIED && bellsRung >= BELLS_BEFORE_SOCKET) {
      offerBellSocket();
    }
    if (!waiting.empty()) publishWaiting();
    if (KJ_ASSERT_NONNULL(inbox)->takeFreed()) servedInterests |= WANT_ROOM;
    if (servedInterests != 0) ringPeer();
  })) {
    fail(kj::mv(*exception));
  }
}

bool SharedMemoryConnection::isWaiting() {
  return isSharing() && failure == nullptr && !owner.isForked() &&
      (wantsData() || !waiting.empty());
}

bool SharedMemoryConnection::awaitsSocket() {
  // Until shared memory is agreed on.
  return offered && plainReason == nullptr && !isSharing() && !plainEndSeen &&
      failure == nullptr && !owner.isForked();
}

bool SharedMemoryConnection::poll() {
  return (wantsData() && KJ_ASSERT_NONNULL(inbox)->isReady()) ||
      (!waiting.empty() && KJ_ASSERT_NONNULL(outbox)->hasNews());
}

const SharedWord* SharedMemoryConnection::watch() {
  if (!wantsData() || !waiting.empty()) return nullptr;
  return &KJ_ASSERT_NONNULL(inbox)->getNextStamp();
}

bool SharedMemoryConnection::prepare() {
  // What the peer has consumed is news for messages that wait for room, and to be found by poll().
  if (!waiting.empty()) return false;
  bool result = false;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    result = KJ_ASSERT_NONNULL(outbox)->prepare();
  })) {
    fail(kj::mv(*exception));
  }
  return result;
}

void SharedMemoryConnection::proceed() {
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    if (!waiting.empty()) publishWaiting();
    deliver();
  })) {
    fail(kj::mv(*exception));
  }
}

void SharedMemoryConnection::sleep() {
  if (!isSharing() || failure != nullptr || owner.isForked()) return;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    auto& s = KJ_ASSERT_NONNULL(sleepWord);
    if (KJ_ASSERT_NONNULL(inbox)->publishConsumed(true)) {
      servedInterests |= WANT_ROOM;
      ringPeer();
    }
    if (!isWaiting()) {
      s.wake();  // The peer need not ring.
    } else if (s.arm((wantsData() ? WANT_DATA : 0) | (waiting.empty() ? 0 : WANT_ROOM))) {
      ++sleeps;
      if (!waiting.empty()) KJ_ASSERT_NONNULL(outbox)->sleptForRoom();
      if (poll()) {
        wake();
        active();
        proceed();
      }
    }
  })) {
    fail(kj::mv(*exception));
  }
}

bool SharedMemoryConnection::peerSharesCpu() {
  if (!isSharing()) return false;
  // Relaxed: see flush().
  uint64_t cpu = KJ_ASSERT_NONNULL(inbox)->getPeerHeader().cpu.load(std::memory_order_relaxed);
  return cpu != 0 && cpu == currentCpu();
}

// =======================================================================================

kj::Own<capnp::RpcFlowController> SharedMemoryConnection::newStream() {
  return capnp::RpcFlowController::newVariableWindowController(*window)
      .attach(kj::addRef(*window));
}

capnp::rpc::twoparty::VatId::Reader SharedMemoryConnection::getPeerVatId() {
  return peerVatId.getRoot<capnp::rpc::twoparty::VatId>();
}

kj::Duration SharedMemoryConnection::getOutgoingMessageWaitTime() {
  if (getCurrentQueueCount() == 0) return 0 * kj::SECONDS;
  return clock.now() - currentOutgoingMessageSendTime;
}

SharedMemoryStats SharedMemoryConnection::getStats() {
  SharedMemoryStats result;
  auto copy = [](const DirectionStats& from, DirectionStats& to) {
    to.transport = from.transport;
    to.messages = from.messages;
    to.bytes = from.bytes;
    to.socketMessages = from.socketMessages;
    to.socketMessageBytes = from.socketMessageBytes;
    to.socketMessageBytesAfterSwitch = from.socketMessageBytesAfterSwitch;
    to.socketBytes = from.socketBytes;
  };
  copy(outgoingStats, result.outgoing);
  copy(incomingStats, result.incoming);
  KJ_IF_MAYBE(reason, plainReason) {
    result.outgoing.plainReason = kj::str(*reason);
    result.incoming.plainReason = kj::str(*reason);
  }
  if (isSharing()) result.incoming.transport = Transport::SHARED_MEMORY;
  KJ_IF_MAYBE(o, outbox) {
    auto& figures = (*o)->getFigures();
    result.outgoing.inlineMessages = figures.inlineMessages;
    result.outgoing.inlineBytes = figures.inlineBytes;
    result.outgoing.referencedMessages = figures.referencedMessages;
    result.outgoing.referencedBytes = figures.referencedBytes;
    result.outgoing.copiedBytes = figures.copiedBytes;
    result.outgoing.sealedBytes = figures.sealedBytes;
    result.regions = (*o)->getRegionCount();
    result.regionBytes = (*o)->getRegionBytes();
    result.ringBytes = (*o)->getRingBytes();
    result.ringBytesInUse = (*o)->getRingBytesInUse();
    result.arenaBytesInUse = (*o)->getArenaBytesInUse();
  }
  KJ_IF_MAYBE(i, inbox) {
    result.incoming.inlineMessages = (*i)->getInlineMessages();
    result.incoming.inlineBytes = (*i)->getInlineBytes();
    result.incoming.copiedBytes = (*i)->getCopiedBytes();
    result.incoming.sealedBytes = (*i)->getSealedBytes();
    result.incoming.referencedMessages = sharedMessagesTaken - result.incoming.inlineMessages;
    result.incoming.referencedBytes = sharedBytesTaken - result.incoming.inlineBytes;
  }
  result.bellsRung = bellsRung;
  result.bellsSaved = bellsSaved;
  result.sleeps = sleeps;
  result.heapWaits = heapWaits;
  return result;
}

}  // namespace capnpshm
