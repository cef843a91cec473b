// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "plan.h"

namespace capnpshm {
namespace bench {

namespace {

const kj::StringPtr ALL[] = {
  "twoparty", "default", "plain-ctor", "copy-spin", "copy-nospin", "inplace-spin",
  "inplace-nospin", "in-process"
};

Job newJob(kj::StringPtr caseName, kj::ArrayPtr<const kj::StringPtr> transports,
           const DriverOptions& options) {
  Job result;
  result.caseName = caseName;
  result.transports = transports;
  if (options.quick || options.tiny) {
    result.rounds = 3;
    result.seconds = 0.08;
    result.warmUpSeconds = 0.02;
  }
  return result;
}

}  // namespace

std::vector<Job> makePlan(const DriverOptions& options) {
  std::vector<Job> plan;
  plan.push_back(newJob("small_call", ALL, options));
  return plan;
}

kj::Vector<kj::StringPtr> caseNames() {
  DriverOptions everything;
  kj::Vector<kj::StringPtr> result;
  for (auto& job: makePlan(everything)) {
    if (result.empty() || result.back() != job.caseName) result.add(job.caseName);
  }
  return result;
}

kj::String describe(const Parameters& parameters) {
  kj::Vector<kj::String> parts;
  if (parameters.payloadBytes > 0) parts.add(kj::str(parameters.payloadBytes, " bytes"));
  if (parameters.window > 0) parts.add(kj::str("window ", parameters.window));
  if (parameters.gapMicroseconds > 0) parts.add(kj::str("gap ", parameters.gapMicroseconds, " us"));
  if (parameters.connections > 0) parts.add(kj::str(parameters.connections, " connections"));
  return kj::strArray(parts, ", ");
}

}  // namespace bench
}  // namespace capnpshm
