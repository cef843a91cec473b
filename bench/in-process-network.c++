// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "in-process-network.h"

#include <capnp/message.h>
#include <capnp/rpc.h>
#include <deque>
#include <kj/debug.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr size_t STREAM_WINDOW_BYTES = 256 * 1024;  // As SharedMemoryVatNetwork has it.

struct Message: public kj::Refcounted {
  // What both sides hold: the sender may keep its message (a Return, until Finish) after the
  // receiver has dropped it, and the other way round.

  explicit Message(uint firstSegmentWords)
      : builder(firstSegmentWords == 0 ? capnp::SUGGESTED_FIRST_SEGMENT_WORDS
                                       : firstSegmentWords) {}

  capnp::MallocMessageBuilder builder;
};

capnp::ReaderOptions readerOptions() {
  capnp::ReaderOptions result;
  result.traversalLimitInWords = uint64_t(1) << 40;
  return result;
}

class IncomingMessage final: public capnp::IncomingRpcMessage {
public:
  explicit IncomingMessage(kj::Own<Message> message)
      : message(kj::mv(message)),
        reader(this->message->builder.getSegmentsForOutput(), readerOptions()) {}

  capnp::AnyPointer::Reader getBody() override { return reader.getRoot<capnp::AnyPointer>(); }
  size_t sizeInWords() override { return message->builder.sizeInWords(); }

private:
  kj::Own<Message> message;
  capnp::SegmentArrayMessageReader reader;
};

}  // namespace

class InProcessNetwork::Queue final: public kj::Refcounted {
  // One direction. Shared by both ends, whichever goes first.

public:
  void push(kj::Own<Message> message) {
    if (readerGone) return;
    KJ_IF_MAYBE(f, waiting) {
      auto fulfiller = kj::mv(*f);
      waiting = nullptr;
      fulfiller->fulfill(incoming(kj::mv(message)));
    } else {
      messages.push_back(kj::mv(message));
    }
  }

  void end() {
    ended = true;
    KJ_IF_MAYBE(f, waiting) {
      auto fulfiller = kj::mv(*f);
      waiting = nullptr;
      fulfiller->fulfill(nullptr);
    }
  }

  void readerIsGone() {
    readerGone = true;
    waiting = nullptr;
    messages.clear();
  }

  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> pop() {
    if (!messages.empty()) {
      auto message = kj::mv(messages.front());
      messages.pop_front();
      return incoming(kj::mv(message));
    }
    if (ended) return kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>(nullptr);
    auto paf = kj::newPromiseAndFulfiller<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>>();
    waiting = kj::mv(paf.fulfiller);
    return kj::mv(paf.promise);
  }

private:
  std::deque<kj::Own<Message>> messages;
  kj::Maybe<kj::Own<kj::PromiseFulfiller<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>>>> waiting;
  bool ended = false;
  bool readerGone = false;

  static kj::Maybe<kj::Own<capnp::IncomingRpcMessage>> incoming(kj::Own<Message> message) {
    return kj::Own<capnp::IncomingRpcMessage>(kj::heap<IncomingMessage>(kj::mv(message)));
  }
};

class InProcessNetwork::ConnectionImpl final: public capnp::TwoPartyVatNetworkBase::Connection {
public:
  ConnectionImpl(
      capnp::rpc::twoparty::Side peer, kj::Own<Queue> incoming, kj::Own<Queue> outgoing)
      : incoming(kj::mv(incoming)), outgoing(kj::mv(outgoing)) {
    peerVatId.initRoot<capnp::rpc::twoparty::VatId>().setSide(peer);
  }

  ~ConnectionImpl() noexcept(false) {
    incoming->readerIsGone();
    outgoing->end();
  }

  capnp::rpc::twoparty::VatId::Reader getPeerVatId() override {
    return peerVatId.getRoot<capnp::rpc::twoparty::VatId>();
  }

  kj::Own<capnp::OutgoingRpcMessage> newOutgoingMessage(uint firstSegmentWords) override {
    return kj::heap<OutgoingMessage>(*outgoing, firstSegmentWords);
  }

  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> receiveIncomingMessage() override {
    return incoming->pop();
  }

  kj::Promise<void> shutdown() override {
    outgoing->end();
    return kj::READY_NOW;
  }

  kj::Own<capnp::RpcFlowController> newStream() override {
    return capnp::RpcFlowController::newFixedWindowController(STREAM_WINDOW_BYTES);
  }

private:
  class OutgoingMessage final: public capnp::OutgoingRpcMessage {
  public:
    OutgoingMessage(Queue& queue, uint firstSegmentWords)
        : queue(kj::addRef(queue)), message(kj::refcounted<Message>(firstSegmentWords)) {}

    capnp::AnyPointer::Builder getBody() override {
      return message->builder.getRoot<capnp::AnyPointer>();
    }
    void send() override { queue->push(kj::addRef(*message)); }
    size_t sizeInWords() override { return message->builder.sizeInWords(); }

  private:
    kj::Own<Queue> queue;
    kj::Own<Message> message;
  };

  kj::Own<Queue> incoming;
  kj::Own<Queue> outgoing;
  capnp::MallocMessageBuilder peerVatId;
};

InProcessNetwork::InProcessNetwork(
    capnp::rpc::twoparty::Side side, kj::Own<Queue> incoming, kj::Own<Queue> outgoing)
    : side(side), incoming(kj::mv(incoming)), outgoing(kj::mv(outgoing)) {}

InProcessNetwork::~InProcessNetwork() noexcept(false) {}

kj::Own<InProcessNetwork> InProcessNetwork::newClient() {
  return kj::heap<InProcessNetwork>(capnp::rpc::twoparty::Side::CLIENT, kj::refcounted<Queue>(),
      kj::refcounted<Queue>());
}

kj::Own<InProcessNetwork> InProcessNetwork::newServer() {
  return kj::heap<InProcessNetwork>(capnp::rpc::twoparty::Side::SERVER, kj::addRef(*outgoing),
      kj::addRef(*incoming));
}

kj::Own<capnp::TwoPartyVatNetworkBase::Connection> InProcessNetwork::newConnection() {
  auto peer = side == capnp::rpc::twoparty::Side::CLIENT ? capnp::rpc::twoparty::Side::SERVER
                                                         : capnp::rpc::twoparty::Side::CLIENT;
  return kj::heap<ConnectionImpl>(peer, kj::addRef(*incoming), kj::addRef(*outgoing));
}

kj::Maybe<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> InProcessNetwork::connect(
    capnp::rpc::twoparty::VatId::Reader ref) {
  if (ref.getSide() == side) return nullptr;  // That is ourselves.
  KJ_REQUIRE(!connected, "one bootstrap() per network is all that is needed here");
  connected = true;
  return newConnection();
}

kj::Promise<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>> InProcessNetwork::accept() {
  if (side == capnp::rpc::twoparty::Side::SERVER && !connected) {
    connected = true;
    return newConnection();
  }
  return kj::Promise<kj::Own<capnp::TwoPartyVatNetworkBase::Connection>>(kj::NEVER_DONE);
}

}  // namespace bench
}  // namespace capnpshm
