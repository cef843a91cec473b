// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/layout.h>

#include <gtest/gtest.h>
#include <random>
#include <set>
#include <string.h>

namespace capnpshm {
namespace {

// The numbers here are those of docs/PROTOCOL.md, written out: another implementation has only
// them.

TEST(Layout, MagicIsText) {
  EXPECT_EQ(0, memcmp(&REGION_MAGIC, "capnpshm", 8));
}

TEST(Layout, RegionHeader) {
  alignas(64) static byte memory[512];
  memset(memory, 0, sizeof(memory));
  auto& header = *reinterpret_cast<RegionHeader*>(memory);
  SharedWord* words[] = {
    &header.magic, &header.version, &header.regionBytes, &header.ringOffset, &header.ringLines,
    &header.freeOffset, &header.freeEntries, &header.sleepWord, &header.cpu,
    &header.consumed, &header.freed };
  size_t offsets[] = { 0, 8, 16, 24, 32, 40, 48, 128, 136, 256, 384 };
  for (size_t i = 0; i < kj::size(words); i++) {
    words[i]->store(0x0102030405060708 + i);
    uint64_t seen;
    memcpy(&seen, memory + offsets[i], 8);
    EXPECT_EQ(0x0102030405060708 + i, seen) << offsets[i];
  }
  EXPECT_EQ(512u, sizeof(RegionHeader));
}

TEST(Layout, DescriptorHead) {
  DescriptorHead head { DescriptorKind::BEGIN, 0x12, 0x3456, 0x789a, 0xbcde };
  EXPECT_EQ(0xbcde789a34561203u, head.pack());
  std::mt19937_64 random(1);
  for (int i = 0; i < 1000; i++) {
    uint64_t word = random();
    auto unpacked = DescriptorHead::unpack(word);
    EXPECT_EQ(word, unpacked.pack());
    EXPECT_EQ(uint8_t(word), uint8_t(unpacked.kind));
    EXPECT_EQ(uint8_t(word >> 8), unpacked.lines);
    EXPECT_EQ(uint16_t(word >> 16), unpacked.segments);
    EXPECT_EQ(uint16_t(word >> 32), unpacked.fds);
    EXPECT_EQ(uint16_t(word >> 48), unpacked.inlineWords);
  }
  EXPECT_EQ(1, int(DescriptorKind::MESSAGE));
  EXPECT_EQ(2, int(DescriptorKind::MESSAGE_TABLE));
  EXPECT_EQ(3, int(DescriptorKind::BEGIN));
  EXPECT_EQ(4, int(DescriptorKind::PART));
  EXPECT_EQ(5, int(DescriptorKind::JUMP));
  EXPECT_EQ(6, int(DescriptorKind::RETIRE));
}

TEST(Layout, SegmentEntry) {
  SegmentEntry entry { 0x11223344, 0x55667788, 0x99aabbccddeeff00 };
  EXPECT_EQ(0x5566778811223344u, entry.packFirst());
  auto unpacked = SegmentEntry::unpack(entry.packFirst(), entry.offset);
  EXPECT_EQ(entry.region, unpacked.region);
  EXPECT_EQ(entry.words, unpacked.words);
  EXPECT_EQ(entry.offset, unpacked.offset);
}

TEST(Layout, LinesAndBodies) {
  uint capacities[] = { 6, 13, 20, 27, 34, 41, 48, 55 };
  EXPECT_EQ(0u, bodyCapacity(0));
  for (uint lines = 1; lines <= MAX_DESCRIPTOR_LINES; lines++) {
    EXPECT_EQ(capacities[lines - 1], bodyCapacity(lines));
  }
  EXPECT_EQ(55u, MAX_BODY_WORDS);
  for (uint words = 0; words <= MAX_BODY_WORDS; words++) {
    // The least number of lines that holds them.
    uint lines = linesForBody(words);
    EXPECT_LE(words, bodyCapacity(lines));
    EXPECT_TRUE(lines == 1 || words > bodyCapacity(lines - 1)) << words;
  }
}

TEST(Layout, StampsDiffer) {
  // All stamps of all lines differ from each other and from zeroed memory, also where positions are
  // powers of two or next to them.
  std::set<uint64_t> seen { 0 };
  size_t count = 1;
  auto add = [&](uint64_t position) {
    seen.insert(headStamp(position));
    seen.insert(continuationStamp(position));
    count += 2;
  };
  for (uint64_t position = 16; position < 5000; position++) add(position);
  for (uint bit = 14; bit < 62; bit++) {
    for (int i = -2; i <= 2; i++) add((uint64_t(1) << bit) + i);
  }
  EXPECT_EQ(count, seen.size());
}

}  // namespace
}  // namespace capnpshm
