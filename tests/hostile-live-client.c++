// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "handover.h"
#include "tamper.h"

#include <unistd.h>
#include <kj/debug.h>

// Attacks by a real client, whose shared memory another thread rewrites meanwhile.

namespace capnpshm {
namespace hostile {

namespace {

using conformance::ItemImpl;
using conformance::Root;
using conformance::ServerState;
using Connection = capnp::TwoPartyVatNetworkBase::Connection;

class HeapConnection final: public Connection {
  // Builds no message in shared memory, so that whoever rewrites that cannot harm the builder:
  // messages made on a foreign thread are built on the heap, and copied when they are sent.

public:
  explicit HeapConnection(kj::Own<Connection> inner): inner(kj::mv(inner)) {}

  kj::Own<capnp::OutgoingRpcMessage> newOutgoingMessage(uint firstSegmentWordSize) override {
    kj::Own<capnp::OutgoingRpcMessage> result;
    std::thread([&]() { result = inner->newOutgoingMessage(firstSegmentWordSize); }).join();
    return result;
  }

  kj::Own<capnp::RpcFlowController> newStream() override { return inner->newStream(); }
  capnp::rpc::twoparty::VatId::Reader getPeerVatId() override { return inner->getPeerVatId(); }
  kj::Promise<void> shutdown() override { return inner->shutdown(); }
  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> receiveIncomingMessage() override {
    return inner->receiveIncomingMessage();
  }

private:
  kj::Own<Connection> inner;
};

class HeapNetwork final: public SharedMemoryVatNetwork {
public:
  HeapNetwork(const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream)
      : SharedMemoryVatNetwork(context, stream, 2, process::Side::CLIENT) {}

  kj::Maybe<kj::Own<Connection>> connect(capnp::rpc::twoparty::VatId::Reader ref) override {
    return SharedMemoryVatNetwork::connect(ref).map(
        [](kj::Own<Connection>&& inner) -> kj::Own<Connection> {
      return kj::heap<HeapConnection>(kj::mv(inner));
    });
  }
};

class Caller {
  // Makes calls of all kinds. What comes back may be nonsense, as what was sent was.

public:
  Caller(LiveContext& context, Attack attack)
      : io(context.io), random(context.seed), attack(attack), complaint(context.complaint),
        stream(process::wrapSocket(
            io, process::handOverNewPair(context.handover, uint(attack)))),
        network(sharedMemory(context), *stream),
        rpc(capnp::makeRpcClient(network)) {
    capnp::MallocMessageBuilder message;
    auto vat = message.initRoot<conformance::VatId>();
    vat.setSide(process::Side::SERVER);
    root = rpc.bootstrap(vat).castAs<Root>();
  }

  void run(uint milliseconds) {
    auto& timer = io.provider->getTimer();
    auto end = timer.now() + milliseconds * kj::MILLISECONDS;
    auto timeout = [&]() -> kj::Promise<void> {
      // Whoever has broken the connection need not hear of it.
      if (attack != Attack::STAMPS_AS_PAYLOAD) return timer.atTime(end + 200 * kj::MILLISECONDS);
      return timer.afterDelay(100 * kj::SECONDS).then([this]() {
        complaint = kj::str("calls with stamps as payload are not answered");
      });
    };
    while (timer.now() < end && !broken) {
      kj::Vector<kj::Promise<void>> calls;
      for (uint i = 1 + random() % 8; i > 0; i--) {
        calls.add(call().catch_([this](kj::Exception&& exception) {
          broken = broken || exception.getType() == kj::Exception::Type::DISCONNECTED;
          if (attack == Attack::STAMPS_AS_PAYLOAD) complaint = kj::str(exception);
        }));
      }
      kj::joinPromises(calls.releaseAsArray()).exclusiveJoin(timeout()).wait(io.waitScope);
    }
    if (random() % 2 == 0) return;
    // Hangs up without a word.
    stream->shutdownWrite();
  }

private:
  kj::AsyncIoContext& io;
  std::mt19937_64 random;
  Attack attack;
  kj::Maybe<kj::String>& complaint;
  bool broken = false;
  ServerState mine;
  kj::Own<kj::AsyncCapabilityStream> stream;
  HeapNetwork network;
  capnp::RpcSystem<conformance::VatId> rpc;
  Root::Client root = nullptr;

  SharedMemoryContext sharedMemory(LiveContext& context) {
    SharedMemoryContext result;
    result.port = &io.unixEventPort;
    result.options = context.mode.options;
    // With a free ring and without; with much room, and with so little that messages go in parts.
    result.options.trustPeer = attack == Attack::FREES || random() % 2 == 0;
    if (random() % 3 == 0) result.options.maxBytes = 48 * 1024;
    return result;
  }

  size_t size() { return random() % 8 == 0 ? random() % 60000 : random() % 1500; }

  kj::Promise<void> call() {
    switch (random() % 8) {
      case 0: {
        auto request = root.addRequest();
        request.setA(random());
        return request.send().ignoreResult();
      }
      case 1: {
        auto request = root.makeRequest();
        request.setName("a name");
        return request.send().getItem().nameRequest().send().ignoreResult();
      }
      case 2: {
        auto request = root.visitRequest();
        request.setItem(kj::heap<ItemImpl>(mine, "mine"));
        request.setCount(random() % 4);
        return request.send().ignoreResult();
      }
      case 3: {
        // Many segments, so that there is a table of them.
        auto request = root.partsRequest();
        auto parts = request.initParts(1 + random() % 60);
        for (uint i = 0; i < parts.size(); i++) parts.init(i, random() % 500);
        return request.send().ignoreResult();
      }
      case 4: {
        auto request = root.reflectRequest();
        request.setItem(kj::heap<conformance::FileItem>(mine, conformance::pipeWith("text")));
        return request.send().ignoreResult();
      }
      case 5: {
        auto sink = root.openRequest().send().getSink();
        auto request = sink.putRequest();
        request.initFill(size());
        return request.send().then([sink]() mutable {
          return sink.totalRequest().send().ignoreResult();
        });
      }
      default:
        return echo();
    }
  }

  kj::Promise<void> echo() {
    auto request = root.echoRequest();
    bool asStamps = attack == Attack::STAMPS_AS_PAYLOAD;
    auto words = size() / 8;
    auto data = request.initData(words * 8);
    uint64_t first = random() % 100000;
    // Of lines that are near, and of those that come in a while.
    for (size_t i = 0; i < words; i++) {
      uint64_t value = asStamps ? headStamp(first + i) + random() % 2 : random();
      memcpy(data.begin() + i * 8, &value, 8);
    }
    if (!asStamps) return request.send().ignoreResult();
    auto expected = kj::heapArray<byte>(data.asConst());
    return request.send().then([expected = kj::mv(expected)](auto&& response) {
      KJ_ASSERT(response.getData() == expected, "stamps as payload came back as something else");
    });
  }
};

}  // namespace

uint64_t attackByClient(LiveContext& context, Attack attack) {
  std::mt19937_64 random(context.seed);
  Caller caller(context, attack);
  Tamperer tamperer(deedFor(attack, random() % 3 == 0), random());
  caller.run(100 + random() % 400);
  return tamperer.getDeeds();
}

}  // namespace hostile
}  // namespace capnpshm
