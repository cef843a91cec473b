// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Cap'n Proto RPC between two processes of one Linux machine, through shared memory.
//
// Replace `capnp::TwoPartyVatNetwork` by `capnpshm::SharedMemoryVatNetwork` (or TwoPartyServer and
// TwoPartyClient by SharedMemoryServer and SharedMemoryClient): over a Unix stream socket whose
// other end does the same, messages then travel through shared memory. Over anything else, or to
// any other peer, the connection stays what it was, a plain two-party stream.

#include <capnp/rpc-twoparty.h>
#include <capnp/serialize-async.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>

namespace capnpshm {

using kj::uint;

struct PeerLimits {
  // What one peer can make this side hold and do, beyond SharedMemoryOptions::maxBytes and Cap'n
  // Proto's ReaderOptions, which bound a message. No peer that keeps to the protocol meets an error
  // because of them: it is told what it may do, or refused what it need not have.

  uint regions = 32;
  // Regions of the peer's that this side maps at a time, beside the first. Further ones are
  // refused, and the peer goes on with what it has; as regions grow geometrically, few are needed.
  // 0 leaves it the first alone. A process has some 65000 mappings in all.

  uint fdsAhead = 64;
  // File descriptors that may have come, on a connection that accepts any, for messages that were
  // not received yet. The peer is told, and waits; one that does not is cut off. A single message
  // may always have as many as the connection accepts for each, so 0 means one message at a time.

  size_t retiredBytes = kj::maxValue;
  // Memory that this side may stop using, over the life of a connection, in bytes; at most
  // `maxBytes` in any case. The peer can keep what it was given, and that stays charged to this
  // side, so it can hold up to `maxBytes` and this. 0: memory once given is kept in use.

  uint controlMessages = 1024;
  // How many more bells the peer may send than this side has gone to sleep, and how many more
  // announcements of regions than this side has received messages. A peer that sends more is cut
  // off. An honest one sends a bell for each sleep at most, and announces few regions. At least 64.
};

struct SharedMemoryOptions {
  // How one side of a connection uses shared memory. Each side chooses for itself; the two need
  // not agree.

  bool trustPeer = false;
  // Whether the peer may be trusted not to change a message while we read it.
  //
  // false: each message is copied to private memory once, then parsed; the peer can do nothing but
  // end its own connection. As safe as a socket.
  //
  // true: messages are parsed where they lie, without a copy. A peer that rewrites a message while
  // we read it can make us read outside it, or crash. Set it only for a peer that runs your own
  // code with your own privileges. If both sides set it, they also wake each other by eventfd
  // instead of the socket, which is cheaper.

  size_t firstRegionBytes = 32 * 1024;
  // Size of the first region of shared memory that this side writes, in bytes; rounded up to whole
  // pages, at least 16 KiB. Further regions are added as needed, growing geometrically; the first
  // few messages of up to 8 MiB that lack room go in parts instead, copied, except without
  // spinning.

  uint plainCalls = 32;
  // How many calls that follow each other without a pause, from the beginning of a connection, may
  // go over the socket before there is shared memory, if this is the side that offers it first (the
  // client, usually). The first always does, since its answer tells whether there can be shared
  // memory; 0 for no more than that one, and then a connection of one call has regions too.
  //
  // To make, map and unmap the first regions costs some 400 µs of both sides' CPU time and delays a
  // call by some 200 µs. That is less than so many calls have gained on TwoPartyVatNetwork by then:
  // however many there are, a connection is not slower, and hardly ever takes more CPU time. With 8
  // it is fast sooner, and dearer (by a third and more) if it ends after 9 to 14 calls. Large
  // messages, calls of the peer's, and a pause in which no call is unanswered bring shared memory
  // at once; in a pause nobody waits for it.

  size_t maxBytes = 256 * 1024 * 1024;
  // Limit for all regions that this side writes on this connection, in bytes. When it is reached
  // nothing fails: messages wait on the heap, in order, until the peer has freed room. Also the
  // limit for what we map of the peer's; and up to a quarter of it is kept, in private memory, of
  // what large messages were copied to, for the next ones. At least `firstRegionBytes`.

  size_t streamWindowBytes = 0;
  // Flow control window of streaming calls (`-> stream`), in bytes; 0 means the smaller of 256 KiB
  // and a quarter of `maxBytes`. Used once the sending direction is in shared memory; before, or
  // on a plain connection, the window is the socket's send buffer, as TwoPartyVatNetwork has it.

