// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "rpc-shm.h"

#include "connection.h"
#include "refused-connection.h"
#include <sys/socket.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::rpc::twoparty::Side;
using Connection = capnp::TwoPartyVatNetworkBase::Connection;

namespace {

constexpr uint MIN_CONTROL_MESSAGES = 64;

const SharedMemoryContext& check(const SharedMemoryContext& context) {
  KJ_REQUIRE(context.options.maxBytes >= context.options.firstRegionBytes,
      "SharedMemoryOptions::maxBytes must be at least firstRegionBytes",
      context.options.maxBytes, context.options.firstRegionBytes);
  KJ_REQUIRE(context.options.peerLimits.controlMessages >= MIN_CONTROL_MESSAGES,
      "PeerLimits::controlMessages must be large enough for an honest peer",
      context.options.peerLimits.controlMessages, MIN_CONTROL_MESSAGES);
  return context;
}

struct Suitability {
  kj::Maybe<kj::AsyncCapabilityStream&> stream;
  kj::StringPtr plainReason;
};

Suitability examine(kj::AsyncIoStream& stream) {
  // Whether shared memory could be offered over a stream, at the price of a system call.
  int domain = 0;
  KJ_IF_MAYBE(cap, kj::dynamicDowncastIfAvailable<kj::AsyncCapabilityStream>(stream)) {
    if (stream.getFd() == nullptr) return { nullptr, "the stream has no file descriptor" };
    uint length = sizeof(domain);
    stream.getsockopt(SOL_SOCKET, SO_DOMAIN, &domain, &length);
    // (Of another type it would be no stream that Cap'n Proto could use.)
    if (domain != AF_UNIX) {
      return { nullptr, "the stream is not a Unix stream socket" };
    }
    return { *cap, "" };
  }
  return { nullptr, "the stream cannot pass file descriptors" };
}

}  // namespace

class SharedMemoryVatNetwork::Impl {
  // If it is known at once that the connection is plain, a TwoPartyVatNetwork, or a connection that
  // fails if plain is not wanted; else a SharedMemoryConnection.

public:
  template <typename Stream, typename... Params>
  Impl(const SharedMemoryContext& context, kj::StringPtr plainReason, Side side, Stream& stream,
       Params&&... params)
      : side(side), plainReason(kj::str(plainReason)) {
    if (context.options.requireSharedMemory) {
      // Not thrown here: a server's listen() must not end because of one such connection.
      refused = kj::heap<RefusedConnection>(
          KJ_EXCEPTION(FAILED, "shared memory is required, but cannot be used", plainReason),
          side == Side::CLIENT ? Side::SERVER : Side::CLIENT);
      initDisconnect();
    } else {
      plain = kj::heap<capnp::TwoPartyVatNetwork>(stream, kj::fwd<Params>(params)...);
    }
  }

  Impl(const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream,
       uint maxFdsPerMessage, Side side, capnp::ReaderOptions receiveOptions,
       const kj::MonotonicClock& clock)
      : side(side),
        shared(kj::heap<SharedMemoryConnection>(
            context, stream, maxFdsPerMessage, side, receiveOptions, clock)) {
    initDisconnect();
    disconnectFulfiller.connection = *KJ_ASSERT_NONNULL(shared);
  }

  Side side;
  kj::String plainReason;
  kj::Maybe<kj::Own<capnp::TwoPartyVatNetwork>> plain;
  kj::Maybe<kj::Own<RefusedConnection>> refused;
  kj::Maybe<kj::Own<SharedMemoryConnection>> shared;
  bool accepted = false;
  kj::Own<kj::PromiseFulfiller<kj::Own<Connection>>> acceptFulfiller;
  // Of a promise that never resolves, because there is only one connection.

  kj::ForkedPromise<void> disconnectPromise = nullptr;

  class FulfillerDisposer: public kj::Disposer {
    // Disposes Own<Connection>s: when the last is dropped, the connection has ended.

  public:
    mutable kj::Own<kj::PromiseFulfiller<void>> fulfiller;
    mutable uint refcount = 0;
    mutable kj::Maybe<SharedMemoryConnection&> connection;

