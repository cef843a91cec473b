// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "../outbox-pair.h"
#include "fuzz-input.h"
#include "fuzz-oracle.h"
#include "recycled-regions.h"

// What the peer tells of its reading, its counters and its free ring, as any words, against an
// Outbox which publishes messages meanwhile. An honest Inbox reads them; what it tells comes to the
// Outbox by the fuzzer, which can tell something else. As long as it has not, every message must
// arrive as it was sent, and nothing may be left in the end.

namespace capnpshm {
namespace fuzz {
namespace {

using testing::Built;
using testing::Shape;

constexpr size_t REGION_BYTES = 16 << 10;
constexpr size_t MAX_BYTES = 5 * REGION_BYTES;
constexpr uint FREE_ENTRIES = 8;
constexpr uint MAX_KEPT = 8;

struct Reader {
  // What the honest Inbox writes, used again and again.

  explicit Reader(uint freeEntries)
      : outbox(kj::atomicRefcounted<Outbox>(
            OutboxLimits { REGION_BYTES, REGION_BYTES, freeEntries },
            kj::atomicRefcounted<ForeignWake>(), PROTOCOL_VERSION)) {}
  kj::Own<Outbox> outbox;
};

class OutboxFuzzer final: public MessageSender {
public:
  explicit OutboxFuzzer(Reader& reader)
      : reader(reader), told(), toldFreed(),
        outbox(kj::atomicRefcounted<Outbox>(OutboxLimits { REGION_BYTES, MAX_BYTES, 0 },
            kj::atomicRefcounted<ForeignWake>(), PROTOCOL_VERSION)) {
    header().consumed = FIRST_RING_LINES;
    header().freed = 0;
    bool inPlace = reader.outbox->getFreeRing().size() > 0;
    InboxLimits limits { 1 << 16, 16, 2 * MAX_BYTES, inPlace };
    inbox = kj::atomicRefcounted<Inbox>(kj::atomicAddRef(*reader.outbox),
        kj::atomicRefcounted<PeerRegion>(0,
            mapPeerRegion(outbox->takeFirstRegionFd(), REGION_BYTES, MAX_BYTES)),
        PROTOCOL_VERSION, limits, kj::atomicRefcounted<ForeignWake>());
    tell();
    outbox->start(told, kj::arrayPtr(toldFreed, inPlace ? FREE_ENTRIES : 0));
  }

  void run(Input& input) {
    bool good = true;
    while (good && !input.isEmpty()) good = attempt([&]() { step(input); });
    FUZZ_CHECK(good || lied, "no lie was told");
    if (!lied) finish();
    inbox->close();
    outbox->stop();
  }

private:
  struct Held {
    uint64_t number;
    kj::Own<IncomingMessage> message;
  };

  Reader& reader;
  RegionHeader told;
  SharedWord toldFreed[FREE_ENTRIES];
  bool lied = false;
  kj::Own<Outbox> outbox;
  kj::Own<Inbox> inbox;
  bool inboxBroken = false;      // By what was written over unread messages, after a lie.
  std::deque<Built> waiting;
  std::deque<Outbox::Announcement> announced;
  kj::Maybe<Built> kept[MAX_KEPT];
  kj::Maybe<Held> held[MAX_KEPT];
  uint64_t sent = 0, taken = 0;
  std::deque<Shape> shapes;      // Of all messages, by number.

  RegionHeader& header() { return reader.outbox->getHeader(); }
  void sendMessage(OutgoingMessage&) override {}

  void tell() {
    // The truth.
    auto freeRing = reader.outbox->getFreeRing();
    for (size_t i = 0; i < freeRing.size(); i++) toldFreed[i] = freeRing[i].load();
    told.freed = header().freed.load();
    told.consumed = header().consumed.load();
  }

  void step(Input& input) {
    switch (input.below(16)) {
      case 0: case 1: case 2: case 3: case 4: send(input); break;
      case 5: case 6: case 7: take(input); break;
      case 8:
        inbox->publishConsumed(input.takeFlag());
        inbox->takeFreed();
        tell();
        break;
      case 9: kept[input.below(MAX_KEPT)] = nullptr; break;
      case 10: drop(input.below(MAX_KEPT)); break;
      case 11: answer(input.below(8)); break;
      case 12: {
        // Many of the smallest, so that the ring grows.
        for (uint i = input.below(40); i > 0; i--) send(Shape::inlined(sent), false, 0);
        break;
      }
      case 13: if (outbox->hasNews()) outbox->reclaim(); break;
      case 14: publishWaiting(); break;
      case 15: lie(input); break;
    }
    FUZZ_CHECK(outbox->getRegionBytes() <= MAX_BYTES, outbox->getRegionBytes());
    FUZZ_CHECK(outbox->getArenaBytesInUse() <= outbox->getRegionBytes());
  }

  void lie(Input& input) {
    lied = true;
    switch (input.below(4)) {
      case 0: told.consumed = input.takeValue(told.consumed); break;
      case 1: told.freed = input.takeValue(told.freed); break;
      case 2: {
        auto& word = toldFreed[input.below(FREE_ENTRIES)];
        word = input.takeValue(word);
        break;
      }
      case 3: {
        uint id = input.takeByte();
        if (input.takeFlag()) {
          outbox->regionMapped(id);
        } else {
          outbox->regionRefused(id);
        }
        break;
      }
    }
  }

