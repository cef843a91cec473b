// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/memfd.h>

#include "emulator.h"
#include "smaps.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <iostream>
#include <string>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <gtest/gtest.h>
#include <kj/debug.h>

namespace capnpshm {
namespace {

using kj::byte;

constexpr size_t SIZE = 32768;

kj::AutoCloseFd makeMemfd(size_t size, int seals, bool allocate = true) {
  int fd;
  KJ_SYSCALL(fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  kj::AutoCloseFd result(fd);
  KJ_SYSCALL(ftruncate(fd, size));
  if (allocate) { KJ_ASSERT(posix_fallocate(fd, 0, size) == 0); }
  KJ_SYSCALL(fcntl(fd, F_ADD_SEALS, seals));
  return result;
}

constexpr int FUTURE_WRITE = 0x10;  // F_SEAL_FUTURE_WRITE, which older C libraries lack.
constexpr int ALL_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | FUTURE_WRITE;

kj::String failure(int fd, uint64_t announced, uint64_t max = 1 << 20) {
  // The description of what mapPeerRegion() throws, with its type.
  KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { mapPeerRegion(fd, announced, max); })) {
    return kj::str(e->getType(), ": ", e->getDescription());
  }
  return kj::str("mapped");
}

TEST(Memfd, PeerSeesWhatOwnerWrites) {
  auto own = createRegion(SIZE);
  auto peer = mapPeerRegion(own.fd, SIZE, SIZE);
  own.mapping.bytes()[100] = 42;
  EXPECT_EQ(42, peer.bytes()[100]);
  EXPECT_EQ(SIZE, peer.bytes().size());
}

TEST(Memfd, RegionMayBeginWithSomething) {
  auto beginning = kj::heapArray<byte>(100);
  memset(beginning.begin(), 7, beginning.size());
  auto own = createRegion(SIZE, beginning);
  // Nothing is touched for it, which would cost a page fault.
  auto resident = KJ_ASSERT_NONNULL(mappingField(own.mapping.bytes().begin(), "Rss:"));
  EXPECT_EQ(0u, std::stoul(resident.cStr()));
  auto peer = mapPeerRegion(own.fd, SIZE, SIZE);
  for (auto bytes: { own.mapping.bytes(), peer.bytes() }) {
    EXPECT_TRUE(bytes.slice(0, 100) == beginning);
    EXPECT_EQ(0, bytes[100]);
    EXPECT_EQ(0, bytes[SIZE - 1]);
  }
  EXPECT_ANY_THROW(createRegion(SIZE, kj::heapArray<byte>(SIZE + 1)));
}

template <typename Func>
void expectFails(int error, Func&& call, const char* what) {
  errno = 0;
  EXPECT_EQ(-1, call()) << what;
  EXPECT_EQ(error, errno) << what << ": " << strerror(errno);
}

void expectReadOnly(int fd) {
  // Whoever has the fd cannot change the memory by any way there is.
  auto mapShared = [](int fd, int protection) {
    return mmap(nullptr, SIZE, protection, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0;
  };
  expectFails(EPERM, [&]() { return mapShared(fd, PROT_READ | PROT_WRITE); }, "mmap");
  expectFails(EPERM, [&]() { return mapShared(fd, PROT_WRITE); }, "mmap for writing only");
  expectFails(EPERM, [&]() { return write(fd, "x", 1); }, "write");
  expectFails(EPERM, [&]() { return pwrite(fd, "x", 1, 100); }, "pwrite");
  expectFails(EPERM, [&]() { return ftruncate(fd, SIZE * 2); }, "growing");
  expectFails(EPERM, [&]() { return ftruncate(fd, SIZE - 4096); }, "shrinking");
  expectFails(EPERM, [&]() { return fallocate(fd, 0, 0, SIZE * 2); }, "allocating beyond the end");
  expectFails(EPERM, [&]() {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096);
  }, "punching a hole");
  expectFails(EPERM, [&]() { return fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE); }, "adding a seal");
}

