// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The conformance suite runs every RPC behaviour in many modes: capnp::TwoPartyVatNetwork at both
// ends (the reference), and SharedMemoryVatNetwork with every choice of options, peers and streams.
// All must agree. After each test the transport which the mode should use is checked.

#include "conformance-server.h"
#include "loop-fixture.h"
#include <capnp-shm/rpc-shm.h>
#include <gtest/gtest.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <string>
#include <vector>

namespace capnpshm {
namespace conformance {

using capnp::rpc::twoparty::Side;
using capnp::rpc::twoparty::VatId;

struct EndMode {
  // How one end of a connection is made.

  enum Kind { TWO_PARTY, DROP_IN, CONTEXT, MESSAGE_STREAM };
  // TwoPartyVatNetwork; SharedMemoryVatNetwork with exactly TwoPartyVatNetwork's parameters, with
  // a context, or from a MessageStream.

  Kind kind;
  Side side;
  bool trust = false;
  bool port = false;
  bool small = false;
  // So little shared memory that every large message, and many small ones, must wait for room.
  bool sealed = false;
  // Segments of 16 KiB and more are sealed.
  bool spins = true;
  // If not, a connection makes further regions as soon as it could use one.

  kj::uint plainCalls() const {
    // Few where that can be chosen, for most of what a test does to happen in shared memory.
    return kind == CONTEXT ? 1 : SharedMemoryOptions().plainCalls;
  }
};

enum class StreamKind {
  SOCKET,      // A Unix stream socket pair.
  TCP,
  IN_PROCESS,  // A pipe of KJ's own, without a file descriptor.
  PROXY        // Unix sockets, but bytes are pumped between two pairs: file descriptors are lost.
};

struct Mode {
  const char* name;
  EndMode client;
  EndMode server;
  StreamKind stream;
  Transport expected;

  bool passesFds() const {
    return stream == StreamKind::SOCKET || stream == StreamKind::IN_PROCESS;
  }
};

const std::vector<Mode>& allModes();
std::vector<Mode> socketModes();
// Those over a single Unix socket pair, whose other end can be in another thread.

inline std::string modeName(const testing::TestParamInfo<Mode>& info) { return info.param.name; }
inline void PrintTo(const Mode& mode, std::ostream* out) { *out << mode.name; }

constexpr kj::uint SHARING_CALLS = SharedMemoryOptions().plainCalls + 2;
// After so many calls of the client's, one after the other, a connection is shared in every mode in
// which it ever is.

struct LinkOptions {
  // What a test wants of both ends.

  kj::uint maxFds = 0;
  capnp::ReaderOptions reader;
  const kj::MonotonicClock& clock = kj::systemCoarseMonotonicClock();
  size_t maxBytes = 0;
  // If not 0: SharedMemoryOptions::maxBytes in modes that have a context and do not set it anyway.
};

struct StreamPair {
  // Both ends of a mode's stream, and what lies between them.

  StreamPair(const Mode& mode, kj::AsyncIoContext& io, bool withFds);

  kj::Own<kj::AsyncIoStream> ends[2];  // The client's and the server's.

private:
  kj::Own<kj::AsyncIoStream> proxyEnds[2];
  kj::Vector<kj::Promise<void>> pumps;
};

class Network {
  // Either class of network, behind one face.

public:
  Network(const EndMode& mode, kj::UnixEventPort& port, kj::AsyncIoStream& stream,
          const LinkOptions& options);

  capnp::TwoPartyVatNetworkBase& get();
  kj::Promise<void> onDisconnect();
  size_t getCurrentQueueSize();
  size_t getCurrentQueueCount();
  kj::Duration getOutgoingMessageWaitTime();
  kj::Maybe<SharedMemoryStats> getStats();
  // Null for a TwoPartyVatNetwork.

private:
  kj::Own<capnp::MessageStream> messages;
  kj::Own<capnp::TwoPartyVatNetwork> twoParty;
  kj::Own<SharedMemoryVatNetwork> shared;
};

class End {
  // A stream, a network and, unless the test speaks the protocol itself, an RPC system.

public:
  End(const EndMode& mode, kj::UnixEventPort& port, kj::Own<kj::AsyncIoStream> stream,
      const LinkOptions& options);
  ~End() noexcept(false);

  void start(kj::Maybe<capnp::Capability::Client> bootstrap);
  void start(capnp::BootstrapFactory<VatId>& factory);

  capnp::Capability::Client bootstrap();
  Root::Client root() { return bootstrap().castAs<Root>(); }
  // The peer's bootstrap interface.

  kj::Own<capnp::TwoPartyVatNetworkBase::Connection> connect();
  // For a test that speaks the protocol itself.

  void expectTransport(Transport expected);

  void expectNothing() { checked = true; }
  // Don't check the transport at the end, because this connection does not live to see it decided.

  EndMode mode;
  kj::Own<kj::AsyncIoStream> stream;
  Network network;
  kj::Maybe<capnp::RpcSystem<VatId>> rpc;

private:
  bool checked = false;
};

class Link {
  // Both ends of a connection on one event loop.

public:
  Link(const Mode& mode, kj::AsyncIoContext& io, const LinkOptions& options);
  ~Link() noexcept(false);

  void start(kj::Maybe<capnp::Capability::Client> serverBootstrap,
             kj::Maybe<capnp::Capability::Client> clientBootstrap = nullptr);
  void startServer();
  // What start() does beyond the bootstrap interfaces: a CLIENT side answers nothing before it
  // speaks itself.

  void destroyClient();
  void destroyServer();
  void check();

  const Mode& mode;
  kj::AsyncIoContext& io;
  StreamPair streams;
  kj::Own<End> client;
  kj::Own<End> server;
};

class Conformance: public testing::TestWithParam<Mode>, protected LoopFixture {
protected:
  ~Conformance() noexcept override {}

  const Mode& mode() { return GetParam(); }

  ServerState state;
  ServerState mine;
  // For the objects of the server and for those of the client. They outlive the connection.

  kj::Own<Link> connect(kj::Maybe<capnp::Capability::Client> serverBootstrap,
                        LinkOptions options = LinkOptions(),
                        kj::Maybe<capnp::Capability::Client> clientBootstrap = nullptr);

  kj::Own<Link> connect(ServerState& state, LinkOptions options = LinkOptions()) {
    return connect(capnp::Capability::Client(kj::heap<RootImpl>(state)), options);
  }
};

class ThreadedConformance: public Conformance {
  // The server in another thread, with an event loop of its own.

protected:
  class ServerThread {
  public:
    ServerThread(const Mode& mode, kj::AsyncIoContext& io, const LinkOptions& options,
                 kj::Function<capnp::Capability::Client(kj::AsyncIoContext&)> makeBootstrap);
    ~ServerThread() noexcept(false);

    kj::Own<End> client;

  private:
    kj::Own<kj::Thread> thread;
  };

  kj::Own<ServerThread> connectThread(ServerState& state, LinkOptions options = LinkOptions());
};

#define EXPECT_FAILS(kind, text, promise) \
  do { \
    bool succeeded_ = false; \
    KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { await(promise); succeeded_ = true; })) { \
      EXPECT_EQ(uint(kj::Exception::Type::kind), uint(e->getType())) << kj::str(*e).cStr(); \
      EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), text)) << kj::str(*e).cStr(); \
    } \
    EXPECT_FALSE(succeeded_) << #promise " should have failed"; \
  } while (false)
// A promise must fail with a type and a text in its description.

}  // namespace conformance
}  // namespace capnpshm
