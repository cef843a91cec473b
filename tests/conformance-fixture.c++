// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-fixture.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <capnp/serialize-async.h>

namespace capnpshm {
namespace conformance {

namespace {

EndMode end(EndMode::Kind kind, Side side) { return { kind, side, false, false, false }; }

EndMode end(Side side, bool trust, bool port, bool small = false) {
  return { EndMode::CONTEXT, side, trust, port, small };
}

EndMode sealing(Side side) { return { EndMode::CONTEXT, side, false, true, false, true }; }

std::vector<Mode> makeModes() {
  constexpr auto C = Side::CLIENT;
  constexpr auto S = Side::SERVER;
  constexpr auto SHARED = Transport::SHARED_MEMORY;
  constexpr auto PLAIN = Transport::PLAIN;
  constexpr auto SOCKET = StreamKind::SOCKET;
  constexpr auto TWO_PARTY = EndMode::TWO_PARTY;
  constexpr auto DROP_IN = EndMode::DROP_IN;
  return {
    { "TwoParty", end(TWO_PARTY, C), end(TWO_PARTY, S), SOCKET, PLAIN },
    { "Untrusted", end(C, false, true), end(S, false, true), SOCKET, SHARED },
    { "TrustedPort", end(C, true, true), end(S, true, true), SOCKET, SHARED },
    { "TrustedNoPort", end(C, true, false), end(S, true, false), SOCKET, SHARED },
    { "TrustingClient", end(C, true, true), end(S, false, true), SOCKET, SHARED },
    { "TrustingServer", end(C, false, true), end(S, true, true), SOCKET, SHARED },
    { "DropIn", end(DROP_IN, C), end(DROP_IN, S), SOCKET, SHARED },
    { "ClientClient", end(DROP_IN, C), end(DROP_IN, C), SOCKET, SHARED },
    { "Small", end(C, false, true, true), end(S, false, true, true), SOCKET, SHARED },
    { "SmallTrusted", end(C, true, true, true), end(S, true, true, true), SOCKET, SHARED },
    { "Sealed", sealing(C), sealing(S), SOCKET, SHARED },
    { "TwoPartyClient", end(TWO_PARTY, C), end(DROP_IN, S), SOCKET, PLAIN },
    { "TwoPartyServer", end(DROP_IN, C), end(TWO_PARTY, S), SOCKET, PLAIN },
    { "ServerServer", end(DROP_IN, S), end(DROP_IN, S), SOCKET, PLAIN },
    { "MessageStream", end(EndMode::MESSAGE_STREAM, C), end(DROP_IN, S), SOCKET, PLAIN },
    { "Tcp", end(DROP_IN, C), end(DROP_IN, S), StreamKind::TCP, PLAIN },
    { "InProcess", end(DROP_IN, C), end(DROP_IN, S), StreamKind::IN_PROCESS, PLAIN },
    { "Proxy", end(DROP_IN, C), end(DROP_IN, S), StreamKind::PROXY, PLAIN },
  };
}

}  // namespace

const std::vector<Mode>& allModes() {
  static const std::vector<Mode> modes = makeModes();
  return modes;
}

std::vector<Mode> socketModes() {
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    if (mode.stream == StreamKind::SOCKET) result.push_back(mode);
  }
  return result;
}

// =======================================================================================

Network::Network(const EndMode& mode, kj::UnixEventPort& port, kj::AsyncIoStream& stream,
                 const LinkOptions& options) {
  auto asCapStream = [&]() -> kj::AsyncCapabilityStream& {
    return kj::downcast<kj::AsyncCapabilityStream>(stream);
  };
  auto maxFds = options.maxFds;
  switch (mode.kind) {
    case EndMode::TWO_PARTY:
      twoParty = maxFds == 0
          ? kj::heap<capnp::TwoPartyVatNetwork>(stream, mode.side, options.reader, options.clock)
          : kj::heap<capnp::TwoPartyVatNetwork>(
                asCapStream(), maxFds, mode.side, options.reader, options.clock);
      break;

    case EndMode::DROP_IN:
      shared = maxFds == 0
          ? kj::heap<SharedMemoryVatNetwork>(stream, mode.side, options.reader, options.clock)
          : kj::heap<SharedMemoryVatNetwork>(
                asCapStream(), maxFds, mode.side, options.reader, options.clock);
      break;

    case EndMode::CONTEXT: {
      SharedMemoryContext context;
      if (mode.port) context.port = &port;
      context.options.trustPeer = mode.trust;
      context.options.plainCalls = mode.plainCalls();
      if (mode.sealed) context.options.sealedThresholdBytes = 16 * 1024;
      if (!mode.spins) context.options.spinMicroseconds = 0;
      if (mode.small) {
        context.options.firstRegionBytes = 16 * 1024;
        context.options.maxBytes = 64 * 1024;
      } else if (options.maxBytes != 0) {
        context.options.maxBytes = options.maxBytes;
      }
      shared = maxFds == 0
          ? kj::heap<SharedMemoryVatNetwork>(
                context, stream, mode.side, options.reader, options.clock)
          : kj::heap<SharedMemoryVatNetwork>(
                context, asCapStream(), maxFds, mode.side, options.reader, options.clock);
      break;
    }

    case EndMode::MESSAGE_STREAM:
      if (maxFds == 0) {
        messages = kj::heap<capnp::AsyncIoMessageStream>(stream);
        shared = kj::heap<SharedMemoryVatNetwork>(
            *messages, mode.side, options.reader, options.clock);
      } else {
        messages = kj::heap<capnp::AsyncCapabilityMessageStream>(asCapStream());
        shared = kj::heap<SharedMemoryVatNetwork>(
            *messages, maxFds, mode.side, options.reader, options.clock);
      }
      break;
  }
}

capnp::TwoPartyVatNetworkBase& Network::get() {
  if (shared.get() != nullptr) return *shared;
  return *twoParty;
}

kj::Promise<void> Network::onDisconnect() {
  return shared.get() != nullptr ? shared->onDisconnect() : twoParty->onDisconnect();
}

size_t Network::getCurrentQueueSize() {
  return shared.get() != nullptr ? shared->getCurrentQueueSize()
                                 : twoParty->getCurrentQueueSize();
}

size_t Network::getCurrentQueueCount() {
  return shared.get() != nullptr ? shared->getCurrentQueueCount()
                                 : twoParty->getCurrentQueueCount();
}

kj::Duration Network::getOutgoingMessageWaitTime() {
  return shared.get() != nullptr ? shared->getOutgoingMessageWaitTime()
                                 : twoParty->getOutgoingMessageWaitTime();
}

kj::Maybe<SharedMemoryStats> Network::getStats() {
  if (shared.get() == nullptr) return nullptr;
  return shared->getStats();
}

// =======================================================================================

End::End(const EndMode& mode, kj::UnixEventPort& port, kj::Own<kj::AsyncIoStream> streamParam,
         const LinkOptions& options)
    : mode(mode), stream(kj::mv(streamParam)), network(mode, port, *stream, options) {}

End::~End() noexcept(false) {}

void End::start(kj::Maybe<capnp::Capability::Client> bootstrap) {
  rpc.emplace(network.get(), kj::mv(bootstrap));
}

void End::start(capnp::BootstrapFactory<VatId>& factory) {
  rpc = capnp::makeRpcServer(network.get(), factory);
}

namespace {

void setPeer(capnp::MallocMessageBuilder& message, Side mine) {
  message.initRoot<VatId>().setSide(mine == Side::CLIENT ? Side::SERVER : Side::CLIENT);
}

}  // namespace

capnp::Capability::Client End::bootstrap() {
  capnp::MallocMessageBuilder message;
  setPeer(message, mode.side);
  return KJ_ASSERT_NONNULL(rpc).bootstrap(message.getRoot<VatId>());
}

kj::Own<capnp::TwoPartyVatNetworkBase::Connection> End::connect() {
  capnp::MallocMessageBuilder message;
  setPeer(message, mode.side);
  return KJ_ASSERT_NONNULL(network.get().connect(message.getRoot<VatId>()));
}

void End::expectTransport(Transport expected) {
  if (checked) return;
  checked = true;
  KJ_IF_MAYBE(stats, network.getStats()) {
    for (auto direction: { &stats->outgoing, &stats->incoming }) {
      EXPECT_EQ(int(expected), int(direction->transport))
          << (mode.side == Side::CLIENT ? "client, " : "server, ")
          << (direction == &stats->outgoing ? "outgoing: " : "incoming: ")
          << direction->plainReason.cStr();
      EXPECT_EQ(expected == Transport::PLAIN, direction->plainReason.size() > 0);
      EXPECT_EQ(0, direction->socketMessageBytesAfterSwitch);
    }
  }
}

// =======================================================================================

StreamPair::StreamPair(const Mode& mode, kj::AsyncIoContext& io, bool withFds) {
  switch (mode.stream) {
    case StreamKind::SOCKET: {
      auto pipe = io.provider->newCapabilityPipe();
      for (uint i = 0; i < 2; i++) ends[i] = kj::mv(pipe.ends[i]);
      break;
    }
    case StreamKind::TCP: {
      auto& network = io.provider->getNetwork();
      auto listener = network.parseAddress("127.0.0.1").wait(io.waitScope)->listen();
      auto accepted = listener->accept();
      ends[0] = network.parseAddress("127.0.0.1", listener->getPort()).wait(io.waitScope)
          ->connect().wait(io.waitScope);
      ends[1] = accepted.wait(io.waitScope);
      break;
    }
    case StreamKind::IN_PROCESS:
      if (withFds) {
        auto pipe = kj::newCapabilityPipe();
        for (uint i = 0; i < 2; i++) ends[i] = kj::mv(pipe.ends[i]);
      } else {
        auto pipe = kj::newTwoWayPipe();
        for (uint i = 0; i < 2; i++) ends[i] = kj::mv(pipe.ends[i]);
      }
      break;
    case StreamKind::PROXY: {
      auto front = io.provider->newCapabilityPipe();
      auto back = io.provider->newCapabilityPipe();
      ends[0] = kj::mv(front.ends[0]);
      ends[1] = kj::mv(back.ends[1]);
      proxyEnds[0] = kj::mv(front.ends[1]);
      proxyEnds[1] = kj::mv(back.ends[0]);
      for (uint i = 0; i < 2; i++) {
        auto& to = *proxyEnds[1 - i];
        // A reset is an end too: of a side that left without having read everything.
        pumps.add(proxyEnds[i]->pumpTo(to).ignoreResult().catch_([](kj::Exception&&) {})
            .then([&to]() { to.shutdownWrite(); }).eagerlyEvaluate([](kj::Exception&&) {}));
      }
      break;
    }
  }
}

Link::Link(const Mode& mode, kj::AsyncIoContext& io, const LinkOptions& options)
    : mode(mode), io(io), streams(mode, io, options.maxFds > 0),
      client(kj::heap<End>(
          mode.client, io.unixEventPort, kj::mv(streams.ends[0]), options)),
      server(kj::heap<End>(
          mode.server, io.unixEventPort, kj::mv(streams.ends[1]), options)) {}

Link::~Link() noexcept(false) { check(); }

void Link::check() {
  kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
  if (client.get() != nullptr) client->expectTransport(mode.expected);
  if (server.get() != nullptr) server->expectTransport(mode.expected);
}

void Link::start(kj::Maybe<capnp::Capability::Client> serverBootstrap,
                 kj::Maybe<capnp::Capability::Client> clientBootstrap) {
  server->start(kj::mv(serverBootstrap));
  client->start(kj::mv(clientBootstrap));
  startServer();
}

void Link::startServer() {
  if (mode.server.side == Side::CLIENT) server->bootstrap();
}

void Link::destroyClient() {
  check();
  client = nullptr;
}

void Link::destroyServer() {
  check();
  server = nullptr;
}

kj::Own<Link> Conformance::connect(kj::Maybe<capnp::Capability::Client> serverBootstrap,
    LinkOptions options, kj::Maybe<capnp::Capability::Client> clientBootstrap) {
  auto result = kj::heap<Link>(GetParam(), io, options);
  result->start(kj::mv(serverBootstrap), kj::mv(clientBootstrap));
  return result;
}

// =======================================================================================

ThreadedConformance::ServerThread::ServerThread(
    const Mode& mode, kj::AsyncIoContext& io, const LinkOptions& options,
    kj::Function<capnp::Capability::Client(kj::AsyncIoContext&)> makeBootstrap) {
  int fds[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
  constexpr uint TAKE = kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP |
      kj::LowLevelAsyncIoProvider::ALREADY_CLOEXEC;
  client = kj::heap<End>(
      mode.client, io.unixEventPort, io.lowLevelProvider->wrapUnixSocketFd(fds[0], TAKE), options);
  thread = kj::heap<kj::Thread>([fd = fds[1], &mode, options,
                                 makeBootstrap = kj::mv(makeBootstrap)]() mutable {
    auto io = kj::setupAsyncIo();
    End server(mode.server, io.unixEventPort,
        io.lowLevelProvider->wrapUnixSocketFd(fd, TAKE), options);
    server.start(makeBootstrap(io));
    if (mode.server.side == Side::CLIENT) server.bootstrap();
    server.network.onDisconnect().wait(io.waitScope);
    server.expectTransport(mode.expected);
  });
}

ThreadedConformance::ServerThread::~ServerThread() noexcept(false) {
  client = nullptr;  // Or the thread would not end.
}

kj::Own<ThreadedConformance::ServerThread> ThreadedConformance::connectThread(
    ServerState& state, LinkOptions options) {
  auto result = kj::heap<ServerThread>(GetParam(), io, options,
      [&state](kj::AsyncIoContext&) -> capnp::Capability::Client {
    return kj::heap<RootImpl>(state);
  });
  result->client->start(nullptr);
  return result;
}

}  // namespace conformance
}  // namespace capnpshm