  uint spinMicroseconds = 500;
  // How long, at the end of an event loop's turn, to look for an answer or the next request before
  // going to sleep, in microseconds, at most; 0 for never. A sleep and its wake-up cost tens of
  // microseconds, an answer from a peer that is awake comes in two or three. To this is added, for
  // messages of 4 KiB to 4 MiB, the time that it takes to move them, at 6 bytes a nanosecond
  // (175 µs for 1 MiB).
  //
  // The time actually spent adapts to whether it pays, separately for answers and for requests,
  // down to nothing when it does not: on an overloaded machine, between calls that come with
  // pauses, or for slow calls. It lasts hardly longer than a sleep and its wake-ups would take,
  // which is taken for 45 µs, or more, up to 95, where sleeps prove to take longer; unless it found
  // something many times in a row: each earns another 64th of a sleep, since a peer that was there
  // so often has probably been interrupted, and then both are spared a sleep.
  //
  // What it may cost: CPU time of about 10 µs for each time that it finds nothing while answers
  // come at once, more the longer they take; or as long as a sleep if sixteen in a row before did
  // find something, and 0.7 to 1.5 µs more for each of them. After a few that find nothing, a trial
  // of twice a sleep's length every 256 sleeps, or of twice 15 µs every 32 answers, at most; every
  // 2048 sleeps if the peers run on the same CPU. Never used on a single CPU. If connections on one
  // loop differ, the longest counts.
  //
  // After that, and with 0 too, the loop looks at its event port a few times more before it sleeps,
  // three system calls each, or one if `port` is given, for what comes as a bell or on another
  // connection: four times, or for as long as it took lately, and only while that pays; a trial of
  // 30 µs, or of a sleep's length for an answer, twice, every 256 short sleeps at most.
  // (TwoPartyVatNetwork looks as often between its reads and writes.)

  size_t sealedThresholdBytes = 0;
  // Segments of messages of at least this size, in bytes, get a file of their own that is sealed
  // against writing before the peer gets it, so that also a peer which does not trust us reads them
  // without copying. 0 for never, and then this side does not accept them either; they are sent if
  // both sides accept them. (A side with `trustPeer` has no need to accept them, but sends them.)
  //
  // Making, mapping and sealing a file costs much more than copying into memory that is there
  // already, so this pays only for very large segments, if at all: measure. docs/PERFORMANCE.md has
  // figures.

  size_t sealedHeldBytes = 64 * 1024 * 1024;
  // How many bytes of the peer's sealed segments may be mapped at a time, in the messages which
  // the application holds. Segments beyond that are copied, as if they were not sealed.

  uint64_t sealedTotalBytes = uint64_t(1024) * 1024 * 1024;
  // How many bytes of sealed segments the peer is given, in all, as long as the connection lives. A
  // peer can keep each of them without telling, while it counts as memory of this process. Once
  // they are spent, messages are sent as if segments could not be sealed. Without limit if
  // `trustPeer`.

  bool requireSharedMemory = false;
  // If the connection cannot use shared memory, fail it (type FAILED, with the reason) instead of
  // going on as a plain two-party stream.

  PeerLimits peerLimits;
  // Against a peer that wants to exhaust this side. The defaults are meant for any use.
};

struct SharedMemoryContext {
  // What the constructors with this in front take beyond TwoPartyVatNetwork's parameters.

  kj::UnixEventPort* port = nullptr;
  // The event port of the thread's event loop, e.g. `&asyncIo.unixEventPort`. With it a wake-up
  // costs this side one system call instead of four, and its peer one wake-up less; and the loop's
  // timers are in time while this connection is never idle, rather than up to 4 ms late. Must
  // outlive the network.

  SharedMemoryOptions options;
};

enum class Transport: uint8_t {
  // What carries the messages of one direction.

  STARTING,
  // Plain frames on the socket, while it is not known yet whether the peer can do better.

  PLAIN,
  // Plain frames on the stream, for good.

  SHARED_MEMORY
  // Agreed: the next call goes there, or after a few small ones; see
  // SharedMemoryOptions::plainCalls. (What ends them, a Finish say, may be a plain frame yet; see
  // docs/PROTOCOL.md 5. If it turns out then that the system refuses memory or a mapping, or that
  // something on the way drops file descriptors, this becomes PLAIN, and nothing is lost.)
};

struct DirectionStats {
  // Counters of one direction of a connection since it began. A message is a Cap'n Proto RPC
  // message (Call, Return, Finish, ...).

  Transport transport = Transport::STARTING;
  kj::String plainReason;
  // If `transport` is PLAIN: why. Empty otherwise.

  uint64_t messages = 0;
  uint64_t bytes = 0;
  // All messages, on whichever transport, and the bytes of their segments.

  uint64_t inlineMessages = 0;
  uint64_t inlineBytes = 0;
  // Of these, messages that were wholly inside the descriptor ring.

  uint64_t referencedMessages = 0;
  uint64_t referencedBytes = 0;
  // Of these, messages with segments elsewhere in shared memory.

