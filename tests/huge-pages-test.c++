// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/huge-pages.h>

#include "emulator.h"
#include "smaps.h"

#include <errno.h>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/io.h>
#include <capnp-shm/memfd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace capnpshm {
namespace {

using kj::byte;

constexpr size_t PAGE = 4096;

uint64_t kibOf(const void* address, const char* field) {
  KJ_IF_MAYBE(value, mappingField(address, field)) return std::stoull(value->cStr());
  ADD_FAILURE() << "no such mapping, or no such field: " << field;
  return 0;
}

size_t addressesMapped() {
  // Of the whole process, in pages.
  std::ifstream statm("/proc/self/statm");
  size_t result = 0;
  statm >> result;
  return result;
}

bool isAligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % HUGE_PAGE == 0;
}

kj::AutoCloseFd newMemfd(size_t bytes) {
  int fd;
  KJ_SYSCALL(fd = memfd_create("test", MFD_CLOEXEC));
  kj::AutoCloseFd result(fd);
  KJ_SYSCALL(ftruncate(fd, bytes));
  return result;
}

bool canCollapse() {
  // Whether the kernel knows how, and has a huge page to spare.
  auto fd = newMemfd(HUGE_PAGE);
  void* begin = mapAligned(HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
  KJ_ASSERT(begin != MAP_FAILED);
  KJ_DEFER(munmap(begin, HUGE_PAGE));
  KJ_ASSERT(posix_fallocate(fd, 0, HUGE_PAGE) == 0);
  return madvise(begin, HUGE_PAGE, MADV_COLLAPSE) == 0 &&
      kibOf(begin, "ShmemPmdMapped:") == HUGE_PAGE / 1024;
}

TEST(HugePages, MapAlignedMapsWhatItSaysAndNoMore) {
  for (size_t bytes: { PAGE, HUGE_PAGE - PAGE, HUGE_PAGE, HUGE_PAGE + PAGE, 5 * HUGE_PAGE }) {
    auto fd = newMemfd(bytes);
    size_t before = addressesMapped();
    void* begin = mapAligned(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    ASSERT_NE(MAP_FAILED, begin) << bytes << ' ' << strerror(errno);
    EXPECT_EQ(bytes / PAGE, addressesMapped() - before) << bytes;
    EXPECT_TRUE(isAligned(begin) || bytes < HUGE_PAGE) << begin;

    auto last = static_cast<byte*>(begin) + bytes - 1;
    *last = 123;
    byte read = 0;
    ASSERT_EQ(1, pread(fd, &read, 1, bytes - 1));
    EXPECT_EQ(123, read) << "offset 0 is at the beginning";
    ASSERT_EQ(0, munmap(begin, bytes));
    EXPECT_EQ(before, addressesMapped()) << bytes;
  }
}

TEST(HugePages, MapAlignedLeavesNothingWhenItFails) {
  size_t before = addressesMapped();
  errno = 0;
  EXPECT_EQ(MAP_FAILED, mapAligned(3 * HUGE_PAGE, PROT_READ, MAP_SHARED, -1));
  EXPECT_EQ(EBADF, errno);
  EXPECT_EQ(before, addressesMapped());
  EXPECT_EQ(MAP_FAILED, mapAligned(SIZE_MAX, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1));
}

TEST(HugePages, MapAlignedNeedsNoMoreThanItMaps) {
  // Where address space is limited, alignment must not cost a mapping that would fit.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers need address space without limits";
#endif
  if (!isAddressSpaceLimited()) GTEST_SKIP() << "RLIMIT_AS does nothing, as under qemu-user";
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    constexpr size_t BYTES = 64 * HUGE_PAGE;
    rlimit limit = { addressesMapped() * PAGE + BYTES + HUGE_PAGE / 2, RLIM_INFINITY };
    if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(2);
    _exit(mapAligned(BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1) == MAP_FAILED);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(HugePages, RegionsOfBothEndsAreInThem) {
  if (!canCollapse()) {
    GTEST_SKIP() << "this kernel collapses no shared memory, or has none to spare";
  }
  // The rest that fills no huge page is not forgotten either.
  constexpr size_t BYTES = 2 * HUGE_PAGE + 3 * PAGE;
  auto own = createRegion(BYTES);
  auto peer = mapPeerRegion(own.fd, BYTES, BYTES);
  auto written = own.mapping.bytes();
  EXPECT_EQ(4096u, kibOf(written.begin(), "ShmemPmdMapped:"));
  for (auto value: written) ASSERT_EQ(0, value);
  for (size_t i = 0; i < BYTES; i++) written[i] = i % 251;
  auto read = peer.bytes();
  for (size_t i = 0; i < BYTES; i++) ASSERT_EQ(byte(i % 251), read[i]) << i;
  EXPECT_EQ(4096u, kibOf(read.begin(), "ShmemPmdMapped:"));
}

TEST(HugePages, ContentsStay) {
  // Wherever it lies, and whether there are pages already or holes.
  constexpr size_t BYTES = 3 * HUGE_PAGE + 5 * PAGE;
  auto reserved = mapAligned(2 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  ASSERT_NE(MAP_FAILED, reserved);
  Mapping reservation(static_cast<byte*>(reserved), 2 * BYTES);
  for (size_t misaligned: { size_t(0), PAGE, HUGE_PAGE - PAGE }) {
    auto fd = newMemfd(BYTES);
    auto memory = static_cast<byte*>(mmap(reservation.bytes().begin() + misaligned, BYTES,
        PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0));
    ASSERT_NE(MAP_FAILED, memory);
    auto bytes = kj::arrayPtr(memory, BYTES);
    auto isSet = [](size_t i) { return i / PAGE % 100 == 7 || i / HUGE_PAGE == 1; };
    for (size_t i = 0; i < BYTES; i++) {
      if (isSet(i)) bytes[i] = i % 249;
    }
    allocateHugePages(fd, bytes);
    for (size_t i = 0; i < BYTES; i++) {
      ASSERT_EQ(isSet(i) ? byte(i % 249) : 0, bytes[i]) << misaligned << ' ' << i;
    }
  }
}

TEST(HugePages, TooSmallIsNoFailure) {
  auto fd = newMemfd(HUGE_PAGE);
  auto memory = mmap(nullptr, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(MAP_FAILED, memory);
  Mapping mapping(static_cast<byte*>(memory), HUGE_PAGE);
  allocateHugePages(fd, mapping.bytes().slice(0, HUGE_PAGE - PAGE));
  allocateHugePages(fd, nullptr);
  struct stat stats;
  KJ_SYSCALL(fstat(fd, &stats));
  EXPECT_EQ(0, stats.st_blocks);
}

TEST(HugePages, PopulatedPagesAreMapped) {
  constexpr size_t BYTES = 50 * PAGE;
  auto fd = newMemfd(BYTES);
  KJ_ASSERT(posix_fallocate(fd, 0, BYTES) == 0);
  void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(MAP_FAILED, memory);
  Mapping mapping(static_cast<byte*>(memory), BYTES);
  if (madvise(memory, BYTES, MADV_POPULATE_WRITE) != 0) {
    GTEST_SKIP() << "this kernel does not populate: " << strerror(errno);
  }
  auto other = newMemfd(BYTES);
  KJ_ASSERT(posix_fallocate(other, 0, BYTES) == 0);
  memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
  ASSERT_NE(MAP_FAILED, memory);
  Mapping populated(static_cast<byte*>(memory), BYTES);
  EXPECT_EQ(0u, kibOf(memory, "Rss:"));
  populatePages(populated.bytes());
  EXPECT_EQ(BYTES / 1024, kibOf(memory, "Rss:"));
}

}  // namespace
}  // namespace capnpshm
