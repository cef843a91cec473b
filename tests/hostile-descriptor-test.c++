// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-peer.h"

// Bad input in shared memory: the ring, the descriptors, what was consumed and freed.

namespace capnpshm {
namespace hostile {
namespace {

using process::resourcesOf;
constexpr auto MESSAGE = DescriptorKind::MESSAGE;
constexpr auto MESSAGE_TABLE = DescriptorKind::MESSAGE_TABLE;
constexpr auto BEGIN = DescriptorKind::BEGIN;
constexpr auto PART = DescriptorKind::PART;
constexpr auto JUMP = DescriptorKind::JUMP;
constexpr auto RETIRE = DescriptorKind::RETIRE;
constexpr size_t DATA = HostilePeer::DATA;
const std::vector<uint64_t> BY_CONSUMPTION { FREE_BY_CONSUMPTION };

using Words = std::vector<uint64_t>;

Misdeed inRing(const char* name, const char* complaint, std::function<void(HostilePeer&)> commit,
               bool bareNetworkOnly = false) {
  // After an honest message, so that the position is not the first.
  return { name, complaint, [commit](HostilePeer& peer) {
    peer.upgrade();
    peer.publishMessage();
    commit(peer);
    peer.bell();
  }, bareNetworkOnly };
}

Misdeed published(const char* name, const char* complaint, DescriptorHead head, Words body,
                  bool bareNetworkOnly = false) {
  return inRing(name, complaint, [head, body](HostilePeer& peer) { peer.publish(head, body); },
      bareNetworkOnly);
}

void begin(HostilePeer& peer, Words sizes, uint32_t tableWords) {
  for (size_t i = 0; i < sizes.size(); i++) peer.word(DATA + i * 8) = sizes[i];
  peer.publish({ BEGIN, 0, uint16_t(sizes.size()), 0, 0 },
      BY_CONSUMPTION + entry(0, tableWords, DATA));
}

Misdeed begun(const char* name, const char* complaint, Words sizes) {
  return inRing(name, complaint,
      [sizes](HostilePeer& peer) { begin(peer, sizes, sizes.size()); });
}

Misdeed within(const char* name, const char* complaint, DescriptorHead head, Words body) {
  // A message in parts.
  return inRing(name, complaint, [head, body](HostilePeer& peer) {
    begin(peer, { 10, 20 }, 2);
    peer.publish({ PART, 0, 0, 0, 0 }, BY_CONSUMPTION + entry(0, 5, DATA));
    peer.publish(head, body);
  });
}

class HostileDescriptor: public HostileTest {};
TEST_P(HostileDescriptor, IsRefused) { run(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Lines, HostileDescriptor, testing::Values(
    inRing("StampAhead", "impossible stamp", [](HostilePeer& peer) {
      peer.line(peer.position).stamp = headStamp(peer.position + FIRST_RING_LINES);
    }),
    inRing("StampOfContinuation", "impossible stamp", [](HostilePeer& peer) {
      peer.line(peer.position).stamp = continuationStamp(peer.position);
    }),
    inRing("StampOfNoKind", "impossible stamp", [](HostilePeer& peer) {
      peer.line(peer.position).stamp = peer.position << 2 | 3;
    }),
    inRing("StampOfAllOnes", "impossible stamp", [](HostilePeer& peer) {
      peer.line(peer.position).stamp = ~uint64_t(0);
    }),
    inRing("ContinuationOfEarlierLap", "wrong continuation", [](HostilePeer& peer) {
      peer.publish({ MESSAGE, 2, 1, 0, 7 }, Words(7));
      peer.line(peer.position - 1).stamp =
          continuationStamp(peer.position - 1 - FIRST_RING_LINES);
    }),
    inRing("ContinuationStampedAsHead", "wrong continuation", [](HostilePeer& peer) {
      peer.publish({ MESSAGE, 3, 1, 0, 7 }, Words(7));
      peer.line(peer.position - 1).stamp = headStamp(peer.position - 1);
    }),
    inRing("NoLines", "impossible length", [](HostilePeer& peer) {
      peer.publish({ MESSAGE, 1, 1, 0, 1 }, Words(1));
      peer.line(peer.position - 1).words[0] = DescriptorHead { MESSAGE, 0, 1, 0, 1 }.pack();
    }),
    published("NineLines", "impossible length", { MESSAGE, 9, 1, 0, 1 }, Words(1)),
    published("ManyLines", "impossible length", { MESSAGE, 255, 1, 0, 1 }, Words(1)),
    published("KindZero", "unknown kind", { DescriptorKind(0), 0, 1, 0, 1 }, Words(1)),
    published("KindSeven", "unknown kind", { DescriptorKind(7), 0, 1, 0, 1 }, Words(1)),
    published("KindMax", "unknown kind", { DescriptorKind(255), 0, 1, 0, 1 }, Words(1))
), misdeedName);

INSTANTIATE_TEST_SUITE_P(Messages, HostileDescriptor, testing::Values(
    published("UnknownRegion", "not mapped", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(1, 8, DATA)),
    published("RegionMax", "not mapped", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(SEALED_SEGMENT - 1, 8, DATA)),
    published("Misaligned", "outside its region", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 8, DATA + 4)),
    published("Beyond", "outside its region", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 1, REGION_BYTES)),
    published("OneWordBeyond", "outside its region", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 9, REGION_BYTES - 64)),
    published("OffsetOverflow", "outside its region", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 2, ~uint64_t(0) - 7)),
    published("WordsOverflow", "outside its region", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 0xffffffff, DATA)),
    published("SecondSegmentBeyond", "outside its region", { MESSAGE, 0, 2, 0, 0 },
        BY_CONSUMPTION + entry(0, 8, DATA) + entry(0, 8, REGION_BYTES)),
    published("SameSegmentTwice", "segments overlap", { MESSAGE, 0, 2, 0, 0 },
        BY_CONSUMPTION + entry(0, 8, DATA) + entry(0, 8, DATA)),
    published("Overlap", "segments overlap", { MESSAGE, 0, 3, 0, 0 },
        BY_CONSUMPTION + entry(0, 8, DATA + 128) + entry(0, 8, DATA) + entry(0, 2, DATA + 56)),
    published("SegmentWithinAnother", "segments overlap", { MESSAGE, 0, 2, 0, 0 },
        BY_CONSUMPTION + entry(0, 80, DATA) + entry(0, 1, DATA + 80)),
    published("TooManyWords", "exceeds size limit", { MESSAGE, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, LIMIT_WORDS + 1, DATA), true),
    published("TooManyWordsInlineIncluded", "exceeds size limit", { MESSAGE, 0, 2, 0, 1 },
        Words { 0 } + BY_CONSUMPTION + entry(0, LIMIT_WORDS, DATA), true),
    published("TooManySegments", "too many segments", { MESSAGE, 8, 512, 0, 0 }, Words(55)),
    published("SegmentsMax", "too many segments", { MESSAGE, 8, 65535, 0, 0 }, Words(55)),
    published("InlineLongerThanDescriptor", "impossible inline data", { MESSAGE, 1, 1, 0, 7 },
        Words(6)),
    published("InlineMax", "impossible inline data", { MESSAGE, 1, 1, 0, 65535 }, Words(6)),
    published("InlineOfNoSegment", "impossible inline data", { MESSAGE, 1, 0, 0, 1 }, Words(6)),
    published("NoRoomForHandle", "too short for its segments", { MESSAGE, 1, 2, 0, 6 }, Words(6)),
    published("NoRoomForSegments", "too short for its segments", { MESSAGE, 1, 5, 0, 0 },
        BY_CONSUMPTION + Words(5)),
    published("TableOfOtherSize", "table of the wrong size", { MESSAGE_TABLE, 0, 30, 0, 0 },
        BY_CONSUMPTION + entry(0, 59, DATA)),
    published("TableBeyond", "outside its region", { MESSAGE_TABLE, 0, 30, 0, 0 },
        BY_CONSUMPTION + entry(0, 60, REGION_BYTES - 8)),
    published("TableInUnknownRegion", "not mapped", { MESSAGE_TABLE, 0, 30, 0, 0 },
        BY_CONSUMPTION + entry(7, 60, DATA)),
    inRing("EntryOfTableBeyond", "outside its region", [](HostilePeer& peer) {
      for (uint i = 0; i < 30; i++) {
        auto e = entry(0, 1, i == 29 ? REGION_BYTES : DATA + 1024 + i * 8);
        peer.word(DATA + i * 16) = e[0];
        peer.word(DATA + i * 16 + 8) = e[1];
      }
      peer.publish({ MESSAGE_TABLE, 0, 30, 0, 0 }, BY_CONSUMPTION + entry(0, 60, DATA));
    })
), misdeedName);

