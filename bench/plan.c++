// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "plan.h"

#include "peers.h"

namespace capnpshm {
namespace bench {

namespace {

const kj::StringPtr ALL[] = {
  "twoparty", "default", "plain-ctor", "copy-spin", "copy-nospin", "inplace-spin",
  "inplace-nospin", "in-process"
};
const kj::StringPtr BETWEEN_PROCESSES[] = {
  "twoparty", "default", "plain-ctor", "copy-spin", "copy-nospin", "inplace-spin",
  "inplace-nospin"
};
const kj::StringPtr MAIN[] = {
  "twoparty", "default", "copy-spin", "copy-nospin", "inplace-spin", "inplace-nospin"
};
const kj::StringPtr FEW[] = { "twoparty", "default", "copy-nospin", "inplace-spin" };
const kj::StringPtr BRIEF_WINDOW[] = { "twoparty", "copy-spin", "copy-nospin", "in-process" };
const kj::StringPtr SHARED[] = { "default", "inplace-spin" };
const kj::StringPtr ROUND_TRIPS[] = { "cache-line", "eventfd", "socket" };
const kj::StringPtr WORK[] = { "work", "work-peer" };
const kj::StringPtr MEMORY[] = { "memcpy", "memset", "handover", "handover-turns" };

constexpr uint64_t KIB = 1 << 10;
constexpr uint64_t MIB = 1 << 20;

class Planner {
public:
  explicit Planner(const DriverOptions& options)
      : options(options), brief(options.quick || options.tiny) {}

  std::vector<Job> make() {
    auto& small = add("small_call", ALL);
    if (options.quick) small.seconds = 0.12;  // Most of the ratios are its.
    addPeers(small);
    for (uint gap: { 100, 1000, 10000 }) addGap(gap);
    for (uint size: { 1, 16, 256 }) {
      add("window", brief ? Transports(BRIEF_WINDOW) : Transports(ALL), Parameters::ofWindow(size));
    }
    addPayloads();
    for (auto bytes: { 64 * KIB, 1 * MIB, 16 * MIB }) {
      add("first_param_rw", FEW, Parameters::ofPayload(bytes)).countSystemCalls = false;
      add("second_param_rw", FEW, Parameters::ofPayload(bytes)).countSystemCalls = false;
    }
    for (auto name: { "stream", "stream_rw" }) {
      add(name, MAIN, Parameters::ofPayload(64 * KIB)).transports.push_back("in-process");
    }
    add("held", FEW, Parameters::ofPayload(4 * KIB));
    addBesideBusy();
    addConnections();
    add("one_core", MAIN).environment = Job::ONE_CORE;
    add("unpinned", MAIN).environment = Job::UNPINNED;
    addLoaded();
    addOnce();
    add("raw", ROUND_TRIPS).countSystemCalls = false;
    add("raw", WORK).countSystemCalls = false;
    for (auto bytes: { 64 * KIB, 1 * MIB, 16 * MIB }) {
      add("raw", MEMORY, Parameters::ofPayload(bytes)).countSystemCalls = false;
    }
    return kj::mv(plan);
  }

private:
  typedef kj::ArrayPtr<const kj::StringPtr> Transports;

  const DriverOptions& options;
  const bool brief;
  std::vector<Job> plan;

  Job& add(kj::StringPtr caseName, Transports transports, Parameters parameters = {}) {
    Job job;
    job.caseName = caseName;
    job.parameters = parameters;
    job.transports.assign(transports.begin(), transports.end());
    if (brief) {
      job.rounds = 3;
      job.seconds = 0.06;
      job.warmUpSeconds = 0.02;
    }
    plan.push_back(job);
    return plan.back();
  }

  void addPeers(Job& job) {
    if (!options.withPeers) return;
    for (auto name: { "grpc", "zeromq" }) {
      if (hasPeer(name)) job.transports.push_back(name);
    }
  }

  void addGap(uint microseconds) {
    Parameters parameters;
    parameters.gapMicroseconds = microseconds;
    auto& job = add("idle_gap", brief ? Transports(FEW) : Transports(MAIN), parameters);
    // Enough calls for the long gaps to say something.
    job.seconds = kj::max(job.seconds, microseconds * (brief ? 15e-6 : 50e-6));
    if (brief) job.rounds = 2;
    job.countSystemCalls = microseconds < 10000;
  }

