// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-oracle.h"

#include <dirent.h>
#include <fstream>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <unistd.h>

// Of all the options that the sanitizers take: what makes many executions a second possible.
// Stacks of allocations are cut short, and memory that was freed is kept from reuse for a while
// only.
extern "C" const char* __asan_default_options() {
  return "malloc_context_size=6:quarantine_size_mb=16:detect_stack_use_after_return=0:"
      "allocator_release_to_os_interval_ms=-1";
}
extern "C" const char* __ubsan_default_options() {
  return "halt_on_error=1:print_stacktrace=1";
}

namespace capnpshm {
namespace fuzz {

void found(const char* file, int line, const char* condition, kj::StringPtr details) {
  fprintf(stderr, "%s:%d: found: not %s; %s\n", file, line, condition, details.cStr());
  abort();
}

void Watch::logMessage(
    kj::LogSeverity severity, const char* file, int line, int, kj::String&& text) {
  FUZZ_CHECK(severity < kj::LogSeverity::WARNING, file, ":", line, " logs: ", text);
}

void checkComplaint(const kj::Exception& exception) {
  FUZZ_CHECK(exception.getType() == kj::Exception::Type::FAILED ||
      exception.getType() == kj::Exception::Type::DISCONNECTED, exception);
  kj::StringPtr description = exception.getDescription();
  FUZZ_CHECK(!description.startsWith("std::exception") &&
      !description.startsWith("unknown non-KJ exception"), exception);
  if (strstr(exception.getFile(), "capnp-shm/") == nullptr) {
    // What Cap'n Proto and KJ find wrong with bytes they read is theirs to word. But what their
    // headers check, such as indices, is what we do.
    FUZZ_CHECK(!kj::StringPtr(exception.getFile()).endsWith(".h"), exception);
    return;
  }
  for (auto known: { "peer", "incoming RPC message exceeds size limit",
                     "shared memory is required, but cannot be used" }) {
    if (strstr(description.cStr(), known) != nullptr) return;
  }
  FUZZ_CHECK(!"an exception that does not speak of the peer", exception);
}

namespace {

kj::uint countFds() {
  DIR* directory = opendir("/proc/self/fd");
  KJ_ASSERT(directory != nullptr);
  KJ_DEFER(closedir(directory));
  kj::uint result = 0;
  while (auto entry = readdir(directory)) {
    // But those to the sanitizer's symbolizer, which is started when it pleases.
    char target[16] = {};
    readlinkat(dirfd(directory), entry->d_name, target, sizeof(target) - 1);
    if (strncmp(target, "pipe:", 5) != 0) ++result;
  }
  return result;
}

kj::uint countMappings() {
  std::ifstream maps("/proc/self/maps");
  kj::uint result = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:capnp-shm") != std::string::npos) ++result;
  }
  return result;
}

}  // namespace

void checkResources(kj::uint keptFds, kj::uint maxMappings) {
  static kj::uint calls = 0;
  static kj::uint fdsAtFirst = 0;
  if (calls++ % 4096 != 0) return;
  kj::uint fds = countFds() - keptFds;
  if (fdsAtFirst == 0) fdsAtFirst = fds;
  FUZZ_CHECK(fds <= fdsAtFirst, fds, " file descriptors, and at first there were ", fdsAtFirst);
  kj::uint mappings = countMappings();
  FUZZ_CHECK(mappings <= maxMappings, mappings, " mappings of regions instead of ", maxMappings);
}

}  // namespace fuzz
}  // namespace capnpshm