INSTANTIATE_TEST_SUITE_P(Parts, HostileDescriptor, testing::Values(
    begun("NoSegments", "impossible number of segments", {}),
    begun("TooManySegments", "impossible number of segments", Words(512, 1)),
    inRing("TableOfOtherSize", "table of the wrong size", [](HostilePeer& peer) {
      begin(peer, { 10, 20 }, 3);
    }),
    published("TableBeyond", "outside its region", { BEGIN, 0, 2, 0, 0 },
        BY_CONSUMPTION + entry(0, 2, REGION_BYTES - 8)),
    begun("SegmentTooLong", "impossible segment", { 1, uint64_t(1) << 29 }),
    begun("SegmentMax", "impossible segment", { ~uint64_t(0), 2 }),
    begun("NoWords", "exceeds size limit", { 0, 0 }),
    begun("TooManyWords", "exceeds size limit", { 8 << 20, 1 }),
    published("PartOfNothing", "impossible order", { PART, 0, 0, 0, 0 },
        BY_CONSUMPTION + entry(0, 5, DATA)),
    within("MessageWithin", "impossible order", { MESSAGE, 0, 1, 0, 1 }, Words(1)),
    within("BeginWithin", "impossible order", { BEGIN, 0, 1, 0, 0 },
        BY_CONSUMPTION + entry(0, 1, DATA)),
    within("RetireWithin", "impossible order", { RETIRE, 0, 0, 0, 0 }, { 0 }),
    within("EmptyPart", "does not fit its message", { PART, 0, 0, 0, 0 },
        BY_CONSUMPTION + entry(0, 0, DATA)),
    within("PartTooLong", "does not fit its message", { PART, 0, 0, 0, 0 },
        BY_CONSUMPTION + entry(0, 26, DATA)),
    within("PartBeyond", "outside its region", { PART, 0, 0, 0, 0 },
        BY_CONSUMPTION + entry(0, 2, REGION_BYTES - 8)),
    within("PartMisaligned", "outside its region", { PART, 0, 0, 0, 0 },
        BY_CONSUMPTION + entry(0, 2, DATA + 1))
), misdeedName);