  uint64_t copiedBytes = 0;
  // Payload copied by this side: out of shared memory when receiving, or from heap memory into
  // shared memory when sending.

  uint64_t sealedBytes = 0;
  // Payload in sealed segments, which this side did not copy.

  uint64_t socketMessages = 0;
  uint64_t socketMessageBytes = 0;
  // Messages that went over the socket as plain frames, and their bytes, headers included.

  uint64_t socketMessageBytesAfterSwitch = 0;
  // Of these bytes, those after the direction had switched to shared memory. Counted where plain
  // frames are written and read, so 0 as long as both sides keep to the protocol; a peer that sends
  // anything else after its switch ends the connection.

  uint64_t socketBytes = 0;
  // All bytes on the socket: plain frames, control messages, bells. Not counted (0) when the
  // connection is PLAIN from the start, since Cap'n Proto itself then does the I/O.
};

struct SharedMemoryStats {
  // A snapshot of a connection; see SharedMemoryVatNetwork::getStats().

  DirectionStats outgoing;
  DirectionStats incoming;

  uint64_t bellsRung = 0;
  // Wake-ups sent to the peer: one system call each.

  uint64_t bellsSaved = 0;
  // Times at which messages had been published and the peer was awake, so that none was needed.

  uint64_t sleeps = 0;
  // How often this side announced that it sleeps and wants to be woken.

  uint regions = 0;
  size_t regionBytes = 0;
  // Regions that this side writes now, and their bytes.

  size_t ringBytes = 0;
  size_t ringBytesInUse = 0;
  // Size of the outgoing descriptor ring, and how much of it the peer has not said it consumed.

  size_t arenaBytesInUse = 0;
  // Memory for message segments that is allocated now, in the regions that this side writes.

