// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "bell-socket.h"
#include "busy-poll.h"
#include "doorbell.h"
#include "event-bell.h"
#include "foreign-wake.h"
#include "frame-reader.h"
#include "handshake.h"
#include "inbox.h"
#include "message.h"
#include "outbox.h"
#include "rpc-shm.h"
#include <kj/function.h>
#include <list>

namespace capnpshm {

class SharedMemoryConnection final: public capnp::TwoPartyVatNetworkBase::Connection,
                                    private MessageSender,
                                    private TurnEnd::Member {
  // One end of a connection over a Unix stream socket: plain frames at first, and each direction
  // in shared memory from its SWITCH on.
  //
  // Invariants:
  // - Messages leave in the order of their send(), whatever carries them.
  // - One read and one chain of writes on the socket at a time.
  // - `outbox` is there from our SWITCH on, `inbox` from the peer's. What we publish before the
  //   peer has confirmed that it mapped our region is kept, to be sent as plain frames if it
  //   declines.
  //
  // Belongs to the thread of its event loop, except newOutgoingMessage().

public:
  SharedMemoryConnection(const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream,
      uint maxFdsPerMessage, capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock);
  ~SharedMemoryConnection() noexcept(false);

  void offer();
  // Writes the offer, if this side has not yet. Before the first message.

  void dropped();
  // Nobody will receive messages any more: after shutdown(), ends the stream.

  size_t getCurrentQueueSize() { return queueSize + unflushedSize; }
  size_t getCurrentQueueCount() { return queueCount + unflushedCount; }
  kj::Duration getOutgoingMessageWaitTime();
  SharedMemoryStats getStats();

  // implements Connection -----------------------------------------------------

  kj::Own<capnp::RpcFlowController> newStream() override;
  capnp::rpc::twoparty::VatId::Reader getPeerVatId() override;
  kj::Own<capnp::OutgoingRpcMessage> newOutgoingMessage(uint firstSegmentWordSize) override;
  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> receiveIncomingMessage() override;
  kj::Promise<void> shutdown() override;

private:
  using MaybeMessage = kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>;

  class Receiver;
  class WindowState;

  struct WaitingMessage {
    // A message that has been sent but not published yet.
    enum FdState { NONE, UNSENT, WRITING, WRITTEN };

    kj::Own<OutgoingMessage> message;
    kj::Array<kj::AutoCloseFd> fds;
    FdState fdState;
    size_t bytes;
  };

  struct PlainFrame {
    // Of a message, or, if that is null, of a control message.
    kj::Own<OutgoingMessage> message;
    kj::Own<ControlMessage> control;
    kj::Array<kj::AutoCloseFd> fds;
    size_t bytes;
    kj::TimePoint sendTime;
  };
  struct PlainBatch: public kj::Refcounted {
    // Frames that leave with one write. One with file descriptors leaves by itself.

    kj::Vector<PlainFrame> frames;
  };

  struct PlainMessage {
    // One that was read, with all file descriptors that came.
    kj::Own<capnp::MessageReader> reader;
    kj::Array<kj::AutoCloseFd> fds;
  };

  struct FdRecord {
    // What came on the socket for a message that is still to come, or is being waited for.
    kj::Array<kj::AutoCloseFd> fds;
    kj::Array<SealedFile> sealed;

    uint64_t cost() const { return kj::max(fds.size() + sealed.size(), size_t(1)); }
    // The memory of one without descriptors counts too.
  };

  SharedMemoryOptions options;
  kj::UnixEventPort* port;
  kj::AsyncCapabilityStream& stream;
  int socket;
  uint maxFdsPerMessage;
  capnp::ReaderOptions receiveOptions;
  const kj::MonotonicClock& clock;
  capnp::MallocMessageBuilder peerVatId;
  OwnerThread owner;

  // Setting up.
  bool offered = false;
  bool gotOffer = false;
  bool gotSwitch = false;
  bool gotMapped = false;
  bool gotBell = false;
  bool gotDeclined = false;
  bool awaitsTaken = false;
  // We have declined after our SWITCH, and what we send now must wait until we know what to send
  // again.
  bool gotEcho = false;
  bool switchPutOff = false;
  // Both have offered, we unasked, and shall switch as soon as it seems worth it.
  bool peerTrustsUs = false;
  uint64_t peersSealedBytes = 0;
  uint peersFdsAhead = MAX_FDS_AHEAD;
  uint64_t nonce = 0;
  uint32_t version = 0;
  uint64_t peerFirstRegionBytes = 0;
  bool outgoingShared = false;
  // Our messages are published, though perhaps not confirmed to have a reader; see isConfirmed().
  uint unwrittenAnswers = 0;
  // Of our answers to announcements of regions.
  bool switchWritten = false;
  // Whether the write of our SWITCH has begun; it may wait behind plain frames for a while.
  kj::Maybe<kj::String> plainReason;

  kj::Maybe<kj::Own<Outbox>> outbox;
  kj::Maybe<kj::Own<Inbox>> inbox;
  kj::Maybe<SleepWord> sleepWord;
  kj::Maybe<PeerSleepWord> peerSleepWord;
  kj::Maybe<kj::Own<EventBell>> peerBell;
  uint64_t publishedCpu = 0;
  // What our header says.
  bool eventBellLost = false;
  // To wake the peer, if both sides trust each other; else, or if the peer had no descriptor to
  // spare, the socket is the bell.
  kj::Maybe<kj::Own<BellSocket>> bellSocket;
  enum { UNTRIED, OFFERED, TAKEN } bellSocketState = UNTRIED;
  // To wake a peer that need not be trusted, once it proves to sleep often.
  bool peerTakesBellSocket = false;
  kj::Maybe<kj::Own<EventBellListener>> ownBell;
  kj::Own<ForeignWake> foreignWake;

  // Sending.
  kj::Maybe<kj::Promise<void>> previousWrite;
  // Resolves when the previous write completes. Null after shutdown().
  uint pendingWrites = 0;
  kj::Maybe<kj::Own<PlainBatch>> openBatch;
  // The last write that is queued, if more plain frames may leave with it.
  bool bellQueued = false;
  // Behind other writes. It serves all that is published before it is written.
  // Lists, since unlike a std::deque they take no memory while they are empty, as they mostly are.
  std::list<WaitingMessage> waiting;
  std::list<WaitingMessage> unconfirmed;
  // Those that were published before the peer has said that it mapped our region. All lie there, so
  // that its size bounds them.
  struct FdsAhead {
    uint64_t position;
    uint fds;
  };
  std::list<FdsAhead> fdsAhead;
  uint totalFdsAhead = 0;
  // Of published messages with file descriptors that the peer may not have taken, behind which
  // position in the ring; sealed segments count too.
  kj::Maybe<kj::Own<kj::PromiseFulfiller<void>>> drainedFulfiller;
  uint64_t servedInterests = 0;
  bool writeFailed = false;
  bool shuttingDown = false;
  bool writeEnded = false;

  // Receiving.
  FrameReader frames;
  kj::Maybe<kj::Own<capnp::MessageStream>> plainStream;
  // Takes the stream over once it is plain for good, behind what `frames` has read ahead.
  kj::Canceler readCanceler;
  bool readingPlain = false;
  // Or about to: only one may do so at a time.
  kj::Maybe<kj::Exception> failure;
  // Set once the connection is broken: all further receives fail with it.
  kj::Maybe<Receiver&> receiver;
  std::list<FdRecord> fdRecords;
  uint64_t fdRecordsCost = 0;
  uint64_t bellsTaken = 0;
  uint64_t regionsTaken = 0;
  bool plainEndSeen = false;
  bool controlEndSeen = false;
  // Of the socket once it is the control socket.
  bool ended = false;
  // No messages follow but those which are published.
  kj::Maybe<kj::Exception> endReason;
  // How the control socket ended, once it did; null for a clean end.

  // Figures.
  size_t queueSize = 0;
  size_t queueCount = 0;
  size_t unflushedSize = 0;
  size_t unflushedCount = 0;
  kj::TimePoint currentOutgoingMessageSendTime;
  DirectionStats outgoingStats;
  DirectionStats incomingStats;
  uint64_t sharedMessagesTaken = 0;
  uint64_t sharedBytesTaken = 0;
  // Of the incoming messages, those that came through shared memory.
  uint64_t bellsRung = 0;
  uint64_t bellsSaved = 0;
  uint64_t sleeps = 0;
  uint64_t heapWaits = 0;
  uint64_t unansweredCalls = 0;
  // Calls sent less Returns received, as far as can be seen; tells how long to look for messages.
  uint64_t callsSent = 0;
  // All of them; tells when to switch.

  kj::Own<WindowState> window;
  kj::Maybe<kj::Promise<MaybeMessage>> readAhead;
  // The next message, or what comes before it; see beginSwitch().
  kj::Promise<void> controlTask;
  kj::Promise<void> bellTask;
  kj::Promise<void> foreignTask;
  kj::Promise<void> endTask;

  // connection-setup.c++ ------------------------------------------------------

  void writeOffer();
  void handleControl(protocol::Control::Reader control, kj::ArrayPtr<kj::AutoCloseFd> fds);
  void handleOffer(protocol::Offer::Reader offer);
  void handleSwitch(kj::ArrayPtr<kj::AutoCloseFd> fds);
  void handleRegion(protocol::Region::Reader region, kj::ArrayPtr<kj::AutoCloseFd> fds);
  void handleFds(kj::Array<SealedFile> sealed, kj::ArrayPtr<kj::AutoCloseFd> fds);
  void handleSealed(protocol::Sealed::Reader sealed, kj::ArrayPtr<kj::AutoCloseFd> fds);
  uint64_t acceptedSealedBytes() const;
  void handleMapped();
  bool switchOutgoing();
  void beginSwitch();
  bool mayStayPlain(size_t words) const;
  void switchBeforeSending(capnp::rpc::Message::Which kind, size_t words);
  void switchAfterReceiving(kj::ArrayPtr<const capnp::word> firstSegment, size_t words);
  void startSharing(kj::Own<PeerRegion> region);
  bool isSharing() const { return inbox != nullptr; }
  // The peer's messages come through shared memory, and ours go there.
  bool isConfirmed() const { return isSharing() && gotMapped; }
  // And it will stay so.
  bool readsExactly() const { return port == nullptr && options.trustPeer; }
  // No byte ahead of what is needed, since a bell may come that only KJ can receive.
  bool isMutualTrust() const { return options.trustPeer && peerTrustsUs; }
  void sendBell();
  void offerBellSocket();
  void handleBellSocket(kj::ArrayPtr<kj::AutoCloseFd> fds);
  void decline(kj::StringPtr reason);

  // connection-plain.c++ ------------------------------------------------------

  kj::Promise<MaybeMessage> receivePlain();
  kj::Promise<kj::Maybe<PlainMessage>> readPlain();
  kj::Promise<MaybeMessage> plainEnded(kj::Maybe<kj::Exception> reason);
  bool handlePlainBody(
      kj::Maybe<capnp::AnyPointer::Reader> body, kj::ArrayPtr<kj::AutoCloseFd> fds);
  static size_t frameBytes(kj::ArrayPtr<const kj::ArrayPtr<const capnp::word>> segments);
  bool isHungUp();
  bool peerWantsNothing() { return controlEndSeen || isHungUp(); }
  // Nor an end of ours: it has ended the connection.
  void sendPlain(OutgoingMessage& message, kj::Array<kj::AutoCloseFd> fds, size_t bytes);
  void addPlain(PlainFrame&& frame);
  kj::Promise<void> writeBatch(PlainBatch& batch);
  void countPlain(size_t wireBytes);
  void stayPlain(kj::StringPtr reason);
  void sendAgain(size_t taken);

  // connection-send.c++ -------------------------------------------------------

  void sendMessage(OutgoingMessage& message) override;
  bool publishAtOnce(OutgoingMessage& message, size_t bytes);
  void publishWaiting();
  void announceRegions();
  bool sendFds(WaitingMessage& message);
  void keepUnconfirmed(OutgoingMessage& message, size_t bytes);
  void writeControl(kj::Own<ControlMessage> control, kj::Array<kj::AutoCloseFd> fds = nullptr,
      kj::Maybe<int> borrowedFd = nullptr);
  kj::Promise<void> enqueueWrite(
      kj::Function<kj::Promise<void>()> write, bool rpcMessage = false);
  void countCall(capnp::rpc::Message::Which kind);
  void ringPeer();
  void enqueueBell();
  kj::Promise<void> whenWritten();
  kj::Promise<void> endWriting();

  // connection-receive.c++ ----------------------------------------------------

  kj::Promise<MaybeMessage> receiveNext();
  kj::Promise<MaybeMessage> receiveShared();
  MaybeMessage takeOne();
  void countReturn(kj::ArrayPtr<const capnp::word> firstSegment);
  kj::Maybe<kj::Exception> endOfDelivery();
  void deliver();
  kj::Promise<void> deliverPlain();
  kj::Promise<void> readControl();
  void handleFrame(FrameReader::Frame& frame, bool bellExpected);
  void handleEventBell(FrameReader::Frame& frame);
  kj::Promise<void> listenToBell();
  kj::Promise<void> listenToForeignThreads();
  void bellRang();
  void admitBell();
  void admitRegion();
  void controlEnded(kj::Maybe<kj::Exception> reason);
  bool wantsData() { return isSharing() && !ended && receiver != nullptr; }

  // connection.c++ ------------------------------------------------------------

  void fail(kj::Exception&& exception);
  void wake();

  void flush() override;
  bool isWaiting() override;
  bool awaitsSocket() override;
  bool expectsAnswer() override { return unansweredCalls > 0 || !waiting.empty(); }
  bool poll() override;
  const SharedWord* watch() override;
  bool prepare() override;
  void proceed() override;
  void sleep() override;
  bool peerSharesCpu() override;
};

}  // namespace capnpshm
