// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "tamper.h"

#include <fstream>
#include <memory>
#include <sched.h>
#include <sstream>
#include <unistd.h>

namespace capnpshm {
namespace hostile {

namespace {

// Relaxed, as all accesses here: whoever breaks the rules asks for no order.
uint64_t load(const SharedWord& word) { return word.load(std::memory_order_relaxed); }
void store(SharedWord& word, uint64_t value) { word.store(value, std::memory_order_relaxed); }

template <typename T>
T oneOf(std::mt19937_64& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

}  // namespace

uint64_t damagedPointer(uint64_t pointer, std::mt19937_64& random) {
  constexpr uint64_t FAR = 2, DOUBLE = 4;
  switch (random() % 12) {
    case 0: return pointer | uint64_t(0xffff) << 32;   // Data words of a struct.
    case 1: return pointer | uint64_t(0xffff) << 48;   // Its pointers.
    case 2: return pointer | ~uint64_t(7) << 32;       // Elements of a list.
    case 3: return pointer ^ (random() % 8) << 32;     // Their size.
    case 4: return pointer ^ random() % 4;             // The kind.
    case 5: return pointer ^ (random() % 64) << 2;     // The offset, a little
    case 6: return pointer ^ (random() & 0xfffffffc);  // or much.
    case 7: return FAR | (random() & 0x3f8) | (random() % 4) << 32;
    case 8: return FAR | DOUBLE | (random() & 0x3f8) | (random() % 4) << 32;
    case 9: return pointer ^ uint64_t(1) << (random() % 64);
    case 10: return 0;
    default: return random();
  }
}

// =======================================================================================

Tamperer::Tamperer(std::function<void(Tamperer&)> deedParam, uint64_t seed)
    : random(seed), deed(kj::mv(deedParam)), pace(random() % 4) {
  thread = std::thread([this]() {
    while (!stopped.load()) {
      deed(*this);
      switch (pace) {
        case 0: break;
        case 1: wait(); break;
        case 2: usleep(random() % 200); break;
        default: usleep(random() % 5000); break;
      }
    }
  });
}

Tamperer::~Tamperer() noexcept(false) {
  stopped.store(true);
  thread.join();
}

void Tamperer::rewrite(SharedWord& word, uint64_t value) {
  store(word, value);
  deeds.fetch_add(1, std::memory_order_relaxed);
}

void Tamperer::flip(SharedWord& word, uint64_t value, uint times) {
  uint64_t before = load(word);
  for (uint i = 0; i < times; i++) {
    store(word, value);
    wait();
    store(word, before);
    wait();
  }
  deeds.fetch_add(times, std::memory_order_relaxed);
}

void Tamperer::wait() {
  for (uint i = random() % 64; i > 0; i--) asm volatile("" ::: "memory");
  if (random() % 256 == 0) sched_yield();
}

// =======================================================================================

void OwnRegions::find() {
  regions.clear();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:capnp-shm") == std::string::npos) continue;
    if (line.find(" rw-s ") == std::string::npos) continue;
    std::istringstream text(line);
    uintptr_t begin, end;
    char dash;
    text >> std::hex >> begin >> dash >> end;
    auto words = reinterpret_cast<SharedWord*>(begin);
    if (load(words[0]) == REGION_MAGIC) {
      firstIndex = regions.size();
      if (ringOffset == 0) {
        // Unless an attack has damaged that already.
        uint64_t offset = load(reinterpret_cast<RegionHeader*>(words)->ringOffset);
        if (offset % CACHE_LINE == 0 && offset >= sizeof(RegionHeader) &&
            offset + FIRST_RING_LINES * sizeof(DescriptorLine) <= end - begin) {
          ringOffset = offset;
        }
      }
    }
    regions.push_back(kj::arrayPtr(words, (end - begin) / sizeof(SharedWord)));
  }
}

kj::ArrayPtr<SharedWord> OwnRegions::first() {
  if (regions.empty() || ++uses % 2000 == 0) find();
  if (regions.empty() || ringOffset == 0 || load(regions[firstIndex][0]) != REGION_MAGIC) {
    regions.clear();
    return nullptr;
  }
  return regions[firstIndex];
}

DescriptorLine& OwnRegions::line(std::mt19937_64& random) {
  auto bytes = reinterpret_cast<byte*>(regions[firstIndex].begin());
  return reinterpret_cast<DescriptorLine*>(bytes + ringOffset)[random() % FIRST_RING_LINES];
}

kj::ArrayPtr<SharedWord> OwnRegions::freeRing() {
  return regions[firstIndex].slice(
      sizeof(RegionHeader) / sizeof(SharedWord), ringOffset / sizeof(SharedWord));
}

SharedWord& OwnRegions::any(std::mt19937_64& random) {
  auto& region = regions[random() % regions.size()];
  size_t header = &region == &regions[firstIndex] ? sizeof(RegionHeader) / sizeof(SharedWord) : 0;
  // Mostly where most is, at the beginning.
  size_t size = random() % 2 == 0 ? std::min<size_t>(region.size(), 2048) : region.size();
  return region[header + random() % (size - header)];
}

// =======================================================================================

namespace {

RegionHeader& headerOf(kj::ArrayPtr<SharedWord> region) {
  return *reinterpret_cast<RegionHeader*>(region.begin());
}

uint64_t badStamp(uint64_t stamp, std::mt19937_64& random) {
  uint64_t position = stamp >> 2;
  switch (random() % 8) {
    case 0: return headStamp(position + FIRST_RING_LINES);
    case 1: return headStamp(position - FIRST_RING_LINES);
    case 2: return continuationStamp(position + FIRST_RING_LINES);
    case 3: return stamp ^ 3;
    case 4: return headStamp(position + 1);
    case 5: return 0;
    case 6: return ~uint64_t(0);
    default: return random();
  }
}

uint64_t badHead(uint64_t word, std::mt19937_64& random) {
  auto head = DescriptorHead::unpack(word);
  switch (random() % 6) {
    case 0: head.kind = DescriptorKind(random() % 9); break;
    case 1: head.lines = random() % 10; break;
    case 2: head.segments = oneOf<uint16_t>(random, { 0, 1, 2, 3, 511, 512, 0xffff }); break;
    case 3: head.fds = oneOf<uint16_t>(random, { 0, 1, 2, 64, 0xffff }); break;
    case 4: head.inlineWords = oneOf<uint16_t>(random, { 0, 1, 6, 13, 20, 55, 56, 0xffff }); break;
    default: return random();
  }
  return head.pack();
}

uint64_t badEntryWord(std::mt19937_64& random, size_t bytes) {
  // The first word of an entry, or its offset, or a handle.
  switch (random() % 8) {
    case 0: return SegmentEntry { uint32_t(random() % 4), uint32_t(random()), 0 }.packFirst();
    case 1: return SegmentEntry { uint32_t(random()), uint32_t(random() % 64), 0 }.packFirst();
    case 2: return SegmentEntry { 0, uint32_t(random() % 8192), 0 }.packFirst();
    case 3: return bytes - random() % 16 * 4;
    case 4: return ~uint64_t(0) - random() % 64;
    case 5: return random() % bytes & ~uint64_t(7);
    case 6: return random() % bytes;
    default: return random();
  }
}

void doDeed(Attack attack, bool once, OwnRegions& regions, Tamperer& tamperer) {
  auto region = regions.first();
  auto& random = tamperer.random;
  if (region == nullptr) {
    usleep(1000);
    return;
  }
  auto& header = headerOf(region);
  auto change = [&](SharedWord& word, uint64_t value) {
    if (once) {
      tamperer.rewrite(word, value);
    } else {
      tamperer.flip(word, value, 1 + random() % 8);
    }
  };

  switch (attack) {
    case Attack::STAMPS: {
      auto& stamp = regions.line(random).stamp;
      change(stamp, badStamp(load(stamp), random));
      return;
    }
    case Attack::HEADS: {
      auto& line = regions.line(random);
      if ((load(line.stamp) & 3) == 1) change(line.words[0], badHead(load(line.words[0]), random));
      return;
    }
    case Attack::ENTRIES: {
      auto& line = regions.line(random);
      auto& word = line.words[1 + random() % 6];
      // Often that of a neighbour, so that segments overlap.
      change(word, random() % 2 == 0 ? load(line.words[1 + random() % 6])
                                     : badEntryWord(random, region.size() * sizeof(SharedWord)));
      return;
    }
    case Attack::POINTERS:
      for (uint i = 0; i < 64; i++) {
        auto& word = regions.any(random);
        uint64_t value = load(word);
        // What looks like a pointer to something near.
        if (value != 0 && (value & 0xfffff000) == 0) {
          tamperer.flip(word, damagedPointer(value, random), 50);
          return;
        }
      }
      return;
    case Attack::FREES: {
      auto ring = regions.freeRing();
      if (random() % 4 == 0 || ring.size() == 0) {
        uint64_t freed = load(header.freed);
        change(header.freed, oneOf<uint64_t>(random,
            { freed + 1, freed - 1, freed + 100, 0, ~uint64_t(0), random() }));
      } else {
        auto& handle = ring[random() % ring.size()];
        // Another's, or one of another generation.
        change(handle, random() % 2 == 0 ? load(ring[random() % ring.size()])
            : load(handle) ^ uint64_t(1) << random() % 64);
      }
      return;
    }
    case Attack::CONSUMED: {
      uint64_t consumed = load(header.consumed);
      change(header.consumed, oneOf<uint64_t>(random,
          { consumed + 1, consumed - 1, consumed + FIRST_RING_LINES, 0, ~uint64_t(0), random() }));
      return;
    }
    case Attack::SLEEP_WORD:
      // Nothing that the victim could complain of.
      tamperer.rewrite(header.sleepWord, random());
      return;
    case Attack::HEADER:
      change(region[1 + random() % (sizeof(RegionHeader) / sizeof(SharedWord) - 1)], random());
      return;
    case Attack::RANDOM: {
      auto& word = regions.any(random);
      change(word, random() % 2 == 0 ? random() : load(word) ^ uint64_t(1) << random() % 64);
      return;
    }
    case Attack::EVERYTHING:
      doDeed(Attack(uint(Attack::STAMPS) + random() % (uint(Attack::RANDOM) -
          uint(Attack::STAMPS) + 1)), once, regions, tamperer);
      return;
    default:
      usleep(1000);
      return;
  }
}

}  // namespace

std::function<void(Tamperer&)> deedFor(Attack attack, bool once) {
  auto regions = std::make_shared<OwnRegions>();
  return [=](Tamperer& tamperer) { doDeed(attack, once, *regions, tamperer); };
}

}  // namespace hostile
}  // namespace capnpshm