    void disposeImpl(void*) const override {
      if (--refcount == 0) {
        fulfiller->fulfill();
        KJ_IF_MAYBE(c, connection) c->dropped();
      }
    }
  };
  FulfillerDisposer disconnectFulfiller;

  void initDisconnect() {
    auto paf = kj::newPromiseAndFulfiller<void>();
    disconnectPromise = paf.promise.fork();
    disconnectFulfiller.fulfiller = kj::mv(paf.fulfiller);
  }

  kj::Own<Connection> asConnection() {
    ++disconnectFulfiller.refcount;
    KJ_IF_MAYBE(r, refused) return kj::Own<Connection>(r->get(), disconnectFulfiller);
    auto& connection = *KJ_ASSERT_NONNULL(shared);
    if (side == Side::CLIENT) connection.offer();
    return kj::Own<Connection>(&connection, disconnectFulfiller);
  }
};

// =======================================================================================

SharedMemoryVatNetwork::SharedMemoryVatNetwork(const SharedMemoryContext& context,
    capnp::MessageStream& msgStream, uint maxFdsPerMessage, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : impl(kj::heap<Impl>(check(context), "the connection was made from a MessageStream", side,
        msgStream, maxFdsPerMessage, side, receiveOptions, clock)) {}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(const SharedMemoryContext& context,
    capnp::MessageStream& msgStream, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : SharedMemoryVatNetwork(context, msgStream, 0, side, receiveOptions, clock) {}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(const SharedMemoryContext& context,
    kj::AsyncIoStream& stream, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock) {
  auto suitability = examine(stream);
  KJ_IF_MAYBE(s, suitability.stream) {
    impl = kj::heap<Impl>(check(context), *s, 0u, side, receiveOptions, clock);
  } else {
    impl = kj::heap<Impl>(check(context), suitability.plainReason, side,
        stream, side, receiveOptions, clock);
  }
}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(const SharedMemoryContext& context,
    kj::AsyncCapabilityStream& stream, uint maxFdsPerMessage, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock) {
  auto suitability = examine(stream);
  KJ_IF_MAYBE(s, suitability.stream) {
    impl = kj::heap<Impl>(check(context), *s, maxFdsPerMessage, side, receiveOptions, clock);
  } else {
    impl = kj::heap<Impl>(check(context), suitability.plainReason, side,
        stream, maxFdsPerMessage, side, receiveOptions, clock);
  }
}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(capnp::MessageStream& msgStream, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : SharedMemoryVatNetwork(
          SharedMemoryContext(), msgStream, side, receiveOptions, clock) {}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(capnp::MessageStream& msgStream,
    uint maxFdsPerMessage, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : SharedMemoryVatNetwork(
          SharedMemoryContext(), msgStream, maxFdsPerMessage, side, receiveOptions, clock) {}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(kj::AsyncIoStream& stream, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : SharedMemoryVatNetwork(SharedMemoryContext(), stream, side, receiveOptions, clock) {}

SharedMemoryVatNetwork::SharedMemoryVatNetwork(kj::AsyncCapabilityStream& stream,
    uint maxFdsPerMessage, Side side,
    capnp::ReaderOptions receiveOptions, const kj::MonotonicClock& clock)
    : SharedMemoryVatNetwork(
          SharedMemoryContext(), stream, maxFdsPerMessage, side, receiveOptions, clock) {}

SharedMemoryVatNetwork::~SharedMemoryVatNetwork() noexcept(false) {}

kj::Promise<void> SharedMemoryVatNetwork::onDisconnect() {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->onDisconnect();
  return impl->disconnectPromise.addBranch();
}

Side SharedMemoryVatNetwork::getSide() { return impl->side; }

size_t SharedMemoryVatNetwork::getCurrentQueueSize() {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->getCurrentQueueSize();
  KJ_IF_MAYBE(s, impl->shared) return (*s)->getCurrentQueueSize();
  return 0;
}

size_t SharedMemoryVatNetwork::getCurrentQueueCount() {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->getCurrentQueueCount();
  KJ_IF_MAYBE(s, impl->shared) return (*s)->getCurrentQueueCount();
  return 0;
}

kj::Duration SharedMemoryVatNetwork::getOutgoingMessageWaitTime() {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->getOutgoingMessageWaitTime();
  KJ_IF_MAYBE(s, impl->shared) return (*s)->getOutgoingMessageWaitTime();
  return 0 * kj::SECONDS;
}

SharedMemoryStats SharedMemoryVatNetwork::getStats() {
  KJ_IF_MAYBE(s, impl->shared) return (*s)->getStats();
  SharedMemoryStats result;
  for (auto direction: { &result.outgoing, &result.incoming }) {
    direction->transport = Transport::PLAIN;
    direction->plainReason = kj::str(impl->plainReason);
  }
  return result;
}

kj::Maybe<kj::Own<Connection>> SharedMemoryVatNetwork::connect(
    capnp::rpc::twoparty::VatId::Reader ref) {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->connect(ref);
  if (ref.getSide() == impl->side) return nullptr;
  return impl->asConnection();
}

kj::Promise<kj::Own<Connection>> SharedMemoryVatNetwork::accept() {
  KJ_IF_MAYBE(p, impl->plain) return (*p)->accept();
  if (impl->side == Side::SERVER && !impl->accepted) {
    impl->accepted = true;
    return impl->asConnection();
  }
  auto paf = kj::newPromiseAndFulfiller<kj::Own<Connection>>();
  impl->acceptFulfiller = kj::mv(paf.fulfiller);
  return kj::mv(paf.promise);
}

// =======================================================================================

SharedMemoryServer::SharedMemoryServer(const SharedMemoryContext& context,
    capnp::Capability::Client bootstrapInterface,
    kj::Maybe<kj::Function<kj::String(const kj::Exception&)>> traceEncoder)
    : context(check(context)), bootstrapInterface(kj::mv(bootstrapInterface)),
      traceEncoder(kj::mv(traceEncoder)), tasks(*this) {}

SharedMemoryServer::SharedMemoryServer(capnp::Capability::Client bootstrapInterface,
    kj::Maybe<kj::Function<kj::String(const kj::Exception&)>> traceEncoder)
    : SharedMemoryServer(SharedMemoryContext(), kj::mv(bootstrapInterface),
                         kj::mv(traceEncoder)) {}

SharedMemoryServer::~SharedMemoryServer() noexcept(false) {}

struct SharedMemoryServer::AcceptedConnection {
  kj::Own<kj::AsyncIoStream> connection;
  SharedMemoryVatNetwork network;
  capnp::RpcSystem<capnp::rpc::twoparty::VatId> rpcSystem;

  AcceptedConnection(SharedMemoryServer& parent, kj::Own<kj::AsyncIoStream>&& connectionParam)
      : connection(kj::mv(connectionParam)),
        network(parent.context, *connection, Side::SERVER),
        rpcSystem(capnp::makeRpcServer(network, kj::cp(parent.bootstrapInterface))) {
    init(parent);
  }

  AcceptedConnection(SharedMemoryServer& parent,
      kj::Own<kj::AsyncCapabilityStream>&& connectionParam, uint maxFdsPerMessage)
      : connection(kj::mv(connectionParam)),
        network(parent.context, kj::downcast<kj::AsyncCapabilityStream>(*connection),
            maxFdsPerMessage, Side::SERVER),
        rpcSystem(capnp::makeRpcServer(network, kj::cp(parent.bootstrapInterface))) {
    init(parent);
  }

  void init(SharedMemoryServer& parent) {
    KJ_IF_MAYBE(encoder, parent.traceEncoder) {
      rpcSystem.setTraceEncoder([&encoder = *encoder](const kj::Exception& exception) {
        return encoder(exception);
      });
    }
  }
};

void SharedMemoryServer::accept(kj::Own<kj::AsyncIoStream>&& connection) {
  auto state = kj::heap<AcceptedConnection>(*this, kj::mv(connection));
  auto promise = state->network.onDisconnect();
  tasks.add(promise.attach(kj::mv(state)));
}

void SharedMemoryServer::accept(
    kj::Own<kj::AsyncCapabilityStream>&& connection, uint maxFdsPerMessage) {
  auto state = kj::heap<AcceptedConnection>(*this, kj::mv(connection), maxFdsPerMessage);
  auto promise = state->network.onDisconnect();
  tasks.add(promise.attach(kj::mv(state)));
}

kj::Promise<void> SharedMemoryServer::accept(kj::AsyncIoStream& connection) {
  auto state = kj::heap<AcceptedConnection>(*this,
      kj::Own<kj::AsyncIoStream>(&connection, kj::NullDisposer::instance));
  auto promise = state->network.onDisconnect();
  return promise.attach(kj::mv(state));
}

kj::Promise<void> SharedMemoryServer::accept(
    kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage) {
  auto state = kj::heap<AcceptedConnection>(*this,
      kj::Own<kj::AsyncCapabilityStream>(&connection, kj::NullDisposer::instance),
      maxFdsPerMessage);
  auto promise = state->network.onDisconnect();
  return promise.attach(kj::mv(state));
}

kj::Promise<void> SharedMemoryServer::listen(kj::ConnectionReceiver& listener) {
  return listener.accept().then([this, &listener](kj::Own<kj::AsyncIoStream>&& connection) {
    accept(kj::mv(connection));
    return listen(listener);
  });
}

kj::Promise<void> SharedMemoryServer::listenCapStreamReceiver(
    kj::ConnectionReceiver& listener, uint maxFdsPerMessage) {
  return listener.accept().then(
      [this, &listener, maxFdsPerMessage](kj::Own<kj::AsyncIoStream>&& connection) {
    accept(connection.downcast<kj::AsyncCapabilityStream>(), maxFdsPerMessage);
    return listenCapStreamReceiver(listener, maxFdsPerMessage);
  });
}

void SharedMemoryServer::taskFailed(kj::Exception&& exception) {
  KJ_LOG(ERROR, exception);
}

// =======================================================================================

SharedMemoryClient::SharedMemoryClient(kj::AsyncIoStream& connection)
    : SharedMemoryClient(SharedMemoryContext(), connection) {}

SharedMemoryClient::SharedMemoryClient(
    kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage)
    : SharedMemoryClient(SharedMemoryContext(), connection, maxFdsPerMessage) {}

SharedMemoryClient::SharedMemoryClient(kj::AsyncIoStream& connection,
    capnp::Capability::Client bootstrapInterface, Side side)
    : SharedMemoryClient(
          SharedMemoryContext(), connection, kj::mv(bootstrapInterface), side) {}

SharedMemoryClient::SharedMemoryClient(kj::AsyncCapabilityStream& connection,
    uint maxFdsPerMessage, capnp::Capability::Client bootstrapInterface, Side side)
    : SharedMemoryClient(SharedMemoryContext(), connection, maxFdsPerMessage,
                         kj::mv(bootstrapInterface), side) {}

SharedMemoryClient::SharedMemoryClient(
    const SharedMemoryContext& context, kj::AsyncIoStream& connection)
    : network(context, connection, Side::CLIENT),
      rpcSystem(capnp::makeRpcClient(network)) {}

SharedMemoryClient::SharedMemoryClient(const SharedMemoryContext& context,
    kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage)
    : network(context, connection, maxFdsPerMessage, Side::CLIENT),
      rpcSystem(capnp::makeRpcClient(network)) {}

SharedMemoryClient::SharedMemoryClient(const SharedMemoryContext& context,
    kj::AsyncIoStream& connection, capnp::Capability::Client bootstrapInterface, Side side)
    : network(context, connection, side),
      rpcSystem(network, bootstrapInterface) {}

SharedMemoryClient::SharedMemoryClient(const SharedMemoryContext& context,
    kj::AsyncCapabilityStream& connection, uint maxFdsPerMessage,
    capnp::Capability::Client bootstrapInterface, Side side)
    : network(context, connection, maxFdsPerMessage, side),
      rpcSystem(network, bootstrapInterface) {}

capnp::Capability::Client SharedMemoryClient::bootstrap() {
  capnp::word scratch[4];
  memset(&scratch, 0, sizeof(scratch));
  capnp::MallocMessageBuilder message(scratch);
  auto vatId = message.getRoot<capnp::rpc::twoparty::VatId>();
  vatId.setSide(network.getSide() == Side::CLIENT ? Side::SERVER : Side::CLIENT);
  return rpcSystem.bootstrap(vatId);
}

void SharedMemoryClient::setTraceEncoder(
    kj::Function<kj::String(const kj::Exception&)> func) {
  rpcSystem.setTraceEncoder(kj::mv(func));
}

}  // namespace capnpshm
