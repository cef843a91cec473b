// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <kj/common.h>

// Every structure that crosses the process boundary through shared memory, and nothing else.
// Algorithms are in ring.h (descriptors, frees) and doorbell.h (the sleep word). docs/PROTOCOL.md
// describes the same in prose.
//
// Rules which hold for everything here:
// - A region has exactly one writing process, its owner; the peer maps it read-only.
// - All integers are 64-bit words in the machine's byte order (both ends are on one machine),
//   accessed through std::atomic, so that a peer that breaks the rules can cause wrong values but
//   never a data race in our process.
// - Fields written by the same process at different rhythms, or polled by the peer, lie
//   CACHE_LINE_PAIR bytes apart (the adjacent-line prefetcher of x86 works on pairs of lines).

namespace capnpshm {

using kj::byte;
using kj::uint;

using SharedWord = std::atomic<uint64_t>;
static_assert(sizeof(SharedWord) == 8 && alignof(SharedWord) == 8 &&
    SharedWord::is_always_lock_free, "shared words must be plain lock-free 64-bit words");

constexpr size_t CACHE_LINE = 64;
constexpr size_t CACHE_LINE_PAIR = 128;

constexpr uint64_t REGION_MAGIC = 0x6d6873706e706163ull;
// The bytes "capnpshm", read as a little-endian word.

constexpr uint32_t PROTOCOL_VERSION = 1;
// The one version of the layout that this code speaks. See docs/PROTOCOL.md, "Versions".

constexpr size_t MAX_SEGMENTS = 511;
// Of one message; the same limit as capnp's stream framing.

// ---------------------------------------------------------------------------------------
// Descriptor ring

struct alignas(CACHE_LINE) DescriptorLine {
  // One line of the descriptor ring. Word 0 is only ever a stamp, of a head or of a continuation,
  // so that payload can never be taken for a descriptor on a later lap.

  SharedWord stamp;
  SharedWord words[7];
  // Head: words[0] is the packed DescriptorHead, words[1..6] the first six words of the body.
  // Continuation: seven further words of the body.
};
static_assert(sizeof(DescriptorLine) == 64, "a descriptor line is one cache line");
static_assert(offsetof(DescriptorLine, words) == 8, "the stamp is word 0");

constexpr size_t FIRST_RING_LINES = 64;
// Of the ring in each side's first region. A constant of version 1, since each side publishes where
// it stands in the peer's ring before it has seen the peer's header.

constexpr uint HEAD_BODY_WORDS = 6;
constexpr uint CONTINUATION_BODY_WORDS = 7;

constexpr uint MAX_DESCRIPTOR_LINES = 8;
// A message whose descriptor would be longer keeps its segment table in the arena (MESSAGE_TABLE).

constexpr uint MAX_BODY_WORDS =
    HEAD_BODY_WORDS + (MAX_DESCRIPTOR_LINES - 1) * CONTINUATION_BODY_WORDS;

constexpr size_t LARGEST_RING_LINES = 65536;
// No JUMP leads to a larger ring, so that what a reader may find in it at once has an end.

constexpr uint MAX_FDS_AHEAD = 64;
// How many file descriptors may be sent before the peer has consumed the first message to which
// some belong, unless its offer says otherwise.

constexpr uint MAX_UNANSWERED_REGIONS = 4;
// How many announcements of regions may be unanswered.

constexpr uint MAX_SEALED_SEGMENTS = 16;
// Of one message, and the files for them count as so many messages with file descriptors.

constexpr uint32_t SEALED_SEGMENT = uint32_t(1) << 31;
// In SegmentEntry::region: not a region, but the sealed segment of this number among those that
// came with the message. Regions have numbers below that.

constexpr uint64_t headStamp(uint64_t position) { return position << 2 | 1; }
constexpr uint64_t continuationStamp(uint64_t position) { return position << 2 | 2; }
// `position` is an absolute line number which starts at the number of lines in the ring, so that
// zeroed memory never matches.
//
// From position 2^62 on the shift loses bits, and stamps repeat those of the beginning. No
// connection lives to see it: at a line a nanosecond it takes 146 years, and no peer can advance a
// position but by lines that were written. Even so every descriptor would still be recognized,
// since each lap overwrites the stamps of the one before; only an impossible stamp would be taken
// for none.

constexpr uint bodyCapacity(uint lines) {
  return lines == 0 ? 0 : HEAD_BODY_WORDS + (lines - 1) * CONTINUATION_BODY_WORDS;
}
constexpr uint linesForBody(uint words) {
  return words <= HEAD_BODY_WORDS ? 1
      : 1 + (words - HEAD_BODY_WORDS + CONTINUATION_BODY_WORDS - 1) / CONTINUATION_BODY_WORDS;
}

enum class DescriptorKind: uint8_t {
  MESSAGE = 1,
  // A whole message. Body: `inlineWords` words of its first segment (none if 0), then, if the
  // message has blocks, one word of free handle (see FREE_BY_CONSUMPTION) and a SegmentEntry for
  // each segment that is not inline.

