// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Which cases are run, with which parameters, on which transports.

#include "driver.h"

namespace capnpshm {
namespace bench {

struct Job {
  // One case with certain parameters, on all transports that are compared in it.

  enum Environment { TWO_CORES, ONE_CORE, UNPINNED, LOADED };

  kj::StringPtr caseName;
  Parameters parameters;
  std::vector<kj::StringPtr> transports;
  uint rounds = 5;
  double seconds = 0.2;        // Of one slice: a transport in a round.
  double warmUpSeconds = 0.05;
  uint64_t calls = 0;          // If not 0, so many instead.
  bool countSystemCalls = true;
  Environment environment = TWO_CORES;
};

std::vector<Job> makePlan(const DriverOptions& options);

kj::String describe(const Parameters& parameters);

}  // namespace bench
}  // namespace capnpshm
