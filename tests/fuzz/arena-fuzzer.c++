// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-input.h"
#include "fuzz-oracle.h"
#include <capnp-shm/arena.h>

// Any sequence of operations on an Arena, against a model that knows of each line of memory to
// which block it belongs.

namespace capnpshm {
namespace fuzz {
namespace {

constexpr uint MAX_RANGES = 6;
constexpr uint MAX_LINES = 128;  // Of a range.
constexpr uint MAX_BLOCKS = 256;
const byte ZEROES[MAX_LINES * CACHE_LINE] = {};

struct ModelRange {
  bool exists = false;
  bool removed;
  uint32_t region;
  uint64_t offset;
  uint lines;
  uint taken;                // Lines of allocated blocks.
  bool isTaken[MAX_LINES];
  byte* memory;
};

struct ModelBlock {
  Arena::Block* block;
  ModelRange* range;
  size_t dirtyBytes;         // Of these each has the value of `mark`.
  byte mark;
};

class ArenaFuzzer {
public:
  explicit ArenaFuzzer(kj::ArrayPtr<byte> memory) {
    for (uint i = 0; i < MAX_RANGES; i++) {
      ranges[i].memory = memory.begin() + i * MAX_LINES * CACHE_LINE;
    }
  }

  void run(Input& input) {
    addRange(input);
    while (!input.isEmpty()) {
      uint operation = input.below(16);
      if (operation == 0) {
        addRange(input);
      } else if (operation == 1) {
        removeRange(input);
      } else if (operation < 9) {
        allocate(input);
      } else {
        free(input);
      }
      checkFigures();
    }
    while (blockCount > 0) free(input);
    checkFigures();
    FUZZ_CHECK(arena.getBytesInUse() == 0, arena.getBytesInUse());
  }

private:
  Arena arena;
  ModelRange ranges[MAX_RANGES];
  ModelBlock blocks[MAX_BLOCKS];
  uint blockCount = 0;
  uint32_t nextRegion = 0;

  void addRange(Input& input) {
    for (auto& range: ranges) {
      if (range.exists) continue;
      range.exists = true;
      range.removed = false;
      range.region = nextRegion++;
      range.offset = input.below(4) * CACHE_LINE;
      range.lines = 1 + input.below(MAX_LINES);
      range.taken = 0;
      memset(range.isTaken, 0, sizeof(range.isTaken));
      memset(range.memory, 0, MAX_LINES * CACHE_LINE);
      arena.addRange(range.region, range.offset,
          kj::arrayPtr(range.memory, range.lines * CACHE_LINE));
      return;
    }
  }

  void removeRange(Input& input) {
    auto& range = ranges[input.below(MAX_RANGES)];
    if (!range.exists || range.removed) return;
    arena.removeRange(range.region);
    range.removed = true;
    if (range.taken == 0) range.exists = false;
  }

  static uint longestGap(const ModelRange& range) {
    uint result = 0, length = 0;
    for (uint i = 0; i < range.lines; i++) {
      length = range.isTaken[i] ? 0 : length + 1;
      result = kj::max(result, length);
    }
    return result;
  }

  void allocate(Input& input) {
    if (blockCount == MAX_BLOCKS) return;
    size_t bytes;
    switch (input.below(8)) {
      case 0: bytes = 1 + input.below(MAX_LINES * CACHE_LINE + 64); break;
      case 1: bytes = size_t(kj::max(input.takeWord(), uint64_t(1))); break;
      case 2: bytes = (1 + input.below(MAX_LINES)) * CACHE_LINE; break;
      default: bytes = 1 + input.below(256); break;
    }
    KJ_IF_MAYBE(block, arena.tryAllocate(bytes)) {
      auto memory = block->bytes();
      FUZZ_CHECK(memory.size() >= bytes && memory.size() - bytes < CACHE_LINE &&
          memory.size() % CACHE_LINE == 0, memory.size(), " bytes for ", bytes);
      ModelRange* range = nullptr;
      for (auto& r: ranges) {
        if (r.exists && !r.removed && r.region == block->getRegion()) range = &r;
      }
      FUZZ_CHECK(range != nullptr, "region ", block->getRegion());
      FUZZ_CHECK(memory.begin() >= range->memory &&
          memory.end() <= range->memory + range->lines * CACHE_LINE, "outside its range");
      size_t distance = memory.begin() - range->memory;
      FUZZ_CHECK(distance % CACHE_LINE == 0, distance);
      FUZZ_CHECK(block->getOffset() == range->offset + distance, block->getOffset());
      for (size_t i = 0; i < memory.size() / CACHE_LINE; i++) {
        auto& taken = range->isTaken[distance / CACHE_LINE + i];
        FUZZ_CHECK(!taken, "overlaps another block");
        taken = true;
      }
      FUZZ_CHECK(memcmp(memory.begin(), ZEROES, memory.size()) == 0, "is not zeroed");

      range->taken += memory.size() / CACHE_LINE;
      size_t dirty = input.takeFlag() ? memory.size() : input.takeByte() % memory.size();
      byte mark = 1 + input.takeByte() % 255;
      memset(memory.begin(), mark, dirty);
      blocks[blockCount++] = { block, range, dirty, mark };
    } else {
      for (auto& range: ranges) {
        if (!range.exists || range.removed) continue;
        FUZZ_CHECK(longestGap(range) < bytes / CACHE_LINE + (bytes % CACHE_LINE != 0),
            "there is room for ", bytes, " bytes");
      }
    }
  }

  void free(Input& input) {
    if (blockCount == 0) return;
    uint index = input.below(blockCount);
    auto own = blocks[index];
    blocks[index] = blocks[--blockCount];
    auto memory = own.block->bytes();
    FUZZ_CHECK(own.dirtyBytes == 0 || (memory[0] == own.mark &&
        memcmp(memory.begin(), memory.begin() + 1, own.dirtyBytes - 1) == 0), "overwritten");
    FUZZ_CHECK(memcmp(memory.begin() + own.dirtyBytes, ZEROES, memory.size() - own.dirtyBytes) == 0,
        "overwritten");
    size_t distance = memory.begin() - own.range->memory;
    for (size_t i = 0; i < memory.size() / CACHE_LINE; i++) {
      own.range->isTaken[distance / CACHE_LINE + i] = false;
    }
    own.range->taken -= memory.size() / CACHE_LINE;
    // More than was written may be said to be dirty.
    arena.free(*own.block, input.takeFlag() ? memory.size() : own.dirtyBytes);
    if (own.range->removed && own.range->taken == 0) own.range->exists = false;
  }

  void checkFigures() {
    size_t capacity = 0, inUse = 0;
    for (auto& range: ranges) {
      if (!range.exists) continue;
      inUse += range.taken * CACHE_LINE;
      if (!range.removed) capacity += range.lines * CACHE_LINE;
      FUZZ_CHECK(arena.isUnused(range.region) == (range.taken == 0), "region ", range.region);
    }
    FUZZ_CHECK(arena.getBytesInUse() == inUse, arena.getBytesInUse(), " instead of ", inUse);
    FUZZ_CHECK(arena.getCapacity() == capacity, arena.getCapacity(), " instead of ", capacity);
  }
};

}  // namespace
}  // namespace fuzz
}  // namespace capnpshm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capnpshm::fuzz;
  alignas(capnpshm::CACHE_LINE) static kj::byte
      memory[MAX_RANGES * MAX_LINES * capnpshm::CACHE_LINE];
  Watch watch;
  Input input(data, size);
  ArenaFuzzer(memory).run(input);
  return 0;
}
