// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "meter.h"

#include <algorithm>
#include <cmath>
#include <dirent.h>
#include <fcntl.h>
#include <kj/debug.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <sstream>
#include <string>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

uint64_t toNanoseconds(const struct timespec& time) {
  return uint64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

uint64_t field(kj::StringPtr text, const char* name) {
  // Of a file such as /proc/*/status: the number behind the name at the beginning of a line.
  auto position = strstr(text.cStr(), name);
  return position == nullptr ? 0 : strtoull(position + strlen(name), nullptr, 10);
}

kj::Vector<pid_t> threadsOf(pid_t process) {
  kj::Vector<pid_t> result;
  auto path = kj::str("/proc/", process, "/task");
  DIR* directory = opendir(path.cStr());
  if (directory == nullptr) return result;
  KJ_DEFER(closedir(directory));
  while (auto entry = readdir(directory)) {
    pid_t thread = atoi(entry->d_name);
    if (thread > 0) result.add(thread);
  }
  return result;
}

}  // namespace

uint64_t now() {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return toNanoseconds(time);
}

kj::String readFile(const char* path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return kj::str();
  return kj::FdInputStream(kj::AutoCloseFd(fd)).readAllText();
}

kj::Vector<uint> usableCores() {
  cpu_set_t set;
  KJ_SYSCALL(sched_getaffinity(0, sizeof(set), &set));
  kj::Vector<uint> result;
  for (uint i = 0; i < CPU_SETSIZE; i++) {
    if (CPU_ISSET(i, &set)) result.add(i);
  }
  return result;
}

void pinTo(pid_t process, uint core) {
  if (core == ANY_CORE) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  KJ_SYSCALL(sched_setaffinity(process, sizeof(set), &set), process, core);
}

void raiseFdLimit() {
  struct rlimit limit;
  KJ_SYSCALL(getrlimit(RLIMIT_NOFILE, &limit));
  limit.rlim_cur = limit.rlim_max;
  KJ_SYSCALL(setrlimit(RLIMIT_NOFILE, &limit));
}

double cpuSecondsOf(pid_t process) {
  clockid_t clock;
  struct timespec time;
  KJ_REQUIRE(clock_getcpuclockid(process, &clock) == 0, "a measured process is gone", process);
  KJ_SYSCALL(clock_gettime(clock, &time));
  return toNanoseconds(time) * 1e-9;
}

ContextSwitches ContextSwitches::of(pid_t process) {
  ContextSwitches result;
  for (auto thread: threadsOf(process)) {
    auto status = readFile(kj::str("/proc/", process, "/task/", thread, "/status").cStr());
    result.voluntary += field(status, "\nvoluntary_ctxt_switches:");
    result.forced += field(status, "\nnonvoluntary_ctxt_switches:");
  }
  return result;
}

Memory Memory::of(pid_t process) {
  auto status = readFile(kj::str("/proc/", process, "/status").cStr());
  Memory result;
  result.anonymous = field(status, "\nRssAnon:") * 1024;
  result.shared = field(status, "\nRssShmem:") * 1024;
  return result;
}

RegionsTouched RegionsTouched::of(pid_t process) {
  auto text = readFile(kj::str("/proc/", process, "/smaps").cStr());
  std::istringstream lines(text.cStr());
  std::string line;
  bool inRegion = false;
  RegionsTouched result;
  while (std::getline(lines, line)) {
    if (line.find(" kB") == std::string::npos && line.find('-') != std::string::npos) {
      // The head of a mapping. Only what we may write counts: the kernel maps what is only read in
      // larger pieces than were touched.
      inRegion = line.find("/memfd:capnp-shm") != std::string::npos &&
          line.find(" rw-s ") != std::string::npos;
    } else if (inRegion && line.rfind("Rss:", 0) == 0) {
      uint64_t bytes = strtoull(line.c_str() + 4, nullptr, 10) * 1024;
      result.largest = kj::max(result.largest, bytes);
      result.total += bytes;
    }
  }
  return result;
}

// =======================================================================================

SystemCallCounter::SystemCallCounter(pid_t process) {
  kj::String id;
  for (auto root: { "/sys/kernel/tracing", "/sys/kernel/debug/tracing" }) {
    id = readFile(kj::str(root, "/events/raw_syscalls/sys_enter/id").cStr());
    if (id.size() > 0) break;
  }
  if (id.size() == 0) return;

  struct perf_event_attr attributes;
  memset(&attributes, 0, sizeof(attributes));
  attributes.type = PERF_TYPE_TRACEPOINT;
  attributes.size = sizeof(attributes);
  attributes.config = strtoull(id.cStr(), nullptr, 10);
  for (auto thread: threadsOf(process)) {
    int fd = syscall(SYS_perf_event_open, &attributes, thread, -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (fd < 0) return;
    events.add(kj::AutoCloseFd(fd));
  }
  permitted = true;
}

uint64_t SystemCallCounter::read() const {
  uint64_t result = 0;
  for (auto& event: events) {
    uint64_t value = 0;
    KJ_SYSCALL(::read(event, &value, sizeof(value)));
    result += value;
  }
  return result;
}

// =======================================================================================

Latencies::Latencies(): values(1 << 20) {}

double Latencies::percentile(double fraction) {
  if (count == 0) return 0;
  if (sorted != count) {
    std::sort(values.begin(), values.begin() + count);
    sorted = count;
  }
  auto rank = static_cast<size_t>(std::ceil(fraction * count));
  return values[kj::min(kj::max(rank, size_t(1)), count) - 1] * 1e-3;
}

}  // namespace bench
}  // namespace capnpshm
