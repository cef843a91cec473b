// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/sealed.h>

#include "emulator.h"
#include "process-limits.h"
#include <fcntl.h>
#include <gtest/gtest.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <kj/debug.h>

// The parts of which sealed segments are made, each alone.

namespace capnpshm {
namespace {

constexpr size_t THRESHOLD = 16 * 1024;

TEST(SealedSegments, AtMostSixteenOfAMessage) {
  SealedSender sender({ THRESHOLD, 1 << 20, 1 << 30 });
  SealedSegments segments;
  for (kj::uint i = 0; i < MAX_SEALED_SEGMENTS; i++) {
    ASSERT_TRUE(segments.tryAllocate(sender, THRESHOLD) != nullptr);
  }
  EXPECT_TRUE(segments.tryAllocate(sender, THRESHOLD) == nullptr);
  EXPECT_EQ(MAX_SEALED_SEGMENTS, segments.countSealable());
}

struct Segment {
  SealedSender sender { { THRESHOLD, 1 << 20, 1 << 30 } };
  SealedSegments segments;
  kj::ArrayPtr<capnp::word> memory = segments.tryAllocate(sender, THRESHOLD);
  SealedFile file { nullptr, 0 };

  explicit Segment(int fill) {
    memset(memory.asBytes().begin(), fill, memory.asBytes().size());
    kj::ArrayPtr<const capnp::word> used = memory;
    auto files = segments.seal(kj::arrayPtr(&used, 1));
    KJ_REQUIRE(files.size() == 1);
    file = SealedFile { kj::mv(files[0].fd), files[0].bytes };
  }
};

TEST(SealedSegments, NobodyCanWriteThemAnyMore) {
  Segment segment(5);
  int fd = segment.file.fd;
  char byte = 1;
  EXPECT_EQ(-1, pwrite(fd, &byte, 1, 0));
  EXPECT_EQ(-1, ftruncate(fd, 0));
  EXPECT_EQ(-1, ftruncate(fd, 1 << 20));
  EXPECT_EQ(-1, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
  EXPECT_EQ(MAP_FAILED, mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  EXPECT_EQ(-1, fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
  memset(segment.memory.asBytes().begin(), 6, segment.memory.asBytes().size());
  auto opened = kj::atomicRefcounted<SealedBudget>(1 << 20)->open(
      segment.file, segment.memory.size());
  EXPECT_FALSE(opened->isCopied());
  for (auto b: opened->getWords().asBytes()) ASSERT_EQ(5, b);
}

TEST(SealedSegments, BudgetCountsWhatIsMapped) {
  Segment segment(5);
  auto budget = kj::atomicRefcounted<SealedBudget>(THRESHOLD + 4096);
  auto first = budget->open(segment.file, segment.memory.size());
  auto second = budget->open(segment.file, 512);
  auto third = budget->open(segment.file, 1);
  EXPECT_FALSE(first->isCopied());
  EXPECT_FALSE(second->isCopied());
  EXPECT_TRUE(third->isCopied());
  second = nullptr;
  EXPECT_FALSE(budget->open(segment.file, 1)->isCopied());
}

TEST(SealedSegments, WhatCannotBeMappedIsCopied) {
  CAPNP_SHM_NEEDS_SECCOMP;
  Segment segment(5);
  auto budget = kj::atomicRefcounted<SealedBudget>(1 << 20);
  pid_t child = fork();
  if (child == 0) {
    process::deny("private-map");
    auto opened = budget->open(segment.file, segment.memory.size());
    bool good = opened->isCopied() && opened->getWords().size() == segment.memory.size();
    for (auto b: opened->getWords().asBytes()) good = good && b == 5;
    _exit(good ? 0 : 1);
  }
  ASSERT_GT(child, 0);
  int status = -1;
  ASSERT_EQ(child, waitpid(child, &status, 0));
  EXPECT_EQ(0, status);
}

}  // namespace
}  // namespace capnpshm