INSTANTIATE_TEST_SUITE_P(JumpAndRetire, HostileDescriptor, testing::Values(
    published("JumpMisaligned", "misplaced ring", { JUMP, 0, 0, 0, 0 }, entry(0, 1024, DATA + 8)),
    published("JumpToHalfALine", "misplaced ring", { JUMP, 0, 0, 0, 0 }, entry(0, 1028, DATA)),
    published("JumpToSmaller", "impossible size", { JUMP, 0, 0, 0, 0 }, entry(0, 256, DATA)),
    published("JumpToSameSize", "impossible size", { JUMP, 0, 0, 0, 0 }, entry(0, 512, DATA)),
    published("JumpToNoPowerOfTwo", "impossible size", { JUMP, 0, 0, 0, 0 }, entry(0, 800, DATA)),
    published("JumpToNothing", "impossible size", { JUMP, 0, 0, 0, 0 }, entry(0, 0, DATA)),
    published("JumpBeyond", "outside its region", { JUMP, 0, 0, 0, 0 },
        entry(0, 1024, REGION_BYTES - 4096)),
    published("JumpToUnknownRegion", "not mapped", { JUMP, 0, 0, 0, 0 }, entry(3, 1024, 0)),
    published("RetireFirst", "retired a region that is not mapped", { RETIRE, 0, 0, 0, 0 }, { 0 }),
    published("RetireUnknown", "retired a region that is not mapped", { RETIRE, 0, 0, 0, 0 },
        { 1 }),
    published("RetireLikeFirst", "retired a region that is not mapped", { RETIRE, 0, 0, 0, 0 },
        { uint64_t(1) << 32 }),
    inRing("RetiredTwice", "retired a region that is not mapped", [](HostilePeer& peer) {
      peer.announce(1, REGION_BYTES, peer.region.fd);
      KJ_REQUIRE(peer.readControl() == protocol::Control::REGION_MAPPED);
      peer.publish({ RETIRE, 0, 0, 0, 0 }, { 1 });
      peer.publish({ RETIRE, 0, 0, 0, 0 }, { 1 });
    }),
    inRing("UsedOnceRetired", "not mapped", [](HostilePeer& peer) {
      peer.announce(1, REGION_BYTES, peer.region.fd);
      KJ_REQUIRE(peer.readControl() == protocol::Control::REGION_MAPPED);
      peer.publish({ RETIRE, 0, 0, 0, 0 }, { 1 });
      peer.publish({ MESSAGE, 0, 1, 0, 0 }, BY_CONSUMPTION + entry(1, 8, DATA));
    })
), misdeedName);