  void addPayloads() {
    for (auto name: { "param", "param_rw", "result", "result_rw" }) {
      kj::StringPtr caseName = name;
      bool isParam = caseName.startsWith("param");
      for (uint64_t bytes: sizes(caseName)) {
        auto& job = add(caseName, payloadTransports(isParam), Parameters::ofPayload(bytes));
        if (bytes >= 64 * KIB) job.transports.push_back("sealed");
        addPeers(job);
        if (brief) {
          job.warmUpSeconds = 0.01;
          if (bytes >= 16 * MIB) job.rounds = 2;
        }
        // What large payloads cost is copying, not calling.
        job.countSystemCalls = bytes <= 1 * MIB && !(brief && !isParam);
      }
    }
  }
  Transports payloadTransports(bool isParam) const {
    if (!brief) return ALL;
    return isParam ? Transports(MAIN) : Transports(FEW);
  }
  std::vector<uint64_t> sizes(kj::StringPtr caseName) const {
    if (!brief) {
      return { 1 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB,
               64 * MIB, 256 * MIB };
    }
    if (caseName == "param") return { 1 * KIB, 16 * KIB, 64 * KIB, 1 * MIB, 16 * MIB };
    return { 64 * KIB, 1 * MIB };
  }

  void addBesideBusy() {
    for (uint size: { 1, 16 }) {
      if (brief && size > 1) continue;
      Parameters parameters;
      parameters.window = size;
      parameters.gapMicroseconds = 2000;
      auto& job = add("beside_busy", FEW, parameters);
      job.seconds = brief ? 0.1 : 0.8;  // For a percentile of calls with such gaps.
      if (brief) job.rounds = 2;
      job.countSystemCalls = false;
    }
  }

  void addConnections() {
    for (uint count: { 2, 100, 1000 }) {
      if (brief && count > 100) continue;
      for (auto name: { "connections", "connections_busy" }) {
        auto& job = add(name, FEW, Parameters::ofConnections(count));
        job.countSystemCalls = count < 1000;
        if (brief) job.rounds = 2;
      }
    }
  }

  void addLoaded() {
    auto& job = add("loaded", brief ? Transports(FEW) : Transports(MAIN));
    job.environment = Job::LOADED;
    // The scheduler deals in milliseconds here.
    job.seconds = brief ? 0.2 : 1.0;
    if (brief) job.rounds = 2;
    job.countSystemCalls = !brief;
  }

  void addOnce() {
    Transports transports = brief ? Transports(FEW) : Transports(BETWEEN_PROCESSES);
    add("connect", transports);
    for (uint count: { 2, 5, 10, 20, 40 }) {
      if (brief && count != 2) continue;
      add("connect", FEW, Parameters::ofCallsEach(count)).countSystemCalls = !brief;
    }
    for (uint count: { 1, 5 }) {
      if (brief && count > 1) continue;
      add("connect_busy", FEW, Parameters::ofCallsEach(count)).countSystemCalls = false;
    }
    auto& memory = add("memory", transports,
        Parameters::ofConnections(options.tiny ? 20 : brief ? 200 : 1000));
    memory.rounds = 1;
    memory.countSystemCalls = false;
    for (uint count: { 1, 100 }) {
      auto& idle = add("idle", transports, Parameters::ofConnections(count));
      idle.rounds = brief ? 1 : 3;
      idle.seconds = brief ? 0.25 : 2.0;
      idle.countSystemCalls = false;
    }
    auto& pages = add("pages", SHARED, Parameters::ofWindow(16));
    pages.rounds = 1;
    pages.calls = brief ? 100000 : 1000000;
    pages.countSystemCalls = false;
  }
};

}  // namespace

std::vector<Job> makePlan(const DriverOptions& options) { return Planner(options).make(); }

kj::Vector<kj::StringPtr> caseNames() {
  DriverOptions everything;
  kj::Vector<kj::StringPtr> result;
  for (auto& job: makePlan(everything)) {
    bool known = false;
    for (auto name: result) known = known || name == job.caseName;
    if (!known) result.add(job.caseName);
  }
  return result;
}

kj::String describe(const Parameters& parameters) {
  kj::Vector<kj::String> parts;
  if (parameters.payloadBytes > 0) parts.add(kj::str(parameters.payloadBytes, " bytes"));
  if (parameters.window > 0) parts.add(kj::str("window ", parameters.window));
  if (parameters.gapMicroseconds > 0) parts.add(kj::str("gap ", parameters.gapMicroseconds, " us"));
  if (parameters.connections > 0) parts.add(kj::str(parameters.connections, " connections"));
  if (parameters.callsEach > 0) parts.add(kj::str(parameters.callsEach, " calls each"));
  return kj::strArray(parts, ", ");
}

}  // namespace bench
}  // namespace capnpshm