  uint64_t heapWaits = 0;
  // Messages that had to wait on the heap for room in shared memory.
};


class SharedMemoryVatNetwork: public capnp::TwoPartyVatNetworkBase {
  // A `VatNetwork` of exactly two parties, with the interface and behaviour of
  // `capnp::TwoPartyVatNetwork`, which carries messages through shared memory when the stream is a
  // Unix stream socket and the peer does the same. It is otherwise a TwoPartyVatNetwork: the
  // connection starts with plain frames and upgrades itself within the first round trip, and if
  // anything is in the way it stays plain; getStats() says why.
  //
  // Belongs to the thread of its event loop, as TwoPartyVatNetwork does, with these exceptions:
  // newOutgoingMessage() of its Connection, building that message, and destroying messages of
  // either direction are allowed on any thread, even after the network is gone.

public:
  // The constructors of TwoPartyVatNetwork, parameter for parameter. With a MessageStream the
  // connection is always plain.
  SharedMemoryVatNetwork(capnp::MessageStream& msgStream,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(capnp::MessageStream& msgStream, uint maxFdsPerMessage,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(kj::AsyncIoStream& stream,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(kj::AsyncCapabilityStream& stream, uint maxFdsPerMessage,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());

  // The same with a context. Options that contradict themselves (a first region larger than
  // `maxBytes`) or that no peer could get along with throw type FAILED.
  SharedMemoryVatNetwork(const SharedMemoryContext& context, capnp::MessageStream& msgStream,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(const SharedMemoryContext& context, capnp::MessageStream& msgStream,
      uint maxFdsPerMessage, capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(const SharedMemoryContext& context, kj::AsyncIoStream& stream,
      capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());
  SharedMemoryVatNetwork(const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream,
      uint maxFdsPerMessage, capnp::rpc::twoparty::Side side,
      capnp::ReaderOptions receiveOptions = capnp::ReaderOptions(),
      const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock());

  virtual ~SharedMemoryVatNetwork() noexcept(false);
  // Virtual so that clang does not warn where an application puts one on the heap.
  KJ_DISALLOW_COPY(SharedMemoryVatNetwork);

  kj::Promise<void> onDisconnect();
  capnp::rpc::twoparty::Side getSide();
  size_t getCurrentQueueSize();
  size_t getCurrentQueueCount();
  kj::Duration getOutgoingMessageWaitTime();
  // As in TwoPartyVatNetwork. In shared memory a message counts as queued from send() to the end
  // of the event loop's turn, when the peer is woken if it sleeps, or as long as it waits on the
  // heap for room.

  SharedMemoryStats getStats();
  // What this connection has done so far and which transport it uses.

  // implements VatNetwork -----------------------------------------------------

  kj::Maybe<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> connect(
      capnp::rpc::twoparty::VatId::Reader ref) override;
  kj::Promise<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> accept() override;

private:
  class Impl;
  kj::Own<Impl> impl;
};

class SharedMemoryServer: private kj::TaskSet::ErrorHandler {
  // capnp::TwoPartyServer on SharedMemoryVatNetwork: a simple server which accepts connections and
  // services them, each in shared memory if it can be.

public:
  explicit SharedMemoryServer(capnp::Capability::Client bootstrapInterface,
      kj::Maybe<kj::Function<kj::String(const kj::Exception&)>> traceEncoder = nullptr);
  SharedMemoryServer(const SharedMemoryContext& context,
      capnp::Capability::Client bootstrapInterface,
      kj::Maybe<kj::Function<kj::String(const kj::Exception&)>> traceEncoder = nullptr);
  // `traceEncoder`, if provided, is passed on to `rpcSystem.setTraceEncoder()`. The context's port
  // must outlive the server.

  virtual ~SharedMemoryServer() noexcept(false);
  KJ_DISALLOW_COPY(SharedMemoryServer);

  void accept(kj::Own<kj::AsyncIoStream>&& connection);
  void accept(kj::Own<kj::AsyncCapabilityStream>&& connection, uint maxFdsPerMessage);
  // Accepts the connection for servicing.

  kj::Promise<void> accept(kj::AsyncIoStream& connection) KJ_WARN_UNUSED_RESULT;
  kj::Promise<void> accept(kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage)
      KJ_WARN_UNUSED_RESULT;
  // Accepts the connection without taking ownership. The returned promise resolves when the client
  // disconnects. Dropping the promise forcefully cancels the RPC protocol.

  kj::Promise<void> listen(kj::ConnectionReceiver& listener);
  // Listens for connections on the given listener. The returned promise never resolves unless an
  // exception is thrown while trying to accept. You may discard the returned promise to cancel
  // listening.

  kj::Promise<void> listenCapStreamReceiver(
      kj::ConnectionReceiver& listener, uint maxFdsPerMessage);
  // Listens with support for FD transfers. `listener.accept()` must return instances of
  // AsyncCapabilityStream, otherwise this will crash.

  kj::Promise<void> drain() { return tasks.onEmpty(); }
  // Resolves when all clients have disconnected. Only considers clients whose connections the
  // server took ownership of.

private:
  SharedMemoryContext context;
  capnp::Capability::Client bootstrapInterface;
  kj::Maybe<kj::Function<kj::String(const kj::Exception&)>> traceEncoder;
  kj::TaskSet tasks;

  struct AcceptedConnection;

  void taskFailed(kj::Exception&& exception) override;
};

class SharedMemoryClient {
  // capnp::TwoPartyClient on SharedMemoryVatNetwork.

public:
  explicit SharedMemoryClient(kj::AsyncIoStream& connection);
  explicit SharedMemoryClient(kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage);
  SharedMemoryClient(kj::AsyncIoStream& connection, capnp::Capability::Client bootstrapInterface,
      capnp::rpc::twoparty::Side side = capnp::rpc::twoparty::Side::CLIENT);
  SharedMemoryClient(kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage,
      capnp::Capability::Client bootstrapInterface,
      capnp::rpc::twoparty::Side side = capnp::rpc::twoparty::Side::CLIENT);

  SharedMemoryClient(const SharedMemoryContext& context, kj::AsyncIoStream& connection);
  SharedMemoryClient(const SharedMemoryContext& context, kj::AsyncCapabilityStream& connection,
      uint maxFdsPerMessage);
  SharedMemoryClient(const SharedMemoryContext& context, kj::AsyncIoStream& connection,
      capnp::Capability::Client bootstrapInterface,
      capnp::rpc::twoparty::Side side = capnp::rpc::twoparty::Side::CLIENT);
  SharedMemoryClient(const SharedMemoryContext& context, kj::AsyncCapabilityStream& connection,
      uint maxFdsPerMessage, capnp::Capability::Client bootstrapInterface,
      capnp::rpc::twoparty::Side side = capnp::rpc::twoparty::Side::CLIENT);

  KJ_DISALLOW_COPY(SharedMemoryClient);

  capnp::Capability::Client bootstrap();
  // Gets the server's bootstrap interface.

  kj::Promise<void> onDisconnect() { return network.onDisconnect(); }

  void setTraceEncoder(kj::Function<kj::String(const kj::Exception&)> func);
  // Forwarded to rpcSystem.setTraceEncoder().

  size_t getCurrentQueueSize() { return network.getCurrentQueueSize(); }
  size_t getCurrentQueueCount() { return network.getCurrentQueueCount(); }
  kj::Duration getOutgoingMessageWaitTime() { return network.getOutgoingMessageWaitTime(); }

  SharedMemoryStats getStats() { return network.getStats(); }

private:
  SharedMemoryVatNetwork network;
  capnp::RpcSystem<capnp::rpc::twoparty::VatId> rpcSystem;
};

}  // namespace capnpshm
