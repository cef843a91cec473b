// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "system-call-tracer.h"

#include <elf.h>
#include <errno.h>
#include <future>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace process {

namespace {

constexpr int EVENT_STOP = 128;  // PTRACE_EVENT_STOP, which not every header has.

#if __x86_64__

struct Registers {
  user_regs_struct regs;

  explicit Registers(pid_t pid) { KJ_SYSCALL(ptrace(PTRACE_GETREGS, pid, nullptr, &regs)); }
  void store(pid_t pid) { KJ_SYSCALL(ptrace(PTRACE_SETREGS, pid, nullptr, &regs)); }
  void skip(pid_t) { regs.orig_rax = ~0ull; }  // No such call.
  void setResult(int64_t result) { regs.rax = result; }
  void setArgument(uint index, uint64_t value) {
    decltype(&regs.rdi) const places[] = {
      &regs.rdi, &regs.rsi, &regs.rdx, &regs.r10, &regs.r8, &regs.r9 };
    *places[index] = value;
  }
};

#elif __aarch64__

struct Registers {
  user_regs_struct regs;

  explicit Registers(pid_t pid) {
    iovec vector { &regs, sizeof(regs) };
    KJ_SYSCALL(ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, &vector));
  }
  void store(pid_t pid) {
    iovec vector { &regs, sizeof(regs) };
    KJ_SYSCALL(ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, &vector));
  }
  void skip(pid_t pid) {
    int number = -1;
    iovec vector { &number, sizeof(number) };
    KJ_SYSCALL(ptrace(PTRACE_SETREGSET, pid, NT_ARM_SYSTEM_CALL, &vector));
  }
  void setResult(int64_t result) { regs.regs[0] = result; }
  void setArgument(uint index, uint64_t value) { regs.regs[index] = value; }
};

#else

struct Registers {
  explicit Registers(pid_t) { KJ_FAIL_REQUIRE("not known for this machine"); }
  void store(pid_t) {}
  void skip(pid_t) {}
  void setResult(int64_t) {}
  void setArgument(uint, uint64_t) {}
};

#endif

}  // namespace

void StoppedProcess::kill() { KJ_SYSCALL(::kill(pid, SIGKILL)); }

void StoppedProcess::skip() {
  Registers registers(pid);
  registers.skip(pid);
  registers.store(pid);
}

void StoppedProcess::setResult(int64_t value) {
  Registers registers(pid);
  registers.setResult(value);
  registers.store(pid);
}

void StoppedProcess::setArgument(uint index, uint64_t value) {
  Registers registers(pid);
  registers.setArgument(index, value);
  registers.store(pid);
}

void StoppedProcess::readBytes(uint64_t address, void* target, size_t size) {
  iovec local { target, size };
  iovec remote { reinterpret_cast<void*>(address), size };
  ssize_t n;
  KJ_SYSCALL(n = process_vm_readv(pid, &local, 1, &remote, 1, 0));
  KJ_REQUIRE(size_t(n) == size);
}

void StoppedProcess::writeBytes(uint64_t address, const void* source, size_t size) {
  iovec local { const_cast<void*>(source), size };
  iovec remote { reinterpret_cast<void*>(address), size };
  ssize_t n;
  KJ_SYSCALL(n = process_vm_writev(pid, &local, 1, &remote, 1, 0));
  KJ_REQUIRE(size_t(n) == size);
}

// =======================================================================================

SystemCallTracer::SystemCallTracer(pid_t pid, std::function<void(StoppedProcess&)> atStop)
    : pid(pid), atStop(std::move(atStop)) {
  std::promise<int> begun;
  auto error = begun.get_future();
  thread = std::thread([this, &begun]() {
    int result = begin();
    begun.set_value(result);
    if (result == 0) run();
  });
  int number = error.get();
  if (number != 0) {
    thread.join();
    KJ_FAIL_SYSCALL("ptrace()", number);
  }
}

SystemCallTracer::~SystemCallTracer() noexcept(false) {
  if (!thread.joinable()) return;
  ::kill(pid, SIGKILL);
  thread.join();
}

void SystemCallTracer::join() { thread.join(); }

int SystemCallTracer::begin() {
  if (ptrace(PTRACE_SEIZE, pid, nullptr, PTRACE_O_TRACESYSGOOD) < 0) return errno;
  if (ptrace(PTRACE_INTERRUPT, pid, nullptr, nullptr) < 0) return errno;
  int status;
  if (waitpid(pid, &status, __WALL) < 0) return errno;
  if (!WIFSTOPPED(status)) return ESRCH;
  if (ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr) < 0) return errno;
  return 0;
}

void SystemCallTracer::run() {
  SystemCall call {};
  for (;;) {
    // The end is left for the parent to wait for.
    siginfo_t info {};
    if (waitid(P_PID, pid, &info, WEXITED | WSTOPPED | WNOWAIT | __WALL) < 0) {
      if (errno == EINTR) continue;
      return;
    }
    if (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED) {
      return;
    }
    // (Not waitpid(), which would take an end that comes only now.)
    info = siginfo_t();
    if (waitid(P_PID, pid, &info, WSTOPPED | WNOHANG | __WALL) < 0 || info.si_pid == 0) continue;
    int signal = info.si_status & 0xff;
    int event = info.si_status >> 8;

    int number = 0;
    auto request = PTRACE_SYSCALL;
    if (signal == (SIGTRAP | 0x80)) {
      __ptrace_syscall_info stop;
      // Any failure here and below means that the process was killed meanwhile.
      if (ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof(stop), &stop) > 0) {
        bool entry = stop.op == PTRACE_SYSCALL_INFO_ENTRY;
        if (entry) {
          call.number = stop.entry.nr;
          for (uint i = 0; i < 6; i++) call.arguments[i] = stop.entry.args[i];
        }
        StoppedProcess stopped(pid, call, entry, entry ? 0 : int64_t(stop.exit.rval));
        KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { atStop(stopped); })) {
          KJ_LOG(ERROR, "the process could not be disturbed", *exception);
        }
      }
    } else if (event == EVENT_STOP) {
      if (signal != SIGTRAP) request = PTRACE_LISTEN;  // It was stopped by a signal.
    } else {
      number = signal;
    }
    ptrace(request, pid, nullptr, number);
  }
}

bool SystemCallTracer::isAllowed() {
  static const bool result = []() {
    pid_t child = fork();
    if (child == 0) {
      for (;;) pause();
    }
    bool allowed = kj::runCatchingExceptions([&]() {
      SystemCallTracer tracer(child, [](StoppedProcess&) {});
    }) == nullptr;
    ::kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    return allowed;
  }();
  return result;
}

bool SystemCallTracer::canChangeCalls() {
#if __x86_64__ || __aarch64__
  return true;
#else
  return false;
#endif
}

}  // namespace process
}  // namespace capnpshm