TEST(Memfd, ReceiverCannotWrite) {
  auto own = createRegion(SIZE);
  expectReadOnly(own.fd);

  // Nor can it through another open file of the same memory.
  int reopened;
  KJ_SYSCALL(reopened = open(kj::str("/proc/self/fd/", own.fd.get()).cStr(), O_RDWR | O_CLOEXEC));
  kj::AutoCloseFd reopenedFd(reopened);
  expectReadOnly(reopened);

  auto peer = mapPeerRegion(own.fd, SIZE, SIZE);
  expectFails(EACCES, [&]() {
    return mprotect(peer.bytes().begin(), SIZE, PROT_READ | PROT_WRITE);
  }, "mprotect");
  if (isMadviseThere()) {
    expectFails(EACCES, [&]() {
      return madvise(peer.bytes().begin(), 4096, MADV_REMOVE);
    }, "madvise");
  } else {
    std::cout << "not tried: madvise() does nothing, as under qemu-user" << std::endl;
  }
  for (auto b: own.mapping.bytes()) ASSERT_EQ(0, b);

  // The owner's own mapping stays as it was.
  own.mapping.bytes()[SIZE - 1] = 1;
  EXPECT_EQ(1, peer.bytes()[SIZE - 1]);
}

TEST(Memfd, RegionIsAllocatedWholeAndSealed) {
  auto own = createRegion(SIZE);
  struct stat stats;
  KJ_SYSCALL(fstat(own.fd, &stats));
  EXPECT_EQ(SIZE, size_t(stats.st_size));
  EXPECT_LE(SIZE, size_t(stats.st_blocks) * 512);
  EXPECT_EQ(ALL_SEALS | F_SEAL_SEAL, fcntl(own.fd, F_GET_SEALS) & (ALL_SEALS | F_SEAL_SEAL));
  EXPECT_TRUE(fcntl(own.fd, F_GETFD) & FD_CLOEXEC);
  for (auto b: own.mapping.bytes()) ASSERT_EQ(0, b);
}

#define EXPECT_FAILURE(text, ...) \
  do { \
    auto failure_ = failure(__VA_ARGS__); \
    EXPECT_EQ(0, strncmp(failure_.cStr(), "failed: ", 8)) << failure_.cStr(); \
    EXPECT_NE(nullptr, strstr(failure_.cStr(), text)) << failure_.cStr(); \
  } while (false)

TEST(Memfd, RefusesMissingSeals) {
  EXPECT_STREQ("mapped", failure(makeMemfd(SIZE, ALL_SEALS), SIZE).cStr());
  // Each alone, and all.
  for (int missing: { F_SEAL_SHRINK, F_SEAL_GROW, FUTURE_WRITE, ALL_SEALS }) {
    EXPECT_FAILURE("without the seals", makeMemfd(SIZE, ALL_SEALS & ~missing), SIZE);
  }
  // F_SEAL_WRITE is a stronger promise than FUTURE_WRITE, but not what the protocol demands.
  EXPECT_FAILURE("without the seals",
      makeMemfd(SIZE, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), SIZE);
  int unsealable;
  KJ_SYSCALL(unsealable = memfd_create("test", MFD_CLOEXEC));
  kj::AutoCloseFd fd(unsealable);
  KJ_SYSCALL(ftruncate(fd, SIZE));
  EXPECT_FAILURE("without the seals", fd, SIZE);
}

TEST(Memfd, RefusesHoles) {
  EXPECT_FAILURE("holes", makeMemfd(SIZE, ALL_SEALS, false), SIZE);

  // A single page is enough.
  auto onePage = makeMemfd(SIZE, 0);
  KJ_SYSCALL(fallocate(onePage, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 4096));
  KJ_SYSCALL(fcntl(onePage, F_ADD_SEALS, ALL_SEALS));
  EXPECT_FAILURE("holes", onePage, SIZE);
}

