// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/debug.h>
#include <kj/exception.h>

namespace capnpshm {
namespace fuzz {

// What no fuzzer may see, whatever it feeds. (The sanitizers and libFuzzer itself watch for the
// rest: memory errors, hangs, leaks, memory without bounds.)

#define FUZZ_CHECK(condition, ...) \
  if (KJ_LIKELY(condition)) {} else \
      ::capnpshm::fuzz::found(__FILE__, __LINE__, #condition, ::kj::str(__VA_ARGS__))
// Ends the process with a report that libFuzzer takes for a crash if `condition` does not hold.

[[noreturn]] void found(const char* file, int line, const char* condition, kj::StringPtr details);

class Watch final: public kj::ExceptionCallback {
  // For the length of one execution, on its stack: what a peer does is no reason to fill the log.
  // And stack traces of exceptions, which nobody looks at, take more time than all the rest.

public:
  void logMessage(kj::LogSeverity severity, const char* file, int line, int contextDepth,
                  kj::String&& text) override;
  StackTraceMode stackTraceMode() override { return StackTraceMode::NONE; }
};

void checkComplaint(const kj::Exception& exception);
// That an exception thrown at the victim is of type FAILED or DISCONNECTED, and says of the peer
// what it did wrong. A failed assertion of our own would be of type FAILED, too.

template <typename Func>
bool attempt(Func&& func) {
  // Runs what may find fault with the peer. False if it did.
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions(kj::fwd<Func>(func))) {
    checkComplaint(*exception);
    return false;
  }
  return true;
}

void checkResources(kj::uint keptFds = 0, kj::uint maxMappings = 0);
// That the process holds no more file descriptors, beside those kept for good, than when this was
// first called, and no more mappings of shared memory than that. Looks at every 4096th call only.

}  // namespace fuzz
}  // namespace capnpshm
