// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "process-limits.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace process {

namespace {

constexpr uint32_t NUMBER = offsetof(seccomp_data, nr);

constexpr uint32_t argument(int index) {
  // The lower half, on which alone the flags are.
  return offsetof(seccomp_data, args) + 8 * index
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      + 4
#endif
      ;
}

void install(kj::ArrayPtr<sock_filter> filter) {
  sock_fprog program { static_cast<unsigned short>(filter.size()), filter.begin() };
  KJ_SYSCALL(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
  KJ_SYSCALL(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

void denyMemfd() {
  sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NUMBER),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_memfd_create, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  install(filter);
}

void denyMap(uint32_t type) {
#ifdef __NR_mmap2
  constexpr uint32_t CALL = __NR_mmap2;
#else
  constexpr uint32_t CALL = __NR_mmap;
#endif
  sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NUMBER),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CALL, 0, 6),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument(2)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PROT_READ, 0, 4),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument(3)),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, MAP_TYPE),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, type, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOMEM),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  install(filter);
}

void denyFiles() {
  // A limit below all numbers that are ever free: what is open stays so, and what is closed makes
  // no room. UndefinedBehaviorSanitizer needs a pipe to look at an object's vtable, and reports all
  // of them as invalid from here on; no test fails by that.
  rlimit limit;
  KJ_SYSCALL(getrlimit(RLIMIT_NOFILE, &limit));
  limit.rlim_cur = STDERR_FILENO + 1;
  KJ_SYSCALL(setrlimit(RLIMIT_NOFILE, &limit));
  // LeakSanitizer reads files when all is over.
  atexit([]() {
    rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  });
}

}  // namespace

void deny(kj::StringPtr what) {
  if (what == "memfd") {
    denyMemfd();
  } else if (what == "map") {
    denyMap(MAP_SHARED);
  } else if (what == "private-map") {
    denyMap(MAP_PRIVATE);
  } else if (what == "files") {
    denyFiles();
  } else {
    KJ_FAIL_REQUIRE("unknown denial", what);
  }
}

}  // namespace process
}  // namespace capnpshm
