// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "system-call-trap.h"

#include <kj/debug.h>
#include <linux/prctl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

#if __x86_64__ && defined(PR_SET_SYSCALL_USER_DISPATCH)

// Code whose system calls are not given back: what makes one in another's place, and the end of a
// signal handler. The kernel looks at the address behind the instruction, so more code follows the
// last.
asm(R"(
  .text
  .type capnpShmBenchPassed, @function
capnpShmBenchPassed:
  mov %rdi, %rax
  mov %rsi, %rdi
  mov %rdx, %rsi
  mov %rcx, %rdx
  mov %r8, %r10
  mov %r9, %r8
  mov 8(%rsp), %r9
  syscall
  ret
  .size capnpShmBenchPassed, .-capnpShmBenchPassed
  .type capnpShmBenchReturn, @function
capnpShmBenchReturn:
  mov $15, %eax
  syscall
  ud2
  .size capnpShmBenchReturn, .-capnpShmBenchReturn
capnpShmBenchEnd:
)");

extern "C" {
extern long passed(long number, long a, long b, long c, long d, long e, long f)
    asm("capnpShmBenchPassed");
extern void endOfHandler() asm("capnpShmBenchReturn");
extern char endOfCode[] asm("capnpShmBenchEnd");
}

namespace {

volatile uint64_t count = 0;
// Of one thread, written by its signal handler.
char selector = SYSCALL_DISPATCH_FILTER_BLOCK;
// Read by the kernel.

void onSystemCall(int, siginfo_t*, void* context) {
  // No system call of another's may be made here, nor anything that may make one.
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  count = count + 1;
  registers[REG_RAX] = passed(registers[REG_RAX], registers[REG_RDI], registers[REG_RSI],
      registers[REG_RDX], registers[REG_R10], registers[REG_R8], registers[REG_R9]);
}

bool dispatch(bool on) {
  auto begin = reinterpret_cast<char*>(&passed);
  return prctl(PR_SET_SYSCALL_USER_DISPATCH, on ? PR_SYS_DISPATCH_ON : PR_SYS_DISPATCH_OFF,
      on ? reinterpret_cast<unsigned long>(begin) : 0, on ? endOfCode - begin : 0,
      on ? &selector : nullptr) == 0;
}

}  // namespace

SystemCallTrap::SystemCallTrap() {
  // Not sigaction(), which has the C library's own code end the handler.
  struct {
    void (*handler)(int, siginfo_t*, void*);
    unsigned long flags;
    void (*restorer)();
    uint64_t mask;
  } action = { &onSystemCall, SA_SIGINFO | 0x04000000 /* SA_RESTORER */, &endOfHandler, 0 };
  KJ_SYSCALL(syscall(SYS_rt_sigaction, SIGSYS, &action, nullptr, sizeof(action.mask)));
  count = 0;
  permitted = dispatch(true);
}

SystemCallTrap::~SystemCallTrap() noexcept(false) {
  if (permitted) dispatch(false);
}

uint64_t SystemCallTrap::getCount() const { return count; }

#else

SystemCallTrap::SystemCallTrap(): permitted(false) {}
SystemCallTrap::~SystemCallTrap() noexcept(false) {}
uint64_t SystemCallTrap::getCount() const { return 0; }

#endif

}  // namespace bench
}  // namespace capnpshm
