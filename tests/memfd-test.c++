// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/memfd.h>

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/test.h>

namespace capnpshm {
namespace {

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

constexpr int ALL_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | 0x10;

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

TEST(Memfd, ReceiverCannotWrite) {
  auto own = createRegion(SIZE);
  EXPECT_EQ(MAP_FAILED, mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, own.fd, 0));
  EXPECT_EQ(-1, write(own.fd, "x", 1));
  EXPECT_EQ(-1, ftruncate(own.fd, SIZE * 2));
  EXPECT_EQ(-1, ftruncate(own.fd, 0));
  EXPECT_EQ(-1, fallocate(own.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));

  auto peer = mapPeerRegion(own.fd, SIZE, SIZE);
  EXPECT_EQ(-1, mprotect(peer.bytes().begin(), SIZE, PROT_READ | PROT_WRITE));

  int reopened = open(kj::str("/proc/self/fd/", own.fd.get()).cStr(), O_RDWR | O_CLOEXEC);
  if (reopened >= 0) {
    EXPECT_EQ(MAP_FAILED, mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, reopened, 0));
    close(reopened);
  }
}

TEST(Memfd, RefusesWrongFiles) {
  EXPECT_NE(nullptr, strstr(failure(makeMemfd(SIZE, F_SEAL_SHRINK | F_SEAL_GROW), SIZE).cStr(),
      "failed: ")) << "no FUTURE_WRITE";
  EXPECT_NE(nullptr, strstr(failure(makeMemfd(SIZE, ALL_SEALS & ~F_SEAL_SHRINK), SIZE).cStr(),
      "without the seals"));
  EXPECT_NE(nullptr, strstr(failure(makeMemfd(SIZE, ALL_SEALS & ~F_SEAL_GROW), SIZE).cStr(),
      "without the seals"));
  EXPECT_NE(nullptr, strstr(failure(makeMemfd(SIZE, ALL_SEALS, false), SIZE).cStr(), "holes"));
  EXPECT_NE(nullptr, strstr(failure(makeMemfd(SIZE, ALL_SEALS), SIZE * 2).cStr(), "another size"));

  char name[] = "/tmp/capnp-shm-test-XXXXXX";
  int fd;
  KJ_SYSCALL(fd = mkstemp(name));
  kj::AutoCloseFd ordinary(fd);
  unlink(name);
  KJ_SYSCALL(ftruncate(fd, SIZE));
  EXPECT_NE(nullptr, strstr(failure(fd, SIZE).cStr(), "failed: ")) << failure(fd, SIZE).cStr();

  int pipes[2];
  KJ_SYSCALL(pipe2(pipes, O_CLOEXEC));
  kj::AutoCloseFd in(pipes[0]), out(pipes[1]);
  EXPECT_NE(nullptr, strstr(failure(in, SIZE).cStr(), "cannot be sealed"));
}

TEST(Memfd, RefusesHugetlb) {
  int fd = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
  if (fd < 0) GTEST_SKIP() << "this kernel makes no hugetlb memfd";
  kj::AutoCloseFd huge(fd);
  size_t size = 2 << 20;
  KJ_SYSCALL(ftruncate(fd, size));
  if (fcntl(fd, F_ADD_SEALS, ALL_SEALS) < 0) GTEST_SKIP() << "hugetlb memfd cannot be sealed here";
  EXPECT_NE(nullptr, strstr(failure(fd, size, size).cStr(), "not an ordinary memfd"));
}

TEST(Memfd, RefusesWrongSizes) {
  auto own = createRegion(SIZE);
  EXPECT_NE(nullptr, strstr(failure(own.fd, 0).cStr(), "multiple of the page size"));
  EXPECT_NE(nullptr, strstr(failure(own.fd, SIZE + 1).cStr(), "multiple of the page size"));
  EXPECT_NE(nullptr, strstr(failure(own.fd, SIZE, SIZE - 1).cStr(), "larger region than"));
  EXPECT_THROW(createRegion(0), kj::Exception);
  EXPECT_THROW(createRegion(100), kj::Exception);
}

TEST(Memfd, ForkChildDoesNotInheritMapping) {
  auto own = createRegion(SIZE);
  auto generation = forkGeneration();
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    unsigned char vec;
    bool unmapped = mincore(own.mapping.bytes().begin(), 4096, &vec) == -1 && errno == ENOMEM;
    _exit(unmapped && forkGeneration() == generation + 1 ? 0 : 1);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  EXPECT_EQ(0, status);
  EXPECT_EQ(generation, forkGeneration());
}

}  // namespace
}  // namespace capnpshm