  void send(Input& input) {
    Shape shape { sent, 0, {} };
    uint kind = input.below(32);
    if (kind < 12) {
      shape.pieces.push_back({ input.below(80), false });
    } else if (kind < 22) {
      for (uint i = 1 + input.below(3); i > 0; i--) {
        shape.pieces.push_back({ 100 + input.below(1000), false });
      }
    } else if (kind < 26) {
      shape.pieces.push_back({ 1000 + input.below(3000), input.takeFlag() });
    } else if (kind < 30) {
      shape.pieces = std::vector<Shape::Piece>(1 + input.below(40),
          Shape::Piece { 1 + input.below(64), true });
    } else if (kind == 30) {
      shape.pieces.push_back({ MAX_BYTES / 4 + input.below(8000), true });
    } else {
      shape.pieces.push_back({ input.below(20000), false });
    }
    if (input.below(4) == 0) shape.firstSegmentWords = 1 + input.below(600);
    uint place = input.below(2 * MAX_KEPT);
    send(kj::mv(shape), place < MAX_KEPT, place);
  }

  void send(Shape&& shape, bool keep, uint place) {
    if (waiting.size() >= 64) return;
    Built built;
    built.number = sent++;
    built.message = kj::atomicRefcounted<OutgoingMessage>(
        kj::atomicAddRef(*outbox), *this, shape.firstSegmentWords);
    testing::build(shape, built.message->getBody(), built.foreign);
    shapes.push_back(kj::mv(shape));
    if (keep) {
      // As RpcSystem keeps some; foreign memory goes with the message that is sent.
      kept[place] = Built { built.number, {}, kj::atomicAddRef(*built.message) };
    }
    waiting.push_back(kj::mv(built));
    publishWaiting();
  }

  void publishWaiting() {
    outbox->reclaim();
    while (!waiting.empty()) {
      bool published = outbox->tryPublish(*waiting.front().message, 0);
      for (;;) {
        KJ_IF_MAYBE(a, outbox->takeAnnouncement()) announced.push_back(kj::mv(*a));
        else break;
      }
      if (!published) return;
      waiting.pop_front();
    }
  }

  void answer(uint kind) {
    if (announced.empty()) return;
    auto a = kj::mv(announced.front());
    announced.pop_front();
    kj::Maybe<int> fd;
    if (kind > 0) fd = a.fd.get();
    bool mapped = false;
    FUZZ_CHECK(attempt([&]() { mapped = inbox->addRegion(a.id, fd, a.bytes); }) || lied);
    if (mapped) {
      outbox->regionMapped(a.id);
    } else {
      outbox->regionRefused(a.id);
    }
  }

  void take(Input& input) { takeOne(input.below(2 * MAX_KEPT)); }

  bool takeOne(uint place) {
    if (inboxBroken) return false;
    bool found = false;
    inboxBroken = !attempt([&]() {
      KJ_IF_MAYBE(m, inbox->tryTake(true)) {
        found = true;
        uint64_t number = taken++;
        check(number, **m);
        if (place < MAX_KEPT) {
          drop(place);
          held[place] = Held { number, kj::mv(*m) };
        }
      }
    });
    FUZZ_CHECK(!inboxBroken || lied, "what the Outbox publishes cannot be read");
    return found;
  }

  void check(uint64_t number, IncomingMessage& message) {
    if (lied) return;
    FUZZ_CHECK(number < sent && testing::matches(shapes[number], message.getBody()),
        "message ", number, " of ", sent);
  }

  void drop(uint place) {
    KJ_IF_MAYBE(h, held[place]) {
      // Nobody may have written over it.
      check(h->number, *h->message);
      held[place] = nullptr;
    }
  }

  void finish() {
    // Everything is answered, read and given back. Then everything must have arrived, and nothing
    // may be left.
    for (auto& k: kept) k = nullptr;
    uint idleRounds = 0;
    for (;;) {
      uint64_t position = outbox->getPosition();
      size_t unanswered = announced.size();
      while (!announced.empty()) answer(1);
      while (takeOne(MAX_KEPT)) {}
      for (uint i = 0; i < MAX_KEPT; i++) drop(i);
      inbox->publishConsumed(true);
      inbox->takeFreed();
      tell();
      publishWaiting();
      outbox->reclaim();
      if (taken == sent && announced.empty()) break;
      // If nothing but the reserve is left a message may take a round for each of its segments; but
      // each round must bring something.
      bool idle = outbox->getPosition() == position && announced.size() == unanswered;
      idleRounds = idle ? idleRounds + 1 : 0;
      FUZZ_CHECK(idleRounds < 4, waiting.size(), " messages wait for nothing");
    }
    size_t ringBytes = outbox->getRingBytes();
    size_t left = outbox->getArenaBytesInUse();
    FUZZ_CHECK(left == 0 || left == ringBytes, left, " bytes are not freed");
    FUZZ_CHECK(outbox->getRingBytesInUse() == 0);
  }
};

}  // namespace
}  // namespace fuzz
}  // namespace capnpshm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capnpshm::fuzz;
  static Reader inPlace(FREE_ENTRIES), copying(0);
  Watch watch;
  Input input(data, size);
  OutboxFuzzer(input.takeFlag() ? inPlace : copying).run(input);
  checkRecycledRegions(2);
  return 0;
}
