// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "strace.h"

#include <kj/debug.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ;

namespace capnpshm {
namespace bench {

namespace {

constexpr uint64_t LEAST_CALLS = 200;
constexpr uint64_t LEAST_ROUNDS = 8;
// Of all that are in flight: they share system calls, and how many differs from round to round.
constexpr double ENOUGH_SECONDS = 0.1;
constexpr uint64_t GROWTH = 4;
// Who makes system calls is slowed down, so the first few hundred calls may find both sides asleep
// that would never sleep otherwise. And a rare system call is not seen in few.

bool isTraced(pid_t process) {
  auto status = readFile(kj::str("/proc/", process, "/status").cStr());
  auto line = strstr(status.cStr(), "TracerPid:");
  return line != nullptr && strtol(line + strlen("TracerPid:"), nullptr, 10) != 0;
}

class Tracer {
  // strace, attached to both processes of a pair.

public:
  Tracer(const Pair& pair, kj::StringPtr output) {
    auto client = kj::str(pair.clientPid()), server = kj::str(pair.serverPid());
    kj::Vector<const char*> argv;
    for (auto argument: { "strace", "-qq", "-f", "-c", "-o", output.cStr(), "-p", client.cStr() }) {
      argv.add(argument);
    }
    if (pair.serverPid() != pair.clientPid()) {
      argv.add("-p");
      argv.add(server.cStr());
    }
    argv.add(nullptr);
    int error = posix_spawnp(
        &pid, "strace", nullptr, nullptr, const_cast<char**>(argv.begin()), environ);
    if (error != 0) {
      pid = 0;
      return;
    }
    // It is either attached to both soon, or gone.
    while (!isTraced(pair.clientPid()) || !isTraced(pair.serverPid())) {
      int status;
      pid_t ended;
      KJ_SYSCALL(ended = waitpid(pid, &status, WNOHANG));
      if (ended == pid) {
        pid = 0;
        return;
      }
      usleep(1000);
    }
  }

  ~Tracer() noexcept(false) { stop(); }
  KJ_DISALLOW_COPY(Tracer);

  bool isAttached() const { return pid != 0; }

  void stop() {
    // It lets go of the processes and writes down what it has counted.
    if (pid == 0) return;
    kill(pid, SIGINT);
    int status;
    KJ_SYSCALL(waitpid(pid, &status, 0));
    pid = 0;
  }

private:
  pid_t pid = 0;
};

kj::Maybe<double> countOnce(Pair& pair, Task::Builder task, uint64_t calls, kj::StringPtr output) {
  Tracer tracer(pair, output);
  if (!tracer.isAttached()) return nullptr;
  capnp::MallocMessageBuilder message;
  message.setRoot(task.asReader());
  message.getRoot<Task>().setCalls(calls);
  auto outcome = pair.run(message);
  tracer.stop();
  if (outcome->getRoot<Outcome>().isError()) return nullptr;

  // The last line: 100.00    0.012345    1    2345    67 total
  auto text = readFile(output.cStr());
  auto total = strstr(text.cStr(), "100.00");
  auto next = total;
  while (next != nullptr) {
    total = next;
    next = strstr(next + 1, "100.00");
  }
  double percent, seconds, microseconds, count;
  if (total == nullptr ||
      sscanf(total, "%lf %lf %lf %lf", &percent, &seconds, &microseconds, &count) != 4) {
    return nullptr;
  }
  return count;
}

}  // namespace

kj::Maybe<double> systemCallsByStrace(Pair& pair, Task::Builder task, bool quick) {
  char path[] = "/tmp/capnp-shm-bench-XXXXXX";
  int fd;
  KJ_SYSCALL(fd = mkstemp(path));
  kj::AutoCloseFd file(fd);
  KJ_DEFER(unlink(path));
  task.setWarmUpSeconds(0);
  task.setCountSystemCalls(false);
  // strace sees everything, the beginning and the end of a slice too. The difference between two is
  // the calls'.
  uint64_t calls = kj::max(LEAST_CALLS, LEAST_ROUNDS * task.getWindow()), more = 2 * calls;
  auto before = countOnce(pair, task, calls, path);
  for (;;) {
    uint64_t begin = now();
    auto after = countOnce(pair, task, more, path);
    bool enough = quick || (now() - begin) * 1e-9 > ENOUGH_SECONDS;
    if (before == nullptr || after == nullptr) return nullptr;
    if (enough) {
      double difference = KJ_ASSERT_NONNULL(after) - KJ_ASSERT_NONNULL(before);
      if (difference < 0) return nullptr;  // It has lost some.
      return difference / (more - calls);
    }
    before = after;
    calls = more;
    more *= GROWTH;
  }
}

}  // namespace bench
}  // namespace capnpshm
