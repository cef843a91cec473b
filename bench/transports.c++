// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "transports.h"

#include "in-process-network.h"
#include <capnp/rpc-twoparty.h>
#include <kj/debug.h>

namespace capnpshm {
namespace bench {

namespace {

using capnp::rpc::twoparty::Side;
using capnp::rpc::twoparty::VatId;

constexpr uint SPIN_MICROSECONDS = 50;

constexpr size_t SEALED_THRESHOLD = 16 * 1024;
// So low that it is seen where sealing does not pay.

const TransportSpec TRANSPORTS[] = {
  { "twoparty", TransportSpec::TWO_PARTY },
  { "default", TransportSpec::CONTEXT },
  { "plain-ctor", TransportSpec::DROP_IN },
  { "copy-spin", TransportSpec::CONTEXT, false, SPIN_MICROSECONDS },
  { "copy-nospin", TransportSpec::CONTEXT, false, 0u },
  { "inplace-spin", TransportSpec::CONTEXT, true, SPIN_MICROSECONDS },
  { "inplace-nospin", TransportSpec::CONTEXT, true, 0u },
  { "sealed", TransportSpec::CONTEXT, false, nullptr, SEALED_THRESHOLD },
  { "in-process", TransportSpec::IN_PROCESS },
  { "cache-line", TransportSpec::RAW },
  { "eventfd", TransportSpec::RAW },
  { "socket", TransportSpec::RAW },
  { "memcpy", TransportSpec::RAW },
  { "memset", TransportSpec::RAW },
  { "handover", TransportSpec::RAW },
  { "handover-turns", TransportSpec::RAW },
  { "work", TransportSpec::RAW },
  { "work-peer", TransportSpec::RAW },
  { "grpc", TransportSpec::PEER },
  { "zeromq", TransportSpec::PEER },
};

capnp::ReaderOptions readerOptions() {
  // The largest payloads are above the default limit, which protects a receiver that has less to
  // do than to measure.
  capnp::ReaderOptions result;
  result.traversalLimitInWords = uint64_t(1) << 40;
  return result;
}

kj::Maybe<SharedMemoryStats> statsOf(capnp::TwoPartyVatNetwork&) { return nullptr; }
kj::Maybe<SharedMemoryStats> statsOf(SharedMemoryVatNetwork& network) { return network.getStats(); }

template <typename Network>
class NetworkLink final: public Link {
public:
  template <typename... Context>
  NetworkLink(kj::Own<kj::AsyncIoStream> stream, Side side,
              kj::Maybe<capnp::Capability::Client> ownBootstrap, Context&&... context)
      : stream(kj::mv(stream)), network(context..., *this->stream, side, readerOptions()),
        rpcSystem(capnp::makeRpcServer(
            network, orNothing(kj::mv(ownBootstrap)))) {
    peer.initRoot<VatId>().setSide(side == Side::CLIENT ? Side::SERVER : Side::CLIENT);
  }

  capnp::Capability::Client bootstrap() override {
    return rpcSystem.bootstrap(peer.getRoot<VatId>());
  }
  kj::Promise<void> onDisconnect() override { return network.onDisconnect(); }
  kj::Maybe<SharedMemoryStats> getStats() override { return statsOf(network); }

private:
  kj::Own<kj::AsyncIoStream> stream;
  Network network;
  capnp::RpcSystem<VatId> rpcSystem;
  capnp::MallocMessageBuilder peer;

  static capnp::Capability::Client orNothing(kj::Maybe<capnp::Capability::Client> bootstrap) {
    KJ_IF_MAYBE(b, bootstrap) return kj::mv(*b);
    return nullptr;
  }
};

class InProcessLink final: public Link {
public:
  explicit InProcessLink(capnp::Capability::Client serverBootstrap)
      : clientNetwork(InProcessNetwork::newClient()), serverNetwork(clientNetwork->newServer()),
        server(capnp::makeRpcServer(*serverNetwork, kj::mv(serverBootstrap))),
        client(capnp::makeRpcClient(*clientNetwork)) {}

  capnp::Capability::Client bootstrap() override {
    capnp::MallocMessageBuilder peer;
    peer.initRoot<VatId>().setSide(Side::SERVER);
    return client.bootstrap(peer.getRoot<VatId>());
  }
  kj::Promise<void> onDisconnect() override { return kj::NEVER_DONE; }

private:
  kj::Own<InProcessNetwork> clientNetwork;
  kj::Own<InProcessNetwork> serverNetwork;
  capnp::RpcSystem<VatId> server;
  capnp::RpcSystem<VatId> client;
};

kj::Own<Link> newLink(const TransportSpec& transport, kj::AsyncIoContext& io,
                      kj::Own<kj::AsyncIoStream> stream, Side side,
                      kj::Maybe<capnp::Capability::Client> bootstrap) {
  switch (transport.kind) {
    case TransportSpec::TWO_PARTY:
      return kj::heap<NetworkLink<capnp::TwoPartyVatNetwork>>(
          kj::mv(stream), side, kj::mv(bootstrap));
    case TransportSpec::DROP_IN:
      return kj::heap<NetworkLink<SharedMemoryVatNetwork>>(
          kj::mv(stream), side, kj::mv(bootstrap));
    case TransportSpec::CONTEXT: {
      SharedMemoryContext context;
      context.port = &io.unixEventPort;
      context.options.trustPeer = transport.trustPeer;
      context.options.sealedThresholdBytes = transport.sealedThresholdBytes;
      // Without limit, or it would be measured how the limit is reached.
      context.options.sealedHeldBytes = kj::maxValue;
      context.options.sealedTotalBytes = kj::maxValue;
      KJ_IF_MAYBE(spin, transport.spinMicroseconds) context.options.spinMicroseconds = *spin;
      return kj::heap<NetworkLink<SharedMemoryVatNetwork>>(
          kj::mv(stream), side, kj::mv(bootstrap), context);
    }
    default: break;
  }
  KJ_FAIL_REQUIRE("not a transport between two processes", transport.name);
}

}  // namespace

const TransportSpec& findTransport(kj::StringPtr name) {
  for (auto& transport: TRANSPORTS) {
    if (transport.name == name) return transport;
  }
  KJ_FAIL_REQUIRE("there is no such transport", name);
}

kj::Own<Link> newClientLink(const TransportSpec& transport, kj::AsyncIoContext& io,
                            kj::Own<kj::AsyncIoStream> stream) {
  return newLink(transport, io, kj::mv(stream), Side::CLIENT, nullptr);
}

kj::Own<Link> newServerLink(const TransportSpec& transport, kj::AsyncIoContext& io,
                            kj::Own<kj::AsyncIoStream> stream,
                            capnp::Capability::Client bootstrap) {
  return newLink(transport, io, kj::mv(stream), Side::SERVER, kj::mv(bootstrap));
}

kj::Own<Link> newInProcessLink(capnp::Capability::Client bootstrap) {
  return kj::heap<InProcessLink>(kj::mv(bootstrap));
}

}  // namespace bench
}  // namespace capnpshm
