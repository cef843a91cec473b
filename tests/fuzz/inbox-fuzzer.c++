// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-input.h"
#include "fuzz-oracle.h"
#include "recycled-regions.h"
#include <capnp-shm/inbox.h>
#include <capnp-shm/outbox.h>

#include <capnp/any.h>
#include <fcntl.h>

// The peer's regions as any bytes, against an Inbox which reads them by copying or in place:
// header, lines of the descriptor ring (also such as have the right stamps, or hardly any would be
// looked into), tables, payload, and regions announced, retired and announced again.

namespace capnpshm {
namespace fuzz {
namespace {

constexpr size_t REGION_BYTES = 16 << 10;
constexpr uint64_t LIMIT_WORDS = 4096;
constexpr uint64_t MAX_BYTES = 5 * REGION_BYTES;
constexpr uint MAX_REGIONS = 8;
constexpr uint MAX_HELD = 16;
constexpr uint FREE_ENTRIES = 64;

// Where the peer's header says, unless it lies, that things are.
constexpr size_t RING = 1024;
constexpr size_t DATA = RING + FIRST_RING_LINES * sizeof(DescriptorLine);

struct Reader {
  // The side that reads, of which all but the Inbox is used again and again.

  explicit Reader(uint freeEntries)
      : outbox(kj::atomicRefcounted<Outbox>(
            OutboxLimits { REGION_BYTES, REGION_BYTES, freeEntries },
            kj::atomicRefcounted<ForeignWake>(), PROTOCOL_VERSION)) {
    int number;
    KJ_SYSCALL(number = open("/dev/null", O_RDWR | O_CLOEXEC));
    notRegion = kj::AutoCloseFd(number);
  }

  kj::Own<Outbox> outbox;
  kj::AutoCloseFd notRegion;
};

class InboxFuzzer {
public:
  InboxFuzzer(Reader& reader, bool inPlace)
      : reader(reader), limits { LIMIT_WORDS, 16, MAX_BYTES, inPlace } {
    for (auto word: { &header().consumed, &header().freed }) word->store(0);
    addRegion();
  }

  void run(Input& input) {
    writePeerHeader(input);
    bool good = attempt([&]() {
      inbox = kj::atomicRefcounted<Inbox>(kj::atomicAddRef(*reader.outbox),
          kj::atomicRefcounted<PeerRegion>(0,
              mapPeerRegion(fd(0), REGION_BYTES, MAX_BYTES)),
          PROTOCOL_VERSION, limits, kj::atomicRefcounted<ForeignWake>());
    });
    while (good && !input.isEmpty()) good = attempt([&]() { step(input); });

    // The end comes while the application still has messages.
    if (inbox.get() != nullptr) inbox->close();
    inbox = nullptr;
    for (auto& message: held) message = nullptr;
  }

private:
  Reader& reader;
  InboxLimits limits;
  kj::Own<Inbox> inbox;
  kj::Maybe<OwnRegion> regions[MAX_REGIONS];
  uint regionCount = 0;
  kj::ArrayPtr<byte> ring;
  uint64_t position = FIRST_RING_LINES;
  uint64_t taken = 0;
  kj::Own<IncomingMessage> held[MAX_HELD];

  RegionHeader& header() { return reader.outbox->getHeader(); }
  kj::ArrayPtr<byte> memory(uint region) {
    return KJ_ASSERT_NONNULL(regions[region % regionCount]).mapping.bytes();
  }
  int fd(uint region) { return KJ_ASSERT_NONNULL(regions[region % regionCount]).fd; }
  DescriptorLine& line(uint64_t position) {
    return reinterpret_cast<DescriptorLine*>(ring.begin())
        [position % (ring.size() / sizeof(DescriptorLine))];
  }

  void addRegion() {
    regions[regionCount++] = createRegion(REGION_BYTES);
  }

  void writePeerHeader(Input& input) {
    ring = memory(0).slice(RING, DATA);
    auto& h = *reinterpret_cast<RegionHeader*>(memory(0).begin());
    h.version = PROTOCOL_VERSION;
    h.regionBytes = REGION_BYTES;
    h.freeOffset = sizeof(RegionHeader);
    h.freeEntries = FREE_ENTRIES;
    h.ringOffset = RING;
    h.ringLines = FIRST_RING_LINES;
    h.magic = REGION_MAGIC;
    for (uint lies = input.below(16) < 12 ? 0 : 1 + input.below(3); lies > 0; lies--) {
      writeWord(input, 0, input.below(8));
    }
  }