TEST(Memfd, BlocksBeyondTheEndDoNotMakeUpForHoles) {
  auto region = makeMemfd(SIZE, 0, false);
  KJ_SYSCALL(fallocate(region, FALLOC_FL_KEEP_SIZE, SIZE, SIZE));
  KJ_SYSCALL(fcntl(region, F_ADD_SEALS, ALL_SEALS));
  struct stat stats;
  KJ_SYSCALL(fstat(region, &stats));
  ASSERT_EQ(SIZE, size_t(stats.st_size));
  ASSERT_LE(SIZE, size_t(stats.st_blocks) * 512);
  EXPECT_FAILURE("holes", region, SIZE);
}

TEST(Memfd, RefusesWhatIsOpenForReadingOnly) {
  // For then that cannot be found out.
  auto own = createRegion(SIZE);
  int fd;
  KJ_SYSCALL(fd = open(kj::str("/proc/self/fd/", own.fd.get()).cStr(), O_RDONLY | O_CLOEXEC));
  EXPECT_FAILURE("not open for writing", kj::AutoCloseFd(fd), SIZE);
}

TEST(Memfd, RefusesAnotherSizeThanAnnounced) {
  EXPECT_FAILURE("another size", makeMemfd(SIZE, ALL_SEALS), SIZE * 2);
  EXPECT_FAILURE("another size", makeMemfd(SIZE * 2, ALL_SEALS), SIZE);
  EXPECT_FAILURE("another size", makeMemfd(SIZE + 1, ALL_SEALS), SIZE);
  EXPECT_FAILURE("another size", makeMemfd(0, ALL_SEALS, false), SIZE);
}

TEST(Memfd, RefusesOtherFiles) {
  char name[] = "capnp-shm-test-XXXXXX";
  int fd;
  KJ_SYSCALL(fd = mkstemp(name));
  kj::AutoCloseFd ordinary(fd);
  unlink(name);
  KJ_SYSCALL(ftruncate(fd, SIZE));
  KJ_ASSERT(posix_fallocate(fd, 0, SIZE) == 0);
  // What the kernel says of its seals depends on the file system.
  EXPECT_FAILURE("peer sent", ordinary, SIZE);

  int pipes[2];
  KJ_SYSCALL(pipe2(pipes, O_CLOEXEC));
  kj::AutoCloseFd in(pipes[0]), out(pipes[1]);
  EXPECT_FAILURE("cannot be sealed", in, SIZE);
  EXPECT_FAILURE("cannot be sealed", out, SIZE);

  int sockets[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets));
  kj::AutoCloseFd left(sockets[0]), right(sockets[1]);
  EXPECT_FAILURE("cannot be sealed", left, SIZE);

  KJ_SYSCALL(fd = open("/dev/zero", O_RDWR | O_CLOEXEC));
  kj::AutoCloseFd zero(fd);
  EXPECT_FAILURE("cannot be sealed", zero, SIZE);

  KJ_SYSCALL(fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  kj::AutoCloseFd directory(fd);
  EXPECT_FAILURE("peer sent", directory, SIZE);
  EXPECT_FAILURE("cannot be sealed", 1000000, SIZE);
}

TEST(Memfd, RefusesHugetlb) {
  int fd = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
  if (fd < 0) GTEST_SKIP() << "this kernel makes no hugetlb memfd: " << strerror(errno);
  kj::AutoCloseFd huge(fd);
  size_t size = 2 << 20;
  KJ_SYSCALL(ftruncate(fd, size));
  if (fcntl(fd, F_ADD_SEALS, ALL_SEALS) < 0) {
    GTEST_SKIP() << "a hugetlb memfd cannot be sealed here: " << strerror(errno);
  }
  EXPECT_FAILURE("not an ordinary memfd", fd, size, size);
}

TEST(Memfd, RefusesWrongSizes) {
  auto own = createRegion(SIZE);
  EXPECT_FAILURE("multiple of the page size", own.fd, 0);
  EXPECT_FAILURE("multiple of the page size", own.fd, SIZE + 1);
  EXPECT_FAILURE("larger region than", own.fd, SIZE, SIZE - 1);
  EXPECT_FAILURE("larger region than", own.fd, ~uint64_t(4095));
  EXPECT_STREQ("mapped", failure(own.fd, SIZE, SIZE).cStr()) << "exactly the limit";
  EXPECT_THROW(createRegion(0), kj::Exception);
  EXPECT_THROW(createRegion(100), kj::Exception);
}

