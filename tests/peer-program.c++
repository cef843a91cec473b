// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "peer-program.h"

#include <errno.h>
#include <map>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

namespace capnpshm {
namespace process {

namespace {

std::map<std::string, std::string> arguments;

}  // namespace

std::string argument(const char* name, const char* otherwise) {
  auto found = arguments.find(name);
  return found == arguments.end() ? otherwise : found->second;
}

bool isSet(const char* name) { return argument(name) == "1"; }

uint64_t numberOf(const char* name) { return strtoull(argument(name, "0").c_str(), nullptr, 10); }

void report(kj::StringPtr text) {
  auto line = kj::str(text, '\n');
  KJ_SYSCALL(write(REPORT_FD, line.begin(), line.size()));
}

void awaitProceed() {
  char c;
  KJ_SYSCALL(read(REPORT_FD, &c, 1));
}

Progress& progress() {
  static Progress* const result = []() {
    void* address = mmap(
        nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED, PROGRESS_FD, 0);
    KJ_REQUIRE(address != MAP_FAILED, strerror(errno));
    return reinterpret_cast<Progress*>(address);
  }();
  return *result;
}

int runProgram(int argc, char** argv, int (*run)(const std::string& role)) {
  if (argc < 2) return 2;
  for (int i = 2; i < argc; i++) {
    std::string text = argv[i];
    auto equals = text.find('=');
    arguments[text.substr(0, equals)] =
        equals == std::string::npos ? "1" : text.substr(equals + 1);
  }
  // So that it does not outlive a test that crashed.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  return run(argv[1]);
}

}  // namespace process
}  // namespace capnpshm
