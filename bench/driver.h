// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Runs the cases: starts the processes, interleaves the transports, watches for noise.

#include "results.h"
#include <kj/string.h>

namespace capnpshm {
namespace bench {

struct DriverOptions {
  bool quick = false;
  bool tiny = false;     // One short round: only to see that everything works.
  kj::String only;       // The case to run; all if empty.
  bool withPeers = false;
  bool useStrace = false;
};

void runAll(const DriverOptions& options, Results& results);

kj::Vector<kj::StringPtr> caseNames();

}  // namespace bench
}  // namespace capnpshm
