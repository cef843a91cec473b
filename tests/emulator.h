// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What an emulator of another machine (qemu-user) leaves out of the system, so that a test which
// needs it can say that it does not run. Each is tried, none assumed.

#include <errno.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <kj/debug.h>
#include <kj/io.h>

namespace capnpshm {

inline bool isSeccompThere() {
  return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) >= 0;
}

inline bool isMadviseThere() {
  // Whether it does what it is asked, such as MADV_DONTFORK; an emulator may only say so.
  size_t size = sysconf(_SC_PAGESIZE);
  void* page = mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KJ_ASSERT(page != MAP_FAILED);
  KJ_DEFER(munmap(page, size));
  KJ_SYSCALL(madvise(page, size, MADV_DONTFORK));
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    unsigned char vec;
    _exit(mincore(page, size, &vec) < 0 && errno == ENOMEM);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

inline bool isAddressSpaceLimited() {
  // Whether RLIMIT_AS does what it shall.
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child == 0) {
    struct rlimit none = { 0, 0 };
    if (setrlimit(RLIMIT_AS, &none) < 0) _exit(0);
    _exit(mmap(nullptr, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
  }
  int status;
  KJ_SYSCALL(waitpid(child, &status, 0));
  return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

inline bool areExcessFdsClosed() {
  // Those for which a receiver has no room. An emulator may have received them itself, and keeps
  // them; so this is tried by a child.
  pid_t child;
  KJ_SYSCALL(child = fork());
  if (child != 0) {
    int status;
    KJ_SYSCALL(waitpid(child, &status, 0));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  int pair[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
  kj::AutoCloseFd first(pair[0]), second(pair[1]);
  char byte = 0;
  struct iovec part { &byte, 1 };
  struct msghdr message {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(struct cmsghdr) char space[CMSG_SPACE(sizeof(int) * 4)];
  message.msg_control = space;
  message.msg_controllen = sizeof(space);
  auto header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int) * 4);
  for (int i = 0; i < 4; i++) memcpy(CMSG_DATA(header) + i * sizeof(int), &pair[0], sizeof(int));
  KJ_SYSCALL(sendmsg(first, &message, 0));
  int limit = kj::max(pair[0], pair[1]) + 64;  // More than will be received.
  auto countOpen = [&]() {
    int result = 0;
    for (int fd = 0; fd < limit; fd++) result += fcntl(fd, F_GETFD) >= 0;
    return result;
  };
  int before = countOpen();
  message.msg_controllen = CMSG_SPACE(sizeof(int));
  KJ_SYSCALL(recvmsg(second, &message, MSG_CMSG_CLOEXEC));
  size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (size_t i = 0; i < count; i++) {
    int fd;
    memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
    close(fd);
  }
  _exit(countOpen() == before ? 0 : 1);
}

inline bool canMapAgain() {
  // What is mapped already, at another address: mremap() of no bytes.
  size_t size = sysconf(_SC_PAGESIZE);
  void* page = mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  KJ_ASSERT(page != MAP_FAILED);
  KJ_DEFER(munmap(page, size));
  void* other = mremap(page, 0, size, MREMAP_MAYMOVE);
  if (other == MAP_FAILED) return false;
  munmap(other, size);
  return true;
}

#define CAPNP_SHM_NEEDS_SECCOMP \
  if (!isSeccompThere()) GTEST_SKIP() << "seccomp is not there, as under qemu-user"
#define CAPNP_SHM_NEEDS_MADVISE \
  if (!isMadviseThere()) GTEST_SKIP() << "madvise() does nothing, as under qemu-user"
#define CAPNP_SHM_NEEDS_MAPPING_AGAIN \
  if (!canMapAgain()) GTEST_SKIP() << "mremap() maps nothing twice, as under qemu-user"
#define CAPNP_SHM_NEEDS_EXCESS_FDS_CLOSED \
  if (!areExcessFdsClosed()) \
    GTEST_SKIP() << "descriptors that are cut off are not closed, as under qemu-user"

}  // namespace capnpshm