Misdeed giveBack(const char* name, const char* complaint,
                 std::function<void(HostilePeer&, Words)> commit) {
  // When messages of the victim's, some by reference, are in its ring. It looks at what was given
  // back when its own messages need room.
  return { name, complaint, [commit](HostilePeer& peer) {
    peer.upgrade();
    for (uint i = 0; i < 3; i++) peer.letVictimSend(1000);
    auto handles = peer.handlesInVictimsRing();
    KJ_REQUIRE(handles.size() == 3);
    for (auto handle: handles) KJ_REQUIRE(handle != FREE_BY_CONSUMPTION);
    commit(peer, handles);
    for (uint i = 0; i < 100; i++) peer.letVictimSend(1000);
    peer.bell();
  }, true };
}

void release(HostilePeer& peer, Words handles) {
  for (size_t i = 0; i < handles.size(); i++) peer.word(sizeof(RegionHeader) + i * 8) = handles[i];
  peer.header().freed = handles.size();
}

INSTANTIATE_TEST_SUITE_P(GivenBack, HostileDescriptor, testing::Values(
    giveBack("ConsumedAhead", "consumed descriptors that were not published",
        [](HostilePeer& peer, Words) {
      peer.header().consumed = FIRST_RING_LINES + 50;
    }),
    giveBack("ConsumedMax", "consumed descriptors that were not published",
        [](HostilePeer& peer, Words) {
      peer.header().consumed = ~uint64_t(0);
    }),
    giveBack("ConsumedBackward", "went backwards", [](HostilePeer& peer, Words) {
      peer.header().consumed = FIRST_RING_LINES - 1;
    }),
    giveBack("ConsumedZero", "went backwards", [](HostilePeer& peer, Words) {
      peer.header().consumed = 0;
    }),
    giveBack("FreedMoreThanThereIs", "count of freed messages is impossible",
        [](HostilePeer& peer, Words) {
      peer.header().freed = 500;  // More than will ever be sent.
    }),
    giveBack("FreedMax", "count of freed messages is impossible", [](HostilePeer& peer, Words) {
      peer.header().freed = ~uint64_t(0);
    }),
    giveBack("FreedTwice", "freed a message that it does not hold",
        [](HostilePeer& peer, Words handles) {
      release(peer, { handles[0], handles[0] });
    }),
    giveBack("FreedOfOtherGeneration", "freed a message that it does not hold",
        [](HostilePeer& peer, Words handles) {
      release(peer, { handles[0] + (uint64_t(1) << 32) });
    }),
    giveBack("FreedUnknown", "freed a message that it does not hold",
        [](HostilePeer& peer, Words) {
      release(peer, { 1000 });
    }),
    giveBack("FreedByConsumption", "freed a message that it does not hold",
        [](HostilePeer& peer, Words) {
      release(peer, { FREE_BY_CONSUMPTION });
    })
), misdeedName);

