// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/common.h>
#include <stdint.h>

namespace capnpshm {
namespace bench {

class SystemCallTrap {
  // Counts the system calls of the thread that makes it, as long as it lives, where the kernel's
  // tracepoint is not ours to use. The kernel gives each of them back as a SIGSYS (Syscall User
  // Dispatch, Linux 5.11), whose handler counts it and makes it in our place. That takes 1 to 2 µs,
  // where strace takes so long that each side is asleep when the other's answer comes.
  //
  // One at a time in a process. Lives and dies on one thread.

public:
  SystemCallTrap();
  ~SystemCallTrap() noexcept(false);
  KJ_DISALLOW_COPY(SystemCallTrap);

  bool isPermitted() const { return permitted; }
  // Whether this kernel and this kind of CPU can do it; else nothing is counted.

  uint64_t getCount() const;

private:
  bool permitted;
};

}  // namespace bench
}  // namespace capnpshm
