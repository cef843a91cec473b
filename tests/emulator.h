// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What an emulator of another machine (qemu-user) leaves out of the system, so that a test which
// needs it can say that it does not run. Each is tried, none assumed.

#include <errno.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <kj/debug.h>

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

#define CAPNP_SHM_NEEDS_SECCOMP \
  if (!isSeccompThere()) GTEST_SKIP() << "seccomp is not there, as under qemu-user"
#define CAPNP_SHM_NEEDS_MADVISE \
  if (!isMadviseThere()) GTEST_SKIP() << "madvise() does nothing, as under qemu-user"

}  // namespace capnpshm
