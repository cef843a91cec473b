// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "layout.h"
#include <kj/array.h>
#include <kj/memory.h>
#include <kj/vector.h>

namespace capnpshm {

class Arena {
  // Allocates blocks of zeroed memory in the regions that this side writes.
  //
  // All bookkeeping is in private memory: nothing that the peer can see, let alone change, decides
  // where we write. Blocks are whole cache lines, so that no line belongs to two messages, and
  // may be freed in any order.
  //
  // Policy: the block freed last is handed out first, because its lines are still in our cache and
  // its pages are mapped; a larger free block is split only if there is none that fits, and free
  // neighbours are merged only when an allocation would fail otherwise. Memory is zeroed when it
  // is handed out again, exactly as far as its previous user said it wrote. (Segregated free lists
  // with deferred coalescing; see Wilson et al., "Dynamic Storage Allocation: A Survey and
  // Critical Review", 1995, sections 3.5 and 3.6.)
  //
  // Invariant: each range is tiled by blocks; each free block is in the list of its size class and
  // is zero beyond its first `dirty` bytes. Single-threaded.

public:
  class Block {
    // An allocated piece of a region. Belongs to the arena; valid until free().

  public:
    kj::ArrayPtr<byte> bytes() const { return kj::arrayPtr(start, size); }
    uint32_t getRegion() const { return region; }
    uint64_t getOffset() const { return offset; }  // In bytes from the region's start.

  private:
    byte* start = nullptr;
    size_t size = 0;
    size_t dirty = 0;          // If free: bytes at the start that may not be zero.
    uint64_t offset = 0;
    uint32_t region = 0;
    bool isFree = false;
    Block* lower = nullptr;    // Neighbours in the range, by address.
    Block* upper = nullptr;
    Block* previous = nullptr; // Neighbours in the free list.
    Block* next = nullptr;

    friend class Arena;
  };

  Arena();
  ~Arena() noexcept(false);
  KJ_DISALLOW_COPY(Arena);

  void addRange(uint32_t region, uint64_t offset, kj::ArrayPtr<byte> zeroed);
  // Adds memory to allocate from, at most one range a region: `zeroed` lies `offset` bytes into
  // `region`. Both ends must be multiples of a cache line.

  void removeRange(uint32_t region);
  // Takes a region's free memory out of use. Its allocated blocks stay valid, and are forgotten
  // when they are freed.

  kj::Maybe<Block&> tryAllocate(size_t bytes);
  // A block of at least `bytes` zeroed bytes, rounded up to whole cache lines; null if no free
  // memory is large enough. `bytes` must be positive.

  void free(Block& block, size_t dirtyBytes);
  // Gives back a block of whose bytes only the first `dirtyBytes` may differ from zero.

  bool zeroSome(size_t limit);
  // Zeroes up to `limit` bytes of large blocks that were freed lately, so that tryAllocate() need
  // not. True if there is more of that kind.

  static constexpr size_t LARGE_BLOCK = 16 * 1024;
  // From this size on, in bytes, a block is large: zeroing it takes longer than what else there is
  // to do for a message. So one that is zeroed already is handed out before the one freed last.

  static constexpr size_t MAX_PAIRED_BLOCK = 4 * 1024 * 1024;
  // But not beyond this size, in bytes: two such blocks do not fit into the caches together, and
  // changing from one to the other costs more than zeroing the one, part of which is still there.

  uint getLargeBlocksInUse() const { return largeInUse; }

  size_t getBytesInUse() const { return bytesInUse; }
  size_t getCapacity() const { return capacity; }
  // Bytes allocated now, and bytes of all ranges in use.

  bool isUnused(uint32_t region) const;
  // Whether no block of `region` is allocated.

private:
  struct Range {
    uint32_t region;
    size_t bytes;
    size_t inUse;
    bool removed;
    Block* first;
  };

  static constexpr uint EXACT_CLASSES = 32;
  static constexpr uint CLASS_COUNT = EXACT_CLASSES + 4 * 40;
  // A class for each size of up to 32 lines, then four for each power of two.

  Block* classes[CLASS_COUNT];
  uint64_t nonEmpty[(CLASS_COUNT + 63) / 64];
  kj::Vector<Range> ranges;
  size_t bytesInUse = 0;
  size_t capacity = 0;
  uint largeInUse = 0;

  static constexpr uint REMEMBERED = 4;
  Block* freedLately[REMEMBERED] = {};
  uint freedCount = 0;
  // Large blocks that were freed dirty, the last of them at `(freedCount - 1) % REMEMBERED`. What
  // has become of them since, each tells by itself: it may describe something else by now, or
  // nothing.

  kj::Vector<kj::Own<Block>> blocks;
  kj::Vector<Block*> spare;
  // All bookkeeping blocks, and those which describe nothing now.

  static uint classOf(size_t size);
  Block& newBlock();
  void link(Block& block);
  void unlink(Block& block);
  Range& rangeOf(uint32_t region);
  Block* findFit(size_t size);
  bool mergeNeighbours();
};

}  // namespace capnpshm