  void writeWord(Input& input, uint region, size_t index) {
    auto words = reinterpret_cast<SharedWord*>(memory(region).begin());
    auto& word = words[index % (REGION_BYTES / sizeof(SharedWord))];
    word = input.takeValue(word);
  }

  void step(Input& input) {
    switch (input.below(16)) {
      case 0: writeWord(input, input.below(regionCount), input.takeShort()); break;
      case 1: {
        auto& stamp = line(position + input.below(3)).stamp;
        stamp = input.takeValue(headStamp(position));
        break;
      }
      case 2: writeEntries(input); break;
      case 3: {
        auto target = memory(input.below(regionCount));
        size_t offset = input.below(REGION_BYTES / 8) * 8;
        auto bytes = input.takeBytes(kj::min(size_t(input.takeByte()), target.size() - offset));
        memcpy(target.begin() + offset, bytes.begin(), bytes.size());
        break;
      }
      case 4: case 5: case 6: case 7: publish(input); break;
      case 8: publishJump(input); break;
      case 9: announce(input); break;
      case 10: inbox->publishConsumed(input.takeFlag()); break;
      case 11: inbox->takeFreed(); break;
      case 12: held[input.below(MAX_HELD)] = nullptr; break;
      default: take(input); break;
    }
    // The peer may have as many freed as it was told of, no more.
    FUZZ_CHECK(header().freed.load() <= taken, header().freed.load(), " freed of ", taken);
  }

  void take(Input& input) {
    inbox->isReady();
    KJ_IF_MAYBE(m, inbox->tryTake(input.below(8) != 0)) {
      ++taken;
      auto& message = **m;
      FUZZ_CHECK(message.sizeInWords() <= LIMIT_WORDS, message.sizeInWords());
      attempt([&]() {
        // All of it is there, whatever it is.
        auto size = message.getBody().targetSize();
        FUZZ_CHECK(size.wordCount <= LIMIT_WORDS, size.wordCount);
        auto data = message.getBody().getAs<capnp::AnyStruct>().getDataSection();
        FUZZ_CHECK(limits.inPlace || !isPeersMapping(data.begin()), "read in place");
      });
      uint place = input.below(2 * MAX_HELD);
      if (place < MAX_HELD) held[place] = kj::mv(*m);
    }
    inbox->isIncomplete();
  }

  void putEntry(Input& input, uint64_t* target) {
    // Of a piece of a region, mostly.
    SegmentEntry entry { input.below(regionCount), input.takeByte(), 0 };
    entry.offset = entry.region == 0 ? DATA : 0;
    entry.offset += input.below((REGION_BYTES - entry.offset) / 8) * 8;
    target[0] = entry.packFirst();
    target[1] = entry.offset;
    uint lie = input.takeByte();
    if (lie < 2) target[lie] = input.takeValue(target[lie]);
  }

  void writeEntries(Input& input) {
    // A table, somewhere in the data: of segments, or of sizes.
    auto words = reinterpret_cast<uint64_t*>(memory(0).begin() + DATA) + input.below(64);
    uint count = 1 + input.below(40);
    if (input.takeFlag()) {
      uint step = input.below(64);
      for (uint i = 0; i < count; i++) {
        // One behind the other, so that they need not overlap.
        words[2 * i] = SegmentEntry { 0, step, 0 }.packFirst();
        words[2 * i + 1] = DATA + 4096 + i * step * 8;
      }
    } else {
      for (uint i = 0; i < count; i++) words[i] = input.takeByte();
    }
    if (input.takeFlag()) {
      auto& word = words[input.below(2 * count)];
      word = input.takeValue(word);
    }
  }

