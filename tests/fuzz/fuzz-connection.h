// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "fuzz-input.h"
#include "fuzz-oracle.h"
#include "recycled-regions.h"
#include <capnp-shm/handshake.h>
#include <capnp-shm/layout.h>
#include <capnp-shm/rpc-shm.h>

namespace capnpshm {
namespace fuzz {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using capnp::rpc::twoparty::Side;

constexpr uint64_t LIMIT_WORDS = 4096;
// Of a message, at the victim.

class Socket {
  // An event loop, and a socket pair between a victim, which has it as a stream, and its peer,
  // played by the fuzzer. Used again and again, as long as neither end was closed.

public:
  Socket();
  KJ_DISALLOW_COPY(Socket);

  void prepare();
  // Before each execution.

  void turn() { io.waitScope.poll(); }
  // Everything that the victim does without waiting for its peer.

  bool send(kj::ArrayPtr<const byte> bytes, kj::ArrayPtr<const int> fds = nullptr);
  // To the victim. False if not all of it found room in the socket; the rest is lost.

  size_t receive(kj::ArrayPtr<byte> space, kj::Vector<kj::AutoCloseFd>& fds);
  // What there is from the victim.

  void endWriting();
  void close();
  // The peer's end.

  void wearOut() { worn = true; }
  // Somebody closes an end, so that there must be a new pair.

  kj::AsyncIoContext io;
  kj::Own<kj::AsyncCapabilityStream> victimsEnd;
  kj::AutoCloseFd nothing;
  // A descriptor that is not a region, to be sent.

private:
  kj::AutoCloseFd peersEnd;
  bool worn = true;

  static size_t receive(int socket, kj::ArrayPtr<byte> space, kj::Vector<kj::AutoCloseFd>& fds);
};

class Victim {
  // A connection of which every exception is examined and every message looked through.

public:
  static constexpr uint MAX_HELD = 8;

  Victim(Socket& socket, const SharedMemoryContext& context, Side side, uint maxFds);
  virtual ~Victim() noexcept(false);
  KJ_DISALLOW_COPY(Victim);

  void send(uint64_t number, size_t bytes, uint firstSegmentWords, bool withFd);
  // Until the connection is shut down.

  void shutdown();
  bool isShutDown() const { return didShutDown; }

  void hold(uint place) { holdAt = place; }
  // Where to keep the next message that is received. From MAX_HELD on: not at all.

  void drop(uint place) { held[place] = nullptr; }

  bool hasEnded() const { return ended; }
  bool hasFailed() const { return failure != nullptr; }
  kj::StringPtr getFailure() const { return failure; }
  SharedMemoryStats getStats() { return network.getStats(); }

protected:
  virtual void received(capnp::IncomingRpcMessage&) {}
  // To check what it contains.

private:
  Socket& socket;
  kj::Own<capnp::IncomingRpcMessage> held[MAX_HELD];  // Outlive the connection.
  SharedMemoryVatNetwork network;
  kj::Own<Connection> connection;
  uint holdAt = MAX_HELD;
  bool ended = false;
  kj::String failure;
  bool didShutDown = false;
  kj::Promise<void> receiving;
  kj::Promise<void> shuttingDown;

  kj::Own<Connection> open(Side side);
  kj::Promise<void> receive();
};

class ControlFrame {
  // A control message with its frame's header, to be sent as it is or with a change.

public:
  template <typename Func>
  explicit ControlFrame(Func&& fill) {
    fill(message.get());
    finish();
  }

  kj::ArrayPtr<capnp::word> words() { return kj::arrayPtr(frame, size); }
  kj::ArrayPtr<const byte> bytes() { return words().asBytes(); }

  void lie(Input& input);
  // Changes a word.

private:
  static constexpr size_t MAX_WORDS = 65;
  ControlMessage message;
  capnp::word frame[MAX_WORDS];
  size_t size = 0;

  void finish();
};

void checkConnections();
// Between two executions: that nothing is left of the last.

}  // namespace fuzz
}  // namespace capnpshm