TEST_F(HostileTest, RandomDescriptors) {
  // Whatever they are, the victim delivers messages or ends with an exception; it reads nothing
  // out of bounds, which AddressSanitizer and the kernel watch.
  auto before = resourcesOf();
  srand48(3);
  auto pick = [](std::initializer_list<uint64_t> values) {
    return values.begin()[size_t(lrand48()) % values.size()];
  };
  uint delivered = 0, refused = 0;
  for (uint round = 0; round < (SLOW ? 300 : 1500); round++) {
    HostilePeer peer(io);
    auto end = kj::mv(peer.victimsEnd);
    SharedMemoryContext context { &io.unixEventPort, SharedMemoryOptions() };
    context.options.trustPeer = round % 2;
    SharedMemoryVatNetwork network(context, *end, 1, conformance::Side::SERVER);
    auto connection = network.accept().wait(io.waitScope);
    kj::Promise<void> receiving = nullptr;
    bool done = false;
    std::function<kj::Promise<void>()> receive = [&]() {
      return connection->receiveIncomingMessage().then(
          [&](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) -> kj::Promise<void> {
        KJ_IF_MAYBE(m, message) {
          ++delivered;
          kj::runCatchingExceptions([&]() {
            (*m)->getBody().targetSize();
            (*m)->sizeInWords();
          });
          return receive();
        }
        done = true;
        return kj::READY_NOW;
      });
    };
    receiving = receive().eagerlyEvaluate([&](kj::Exception&&) {
      ++refused;
      done = true;
    });
    peer.upgrade();
    for (size_t i = DATA; i < REGION_BYTES; i += 8) {
      peer.word(i) = lrand48() % 3 ? uint64_t(lrand48() % 64) : mrand48();
    }
    for (uint i = 0; i < 4; i++) {
      auto kind = DescriptorKind(pick({ 1, 1, 1, 2, 3, 4, 5, 6, uint64_t(lrand48() % 256) }));
      auto anyEntry = [&]() {
        return entry(lrand48() % 8 == 0, pick({ 0, 1, 2, 8, 1024, uint64_t(lrand48() % 4096) }),
            pick({ DATA, DATA + uint64_t(lrand48() % 2048) * 8, uint64_t(lrand48()) }));
      };
      Words body;
      uint inlineWords = pick({ 0, 0, 1, 4, uint64_t(lrand48() % 60) });
      for (uint j = 0; j < inlineWords; j++) body.push_back(lrand48() % 5);
      body = body + Words { pick({ FREE_BY_CONSUMPTION, uint64_t(lrand48() % 4) }) }
          + anyEntry() + anyEntry() + anyEntry();
      body.resize(kj::min(body.size(), size_t(MAX_BODY_WORDS)));
      peer.publish({ kind, uint8_t(pick({ 0, 0, 0, 1, 8 })),
          uint16_t(pick({ 0, 1, 2, 3, 4, uint64_t(lrand48() % 600) })),
          uint16_t(lrand48() % 9 == 0), uint16_t(inlineWords) }, body);
    }
    kj::runCatchingExceptions([&]() { peer.bell(); });
    peer.hangUp();
    await(kj::mv(receiving));
    EXPECT_TRUE(done);
  }
  EXPECT_GT(delivered, 0);
  EXPECT_GT(refused, 0);
  EXPECT_EQ(before, resourcesOf());
}

}  // namespace
}  // namespace hostile
}  // namespace capnpshm