  void publish(Input& input) {
    DescriptorHead head { DescriptorKind(1 + input.below(6)), 0, 0, 0, 0 };
    uint64_t body[MAX_BODY_WORDS] = {};
    uint length = 0;
    switch (head.kind) {
      case DescriptorKind::MESSAGE:
      case DescriptorKind::MESSAGE_TABLE: {
        head.inlineWords = input.below(4) == 0 ? input.below(MAX_BODY_WORDS) : input.below(8);
        head.segments = head.inlineWords > 0;
        auto words = input.takeBytes(kj::min(uint(head.inlineWords), input.below(16)) * 8);
        memcpy(body, words.begin(), words.size());
        length = head.inlineWords;
        uint entries = input.below(6);
        if (entries == 0) break;
        if (length < MAX_BODY_WORDS) body[length++] = handle(input);
        if (head.kind == DescriptorKind::MESSAGE_TABLE) {
          head.segments += 1 + input.below(40);
          entries = 1;
          if (length + 2 <= MAX_BODY_WORDS) {
            body[length++] = SegmentEntry { 0,
                uint32_t((head.segments - (head.inlineWords > 0)) * 2), 0 }.packFirst();
            body[length++] = DATA + input.below(64) * 8;
          }
        } else {
          head.segments += entries;
          for (uint i = 0; i < entries && length + 2 <= MAX_BODY_WORDS; i++, length += 2) {
            putEntry(input, body + length);
          }
        }
        break;
      }
      case DescriptorKind::BEGIN:
        head.segments = 1 + input.below(40);
        body[0] = handle(input);
        body[1] = SegmentEntry { 0, head.segments, 0 }.packFirst();
        body[2] = DATA + input.below(64) * 8;
        length = 3;
        break;
      case DescriptorKind::PART:
        body[0] = handle(input);
        putEntry(input, body + 1);
        length = 3;
        break;
      case DescriptorKind::JUMP:
        putEntry(input, body);
        length = 2;
        break;
      case DescriptorKind::RETIRE:
        body[0] = input.below(MAX_REGIONS);
        length = 1;
        break;
    }
    if (input.below(8) == 0) head.fds = input.below(4);
    head.lines = linesForBody(length);

    uint64_t packed = head.pack();
    uint lie = input.below(16);
    if (lie == 0) packed = input.takeValue(packed);
    if (lie == 1) {
      auto& word = body[input.below(MAX_BODY_WORDS)];
      word = input.takeValue(word);
    }
    write(packed, body, head.lines);
    if (lie == 2) {
      auto& stamp = line(position - 1).stamp;
      stamp = input.takeValue(stamp);
    }
  }

  uint64_t handle(Input& input) {
    uint kind = input.takeByte();
    return kind < 128 ? FREE_BY_CONSUMPTION : kind < 250 ? kind : input.takeWord();
  }

  void write(uint64_t head, const uint64_t* body, uint lines) {
    // As a correct peer does, but that nobody looks meanwhile.
    for (uint i = 1; i < lines; i++) {
      auto& l = line(position + i);
      for (uint j = 0; j < CONTINUATION_BODY_WORDS; j++) l.words[j] = body[bodyCapacity(i) + j];
      l.stamp = continuationStamp(position + i);
    }
    auto& first = line(position);
    first.words[0] = head;
    for (uint j = 0; j < HEAD_BODY_WORDS; j++) first.words[1 + j] = body[j];
    first.stamp = headStamp(position);
    position += lines;
  }

  void publishJump(Input& input) {
    // One which can be followed, if the region was announced and is the right one.
    uint region = input.below(regionCount);
    size_t lines = size_t(FIRST_RING_LINES) << (1 + input.below(2));
    size_t offset = input.below(128) * CACHE_LINE;
    size_t bytes = lines * sizeof(DescriptorLine);
    uint64_t body[MAX_BODY_WORDS] =
        { SegmentEntry { region, uint32_t(bytes / 8), 0 }.packFirst(), offset };
    write(DescriptorHead { DescriptorKind::JUMP, 1, 0, 0, 0 }.pack(), body, 1);
    if (offset + bytes <= REGION_BYTES) ring = memory(region).slice(offset, offset + bytes);
  }

  void announce(Input& input) {
    uint lie = input.below(16);
    if (regionCount == MAX_REGIONS) lie = 1 + lie % 4;
    uint id = regionCount;
    kj::Maybe<int> number;
    uint64_t bytes = REGION_BYTES;
    if (lie == 0 || lie > 4) {
      addRegion();
      number = fd(id);
    }
    switch (lie) {
      case 1: number = fd(0); id = input.below(256); break;
      case 2: number = fd(0); bytes = input.takeValue(bytes); break;
      case 3: number = reader.notRegion.get(); break;
      case 4: break;
    }
    inbox->addRegion(id, number, bytes);
  }
};

}  // namespace
}  // namespace fuzz
}  // namespace capnpshm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capnpshm::fuzz;
  static Reader withFreeRing(FREE_ENTRIES), without(0);
  Watch watch;
  Input input(data, size);
  uint mode = input.below(4);
  InboxFuzzer(mode & 1 ? withFreeRing : without, mode & 2).run(input);
  checkRecycledRegions(2);
  return 0;
}
