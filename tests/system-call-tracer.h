// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/common.h>
#include <kj/string.h>
#include <atomic>
#include <functional>
#include <map>
#include <sys/types.h>
#include <thread>

namespace capnpshm {
namespace process {

struct SystemCall {
  uint64_t number;
  uint64_t arguments[6];
};

class StoppedProcess {
  // A traced process at the entry to a system call or at its exit.

public:
  StoppedProcess(pid_t pid, SystemCall call, bool entry, int64_t result)
      : call(call), entry(entry), result(result), pid(pid) {}

  const SystemCall call;
  const bool entry;
  const int64_t result;  // At the exit; negative for an errno.

  void kill();
  // Before the call is made, at its entry; after it, at its exit.

  void skip();
  // At the entry: the call is not made. Its exit must be given a result.
  void setResult(int64_t result);
  // At the exit.
  void setArgument(uint index, uint64_t value);
  // At the entry.

  template <typename T>
  T read(uint64_t address) {
    T result;
    readBytes(address, &result, sizeof(T));
    return result;
  }
  template <typename T>
  void write(uint64_t address, const T& value) { writeBytes(address, &value, sizeof(T)); }

private:
  pid_t pid;

  void readBytes(uint64_t address, void* target, size_t size);
  void writeBytes(uint64_t address, const void* source, size_t size);
};

class SystemCallTracer {
  // Stops a child process at each of its system calls. In a thread of its own, which alone may do
  // so; the callback is called there. Only the child's main thread is traced.

public:
  SystemCallTracer(pid_t pid, std::function<void(StoppedProcess&)> atStop);
  // Returns when it has begun, or throws if it is not allowed to.
  ~SystemCallTracer() noexcept(false);
  // Kills the process, if it lives, which its parent has yet to wait for.
  KJ_DISALLOW_COPY(SystemCallTracer);

  void join();
  // Until the process has ended.

  static bool isAllowed();
  static bool canChangeCalls();
  // Whether the methods of StoppedProcess that change something are there for this machine.

private:
  pid_t pid;
  std::function<void(StoppedProcess&)> atStop;
  std::thread thread;

  int begin();
  void run();
};

}  // namespace process
}  // namespace capnpshm
