// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Two ends of shared memory in one process, without a socket: what the tests of message, outbox
// and inbox have in common. An End may live on a thread of its own.

#include "loop-fixture.h"
#include <capnp-shm/inbox.h>
#include <capnp-shm/message.h>
#include <capnp-shm/outbox.h>

#include <capnp/orphan.h>
#include <capnp/schema.capnp.h>
#include <deque>
#include <mutex>
#include <string.h>
#include <unistd.h>
#include <vector>

namespace capnpshm {
namespace testing {

class Random {
  // SplitMix64: cheap enough to make the contents of a million messages.

public:
  explicit Random(uint64_t seed): state(seed * 0x9e3779b97f4a7c15ull) {}

  uint64_t operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t limit) { return (*this)() % limit; }
  bool percent(uint64_t p) { return below(100) < p; }

private:
  uint64_t state;
};

struct Shape {
  // What a message looks like: a list of pieces of data, some of them foreign memory. Both ends
  // derive shape and contents from the message's number alone.

  struct Piece {
    size_t bytes;
    bool foreign;
  };
  uint64_t number;
  kj::uint firstSegmentWords = 0;
  std::vector<Piece> pieces;

  static Shape inlined(uint64_t number) {
    return { number, 0, { { 8 + number % 5 * 8, false } } };
  }
  static Shape ofBytes(uint64_t number, size_t bytes) {
    return { number, 0, { { bytes, false } } };
  }
  static Shape foreign(uint64_t number, size_t count, size_t bytes) {
    return { number, 0, std::vector<Piece>(count, Piece { bytes, true }) };
  }

  static Shape random(uint64_t number, uint64_t seed, size_t maxBytes) {
    // Of all kinds: inline, by reference, of many segments, too large to be sent in one.
    Random r(seed * 1000003 + number);
    Shape result { number, 0, {} };
    if (r.percent(30)) result.firstSegmentWords = 1 + r.below(600);
    uint64_t kind = r.below(1000);
    size_t count, limit;
    bool foreign = false;
    if (kind < 500) {
      count = r.below(3), limit = 48;
    } else if (kind < 800) {
      count = 1 + r.below(4), limit = 1200;
    } else if (kind < 900) {
      count = 1 + r.below(8), limit = 9000;
    } else if (kind < 960) {
      count = 1 + r.below(30), limit = 300, foreign = true;
    } else if (kind < 985) {
      count = 24 + r.below(480), limit = 64, foreign = true;
    } else {
      count = 1 + r.below(3), limit = maxBytes;
    }
    for (size_t i = 0; i < count; i++) {
      bool isForeign = foreign && r.percent(90);
      // Not empty foreign data: that gives an empty segment, which the library's reader rejects.
      result.pieces.push_back({ r.below(limit) + isForeign, isForeign });
    }
    return result;
  }
};

inline void fillPiece(uint64_t number, size_t index, kj::ArrayPtr<byte> target) {
  Random random(number * 1021 + index);
  for (size_t i = 0; i < target.size(); i += 8) {
    uint64_t word = random();
    memcpy(target.begin() + i, &word, kj::min(size_t(8), target.size() - i));
  }
}

inline void build(const Shape& shape, capnp::AnyPointer::Builder body,
                  std::vector<kj::Array<capnp::word>>& foreign) {
  auto list = body.initAs<capnp::List<capnp::Data>>(shape.pieces.size() + 1);
  for (size_t i = 0; i < shape.pieces.size(); i++) {
    auto& piece = shape.pieces[i];
    if (piece.foreign) {
      foreign.push_back(kj::heapArray<capnp::word>(piece.bytes / 8 + 1));
      auto memory = foreign.back().asBytes().slice(0, piece.bytes);
      memset(foreign.back().begin(), 0, foreign.back().asBytes().size());
      fillPiece(shape.number, i, memory);
      auto orphanage = capnp::Orphanage::getForMessageContaining(list);
      list.adopt(i, orphanage.referenceExternalData(
          capnp::Data::Reader(memory.begin(), memory.size())));
    } else {
      fillPiece(shape.number, i, list.init(i, piece.bytes));
    }
  }
  // The last piece says which message this is.
  memcpy(list.init(shape.pieces.size(), 8).begin(), &shape.number, 8);
}

inline bool matches(const Shape& shape, capnp::AnyPointer::Reader body) {
  // Whether a message is what build() made of `shape`, byte for byte.
  auto list = body.getAs<capnp::List<capnp::Data>>();
  if (list.size() != shape.pieces.size() + 1) return false;
  auto last = list[shape.pieces.size()];
  if (last.size() != 8 || memcmp(last.begin(), &shape.number, 8) != 0) return false;
  std::vector<byte> expected;
  for (size_t i = 0; i < shape.pieces.size(); i++) {
    expected.resize(shape.pieces[i].bytes);
    fillPiece(shape.number, i, kj::arrayPtr(expected.data(), expected.size()));
    auto data = list[i];
    if (data.size() != expected.size()) return false;
    if (!expected.empty() && memcmp(data.begin(), expected.data(), data.size()) != 0) return false;
  }
  return true;
}

struct Built {
  // A message under construction or sent, with the foreign memory in it.