  MESSAGE_TABLE = 2,
  // As MESSAGE, but the segment entries lie in the arena: after the handle comes one SegmentEntry
  // for the table, which is an array of SegmentEntry.

  BEGIN = 3,
  // A message that comes in parts, since there is no room for it in one piece. Body: one word of
  // free handle, one SegmentEntry for a table with one word for each segment, its size in words.
  // PART descriptors follow until all words are there; nothing else does in between but JUMP.

  PART = 4,
  // The next words of the message begun by BEGIN. Body: free handle, one SegmentEntry.

  JUMP = 5,
  // The ring goes on elsewhere. Body: one SegmentEntry, the new ring; its size in lines is a power
  // of two. Position numbers go on without a break.

  RETIRE = 6,
  // The owner will never again use a region. Body: one word, the region's id.
};

struct DescriptorHead {
  // The first word after a head's stamp, unpacked.

  DescriptorKind kind;
  uint8_t lines;         // Of this descriptor, head included.
  uint16_t segments;     // Of the message, the inline one included.
  uint16_t fds;          // File descriptors attached, sealed segments' included; they come in the
                         // next `fds` or `sealed` control record.
  uint16_t inlineWords;  // Of segment 0 in the body; 0 if it is not inline.

  uint64_t pack() const {
    return uint64_t(kind) | uint64_t(lines) << 8 | uint64_t(segments) << 16 |
        uint64_t(fds) << 32 | uint64_t(inlineWords) << 48;
  }
  static DescriptorHead unpack(uint64_t word) {
    return { DescriptorKind(uint8_t(word)), uint8_t(word >> 8), uint16_t(word >> 16),
             uint16_t(word >> 32), uint16_t(word >> 48) };
  }
};

struct SegmentEntry {
  // Where something lies in the sender's regions. Two words in a descriptor's body or a table.

  uint32_t region;
  uint32_t words;
  uint64_t offset;       // In bytes from the region's start; a multiple of 8.

  bool isSealed() const { return (region & SEALED_SEGMENT) != 0; }

  static constexpr uint WORDS = 2;
  uint64_t packFirst() const { return uint64_t(region) | uint64_t(words) << 32; }
  static SegmentEntry unpack(uint64_t first, uint64_t second) {
    return { uint32_t(first), uint32_t(first >> 32), second };
  }
};

constexpr uint64_t FREE_BY_CONSUMPTION = ~uint64_t(0);
// In place of a free handle: the reader copies the message out, and publishing that it consumed
// the descriptor frees the blocks.

// ---------------------------------------------------------------------------------------
// Region header

struct RegionHeader {
  // At the start of region 0 of each side. Written once by the owner, before it sends the region,
  // and checked by the peer when it has mapped it.

  SharedWord magic;        // REGION_MAGIC.
  SharedWord version;      // The agreed version.
  SharedWord regionBytes;
  SharedWord ringOffset;   // Where the first descriptor ring lies; a multiple of 64.
  SharedWord ringLines;    // A power of two.
  SharedWord freeOffset;   // Where the free ring lies, in which the owner, as reader, frees blocks.
  SharedWord freeEntries;  // A power of two, or 0 if the owner copies every message.
  uint8_t reserved0[CACHE_LINE_PAIR - 7 * 8];

  SharedWord sleepWord;    // epoch<<2 | wantRoom<<1 | wantData; see doorbell.h.
  SharedWord cpu;          // On which the owner last ran, plus one; 0 if it has not told. A hint.
  uint8_t reserved1[CACHE_LINE_PAIR - 2 * 8];

  SharedWord consumed;     // Position of the first line of the peer's ring not yet consumed.
  uint8_t reserved2[CACHE_LINE_PAIR - 8];

  SharedWord freed;        // How many handles the owner has put into its free ring so far.
  uint8_t reserved3[CACHE_LINE_PAIR - 8];
};
static_assert(sizeof(RegionHeader) == 512, "four pairs of cache lines");
static_assert(offsetof(RegionHeader, freeEntries) == 48, "part of the protocol");
static_assert(offsetof(RegionHeader, sleepWord) == 128, "part of the protocol");
static_assert(offsetof(RegionHeader, cpu) == 136, "part of the protocol");
static_assert(offsetof(RegionHeader, consumed) == 256, "part of the protocol");
static_assert(offsetof(RegionHeader, freed) == 384, "part of the protocol");

constexpr uint64_t WANT_DATA = 1;
constexpr uint64_t WANT_ROOM = 2;
constexpr uint SLEEP_EPOCH_SHIFT = 2;

}  // namespace capnpshm