template <typename Func>
bool inChild(Func&& func) {
  // Whether `func` returned true in a fork child.
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    bool result = false;
    kj::runCatchingExceptions([&]() { result = func(); });
    _exit(result ? 0 : 1);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  return status == 0;
}

TEST(Memfd, NothingMappedIsNobodysFault) {
  // What this process is not allowed to do is no accusation of the peer.
  auto own = createRegion(SIZE);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers need address space without limits";
#endif
  if (!isAddressSpaceLimited()) GTEST_SKIP() << "RLIMIT_AS does nothing, as under qemu-user";
  EXPECT_TRUE(inChild([&]() {
    struct rlimit none = { 0, 0 };
    KJ_SYSCALL(setrlimit(RLIMIT_AS, &none));
    KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { mapPeerRegion(own.fd, SIZE, SIZE); })) {
      return e->getType() == kj::Exception::Type::OVERLOADED;
    }
    return false;
  }));
}

kj::String vmFlags(const void* address) {
  KJ_IF_MAYBE(flags, mappingField(address, "VmFlags:")) return kj::str(*flags, " ");
  return kj::str("no such mapping");
}

TEST(Memfd, MappingsAreForNeitherForksNorDumps) {
  CAPNP_SHM_NEEDS_MADVISE;
  auto own = createRegion(SIZE);
  auto peer = mapPeerRegion(own.fd, SIZE, SIZE);
  for (auto mapping: { &own.mapping, &peer }) {
    auto flags = vmFlags(mapping->bytes().begin());
    EXPECT_NE(nullptr, strstr(flags.cStr(), " dc ")) << "MADV_DONTFORK; " << flags.cStr();
    EXPECT_NE(nullptr, strstr(flags.cStr(), " dd ")) << "MADV_DONTDUMP; " << flags.cStr();
  }
}

TEST(Memfd, DestructorUnmaps) {
  byte vec;
  void* where;
  {
    auto own = createRegion(SIZE);
    auto moved = kj::mv(own.mapping);
    where = moved.bytes().begin();
    EXPECT_EQ(0u, own.mapping.bytes().size());
    EXPECT_EQ(0, mincore(where, 4096, &vec));
  }
  EXPECT_EQ(-1, mincore(where, 4096, &vec));
}

TEST(Memfd, ForkChildDoesNotInheritMapping) {
  CAPNP_SHM_NEEDS_MADVISE;
  auto own = createRegion(SIZE);
  auto peer = kj::heap(mapPeerRegion(own.fd, SIZE, SIZE));
  auto generation = forkGeneration();
  void* mapped = peer->bytes().begin();
  EXPECT_TRUE(inChild([&]() {
    byte vec;
    for (auto begin: { static_cast<void*>(own.mapping.bytes().begin()), mapped }) {
      KJ_ASSERT(mincore(begin, 4096, &vec) == -1 && errno == ENOMEM);
    }
    return forkGeneration() == generation + 1;
  }));
  EXPECT_EQ(generation, forkGeneration());

  // The destructor in the child leaves alone what may lie there by then.
  EXPECT_TRUE(inChild([&]() {
    void* other = mmap(mapped, SIZE, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    KJ_ASSERT(other == mapped);
    peer = nullptr;
    byte vec;
    return mincore(mapped, 4096, &vec) == 0;
  }));

  // And what a child maps itself is gone again in its own children.
  EXPECT_TRUE(inChild([&]() {
    auto mine = createRegion(SIZE);
    auto* begin = mine.mapping.bytes().begin();
    *begin = 1;
    return inChild([&]() {
      byte vec;
      return mincore(begin, 4096, &vec) == -1 && forkGeneration() == generation + 2;
    });
  }));
  own.mapping.bytes()[0] = 5;
  EXPECT_EQ(5, peer->bytes()[0]);
}

}  // namespace
}  // namespace capnpshm
