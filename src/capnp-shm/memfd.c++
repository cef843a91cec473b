// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "memfd.h"

#include "fault-point.h"
#include "huge-pages.h"
#include <atomic>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <mutex>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <kj/debug.h>
#include <kj/function.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef TMPFS_MAGIC
#define TMPFS_MAGIC 0x01021994
#endif

namespace capnpshm {

namespace {

std::atomic<uint64_t> currentGeneration{0};
// Not a singleton in the sense of the style guide: it has no interface but "which process am I",
// which is a property of the process.

std::once_flag atForkRegistered;

void ensureAtForkRegistered() {
  std::call_once(atForkRegistered, []() {
    pthread_atfork(nullptr, nullptr, []() {
      // Relaxed: the child has one thread, which is the one that reads it.
      currentGeneration.fetch_add(1, std::memory_order_relaxed);
    });
  });
}

constexpr int REQUIRED_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;

int createMemfd() {
  // MFD_NOEXEC_SEAL is known since Linux 6.3; an older kernel refuses unknown flags with EINVAL.
  faultPoint();
  int fd = memfd_create("capnp-shm", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) {
    fd = memfd_create("capnp-shm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  }
  if (fd < 0) {
    KJ_FAIL_SYSCALL("memfd_create()", errno, "cannot create shared memory");
  }
  faultPoint();
  return fd;
}

[[noreturn]] void failToMap(const char* call, int error, uint64_t bytes) {
  // Nobody's fault: the peer's memory cannot be had because of this process's limits or sandbox.
  kj::throwFatalException(KJ_EXCEPTION(OVERLOADED, "cannot map the peer's shared memory",
      call, strerror(error), bytes));
}

int retryInterrupted(kj::FunctionParam<int()> call) {
  int result;
  do {
    result = call();
  } while (result < 0 && errno == EINTR);
  return result;
}

}  // namespace

uint64_t forkGeneration() {
  // Relaxed: it changes only before a new process has any other thread.
  return currentGeneration.load(std::memory_order_relaxed);
}

Mapping::Mapping(kj::byte* begin, size_t size)
    : range(begin, size), generation(forkGeneration()) {}

Mapping::Mapping(Mapping&& other)
    : range(other.range), generation(other.generation) {
  other.range = nullptr;
}

Mapping::~Mapping() noexcept(false) {
  if (range.size() > 0 && generation == forkGeneration()) {
    faultPoint();
    KJ_SYSCALL(munmap(range.begin(), range.size())) { break; }
    faultPoint();
  }
}

void keepToThisProcess(kj::ArrayPtr<kj::byte> mapped) {
  // A fork child must not inherit the mapping: it would share our ring with us. And a core dump
  // need not hold the payload twice.
  ensureAtForkRegistered();
  KJ_SYSCALL(madvise(mapped.begin(), mapped.size(), MADV_DONTFORK));
  faultPoint();
  KJ_SYSCALL(madvise(mapped.begin(), mapped.size(), MADV_DONTDUMP));
  faultPoint();
}

OwnRegion newSharedMemory(size_t bytes) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  KJ_REQUIRE(bytes > 0 && bytes % pageSize == 0,
      "a region's size must be a positive multiple of the page size", bytes, pageSize);

  kj::AutoCloseFd fd(createMemfd());
  KJ_SYSCALL(ftruncate(fd, bytes), "cannot size shared memory", bytes);
  faultPoint();

  void* begin = mapAligned(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
  if (begin == MAP_FAILED) {
    KJ_FAIL_SYSCALL("mmap()", errno, "cannot map shared memory", bytes);
  }
  faultPoint();
  Mapping mapping(reinterpret_cast<kj::byte*>(begin), bytes);
  keepToThisProcess(mapping.bytes());

  // Allocated whole: a hole that the peer reads would be charged to the peer.
  allocateHugePages(fd, mapping.bytes());
  int error;
  do {
    error = posix_fallocate(fd, 0, bytes);
  } while (error == EINTR);
  if (error != 0) {
    KJ_FAIL_SYSCALL("posix_fallocate()", error, "cannot allocate shared memory", bytes);
  }
  faultPoint();
  return { kj::mv(fd), kj::mv(mapping) };
}

void requirePeerMemfd(int fd, int requiredSeals, uint64_t announcedBytes) {
  faultPoint();
  int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) {
    // EINVAL is what a file without seals answers; a sandbox has other errors.
    int error = errno;
    if (error != EINVAL && error != EBADF) failToMap("F_GET_SEALS", error, announcedBytes);
    KJ_FAIL_REQUIRE("peer sent as shared memory a file that cannot be sealed", strerror(error));
  }
  faultPoint();
  KJ_REQUIRE((seals & requiredSeals) == requiredSeals,
      "peer sent shared memory without the seals that it must have", seals, requiredSeals);

  struct statfs fs;
  if (retryInterrupted([&]() { return fstatfs(fd, &fs); }) < 0) {
    failToMap("fstatfs()", errno, announcedBytes);
  }
  faultPoint();
  // A hugetlb memfd can be sealed too, but touching it may raise SIGBUS when the pool is empty.
  KJ_REQUIRE(fs.f_type == TMPFS_MAGIC,
      "peer sent shared memory that is not an ordinary memfd", uint64_t(fs.f_type));

  struct stat stats;
  if (fstat(fd, &stats) < 0) failToMap("fstat()", errno, announcedBytes);
  faultPoint();
  KJ_REQUIRE(uint64_t(stats.st_size) == announcedBytes,
      "peer sent shared memory of another size than it announced", stats.st_size, announcedBytes);
  // Blocks beyond the end, which fallocate() can make, would make up for holes; to set the size to
  // what it is gives them back. Sealed as it is, nothing else can change, now or later.
  if (retryInterrupted([&]() { return ftruncate(fd, announcedBytes); }) < 0) {
    int error = errno;
    if (error != EINVAL && error != EBADF) failToMap("ftruncate()", error, announcedBytes);
    KJ_FAIL_REQUIRE("peer sent shared memory that is not open for writing", strerror(error));
  }
  faultPoint();
  if (fstat(fd, &stats) < 0) failToMap("fstat()", errno, announcedBytes);
  faultPoint();
  KJ_REQUIRE(uint64_t(stats.st_blocks) * 512 >= announcedBytes,
      "peer sent shared memory with holes", stats.st_blocks, announcedBytes);
}

OwnRegion createRegion(size_t bytes, kj::ArrayPtr<const kj::byte> beginning) {
  auto result = newSharedMemory(bytes);
  if (beginning.size() > 0) {
    KJ_REQUIRE(beginning.size() <= bytes, "a region begins with more than it holds",
        beginning.size(), bytes);
    ssize_t n;
    KJ_SYSCALL(n = pwrite(result.fd, beginning.begin(), beginning.size(), 0),
        "cannot write into shared memory");
    // Within memory that is allocated; there is no reason to stop halfway but a broken kernel.
    KJ_ASSERT(size_t(n) == beginning.size(), "pwrite() stopped halfway", n);
    faultPoint();
  }
  // After our own writable mapping, which FUTURE_WRITE leaves alone.
  KJ_SYSCALL(fcntl(result.fd, F_ADD_SEALS, REQUIRED_SEALS | F_SEAL_SEAL),
      "cannot seal shared memory; F_SEAL_FUTURE_WRITE needs Linux 5.1");
  faultPoint();
  return result;
}

Mapping mapPeerRegion(int fd, uint64_t announcedBytes, uint64_t maxBytes) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  KJ_REQUIRE(announcedBytes > 0 && announcedBytes % pageSize == 0,
      "peer announced a region whose size is not a positive multiple of the page size",
      announcedBytes);
  KJ_REQUIRE(announcedBytes <= maxBytes,
      "peer announced a larger region than this side accepts", announcedBytes, maxBytes);

  requirePeerMemfd(fd, REQUIRED_SEALS, announcedBytes);

  void* begin = mapAligned(announcedBytes, PROT_READ, MAP_SHARED, fd);
  if (begin == MAP_FAILED) {
    failToMap("mmap()", errno, announcedBytes);
  }
  faultPoint();
  Mapping mapping(reinterpret_cast<kj::byte*>(begin), announcedBytes);
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    keepToThisProcess(mapping.bytes());
  })) {
    kj::throwFatalException(KJ_EXCEPTION(OVERLOADED, "cannot map the peer's shared memory",
        exception->getDescription()));
  }
  return mapping;
}

}  // namespace capnpshm