  uint64_t number;
  std::vector<kj::Array<capnp::word>> foreign;
  kj::Own<OutgoingMessage> message;
};

struct EndOptions {
  size_t firstRegionBytes = 32 << 10;
  size_t maxBytes = 1 << 20;            // Of its own regions.
  size_t acceptBytes = size_t(64) << 20;  // Of the peer's.
  bool inPlace = false;
  kj::uint freeEntries = 512;
  size_t retiredBytes = kj::maxValue;
  size_t growAtOnceBytes = 0;
};

class Mailbox {
  // Instead of the control socket: announcements of regions and the answers. Any thread.

public:
  struct Letter {
    enum Kind { REGION, MAPPED, REFUSED };
    Kind kind;
    uint32_t id;
    uint64_t bytes;
    kj::AutoCloseFd fd;
  };
  void put(Letter&& letter) {
    std::lock_guard<std::mutex> lock(mutex);
    letters.push_back(kj::mv(letter));
  }
  kj::Maybe<Letter> get() {
    std::lock_guard<std::mutex> lock(mutex);
    if (letters.empty()) return nullptr;
    auto result = kj::mv(letters.front());
    letters.pop_front();
    return kj::mv(result);
  }
  bool isEmpty() {
    std::lock_guard<std::mutex> lock(mutex);
    return letters.empty();
  }

private:
  std::mutex mutex;
  std::deque<Letter> letters;
};

class End final: public MessageSender {
  // What a connection is, without the socket: an Outbox, an Inbox, and the heap queue.

public:
  explicit End(const EndOptions& options): options(options) {
    OutboxLimits limits { options.firstRegionBytes, options.maxBytes,
                          options.inPlace ? options.freeEntries : 0, options.retiredBytes,
                          options.growAtOnceBytes };
    outbox = kj::atomicRefcounted<Outbox>(
        limits, kj::atomicRefcounted<ForeignWake>(), PROTOCOL_VERSION);
  }

  void meet(End& peerParam) {
    // When both exist.
    peer = &peerParam;
    mapPeer(kj::atomicRefcounted<PeerRegion>(0, mapPeerRegion(peer->outbox->takeFirstRegionFd(),
        peer->options.firstRegionBytes, options.acceptBytes)));
  }
  void mapPeer(kj::Own<PeerRegion> region) {
    InboxLimits limits { uint64_t(1) << 28, 64, options.acceptBytes, options.inPlace };
    inbox = kj::atomicRefcounted<Inbox>(kj::atomicAddRef(*outbox), kj::mv(region),
        PROTOCOL_VERSION, limits, kj::atomicRefcounted<ForeignWake>());
  }
  void start() {
    // When both have met each other.
    outbox->start(inbox->getPeerHeader(), inbox->getPeerFreeRing());
  }

  Built newMessage(const Shape& shape) {
    Built result;
    result.number = shape.number;
    result.message = kj::atomicRefcounted<OutgoingMessage>(
        kj::atomicAddRef(*outbox), *this, shape.firstSegmentWords);
    build(shape, result.message->getBody(), result.foreign);
    return result;
  }

  bool send(const Shape& shape) {
    // True if it was published at once.
    waiting.push_back(newMessage(shape));
    return publishWaiting();
  }

  bool publishWaiting() {
    outbox->reclaim();
    while (!waiting.empty()) {
      bool published = outbox->tryPublish(*waiting.front().message, 0);
      announce();
      if (!published) return false;
      if (keepBuilders) kept.push_back(kj::mv(waiting.front()));
      waiting.pop_front();
    }
    return true;
  }

  kj::Maybe<kj::Own<IncomingMessage>> take() {
    return inbox->tryTake(true);
  }

  void giveBack() {
    // As at the end of a turn in which we go to sleep.
    inbox->publishConsumed(true);
    inbox->takeFreed();
  }

  void announce() {
    for (;;) {
      KJ_IF_MAYBE(a, outbox->takeAnnouncement()) {
        peer->mailbox.put({ Mailbox::Letter::REGION, a->id, a->bytes, kj::mv(a->fd) });
      } else {
        return;
      }
    }
  }

  bool handleLetter() {
    KJ_IF_MAYBE(letter, mailbox.get()) {
      switch (letter->kind) {
        case Mailbox::Letter::REGION:
          peer->mailbox.put({ inbox->addRegion(letter->id, letter->fd.get(), letter->bytes)
              ? Mailbox::Letter::MAPPED : Mailbox::Letter::REFUSED, letter->id, 0, nullptr });
          break;
        case Mailbox::Letter::MAPPED: outbox->regionMapped(letter->id); break;
        case Mailbox::Letter::REFUSED: outbox->regionRefused(letter->id); break;
      }
      return true;
    }
    return false;
  }

  void sendMessage(OutgoingMessage&) override {}

  EndOptions options;
  End* peer = nullptr;
  Mailbox mailbox;
  kj::Own<Outbox> outbox;
  kj::Own<Inbox> inbox;
  std::deque<Built> waiting;
  bool keepBuilders = false;    // As RpcSystem keeps a Return with capabilities until Finish.
  std::deque<Built> kept;
};

struct Pair {
  // Two ends on one thread.

  explicit Pair(const EndOptions& both): Pair(both, both) {}
  Pair(const EndOptions& a, const EndOptions& b): a(a), b(b) {
    this->a.meet(this->b);
    this->b.meet(this->a);
    this->a.start();
    this->b.start();
  }
  End a, b;

  void handleLetters() {
    while (a.handleLetter() || b.handleLetter()) {}
  }
};

}  // namespace testing
}  // namespace capnpshm
