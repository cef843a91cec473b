// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "driver.h"

#include "plan.h"
#include "processes.h"
#include "strace.h"
#include <algorithm>
#include <capnp/message.h>
#include <kj/debug.h>
#include <sstream>
#include <stdio.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr uint64_t QUICK_NANOSECONDS = 35000000000;
// Then --quick hurries to its end, which takes 20 s more where cores are slow.
constexpr double COUNT_SECONDS = 0.1;  // Of the extra slice in which system calls are counted.

struct MachineUsage {
  // Of all cores together, in seconds.
  double busy = 0;
  double stolen = 0;

  static MachineUsage now() {
    auto text = readFile("/proc/stat");
    std::istringstream stream(text.cStr());
    std::string label;
    double user = 0, nice = 0, system = 0, idle = 0, wait = 0, irq = 0, softirq = 0, steal = 0;
    stream >> label >> user >> nice >> system >> idle >> wait >> irq >> softirq >> steal;
    double tick = 1.0 / sysconf(_SC_CLK_TCK);
    return { (user + nice + system + irq + softirq) * tick, steal * tick };
  }
};

class Driver {
public:
  Driver(const DriverOptions& options, Results& results)
      : options(options), results(results), cores(usableCores()) {
    if (cores.size() == 1) {
      results.note(kj::str("only one core is usable: client and server share it"));
      cores.add(cores[0]);
    }
  }

  void run(const Job& job) {
    fprintf(stderr, "%s %s\n", job.caseName.cStr(), describe(job.parameters).cStr());
    kj::Vector<kj::Own<Child>> burners;
    if (job.environment == Job::LOADED) {
      for (uint i = 0; i < 2; i++) {
        kj::String arguments[] = { kj::str("--role=burner"), kj::str("--core=", cores[i]) };
        burners.add(kj::heap<Child>(kj::arrayPtr(arguments, kj::size(arguments)), nullptr));
      }
    }

    kj::Vector<kj::Own<Pair>> pairs;
    for (auto name: job.transports) {
      uint clientCore = cores[0], serverCore = cores[1];
      if (job.environment == Job::ONE_CORE) serverCore = clientCore;
      if (job.environment == Job::UNPINNED) clientCore = serverCore = ANY_CORE;
      pairs.add(kj::heap<Pair>(findTransport(name), clientCore, serverCore));
    }

    uint rounds = options.tiny ? 1 : job.rounds;
    for (uint round = 0; round < rounds; round++) {
      if (round > 0 && options.quick && now() - started > QUICK_NANOSECONDS) {
        // The machine is too busy for more.
        if (!hurried) results.note(kj::str("too busy: one round only from ", job.caseName, " on"));
        hurried = true;
        break;
      }
      // Neighbours differ from round to round.
      for (uint i = 0; i < pairs.size(); i++) {
        auto& pair = *pairs[(i + round) % pairs.size()];
        measure(job, pair, burners);
      }
    }
    bool count = job.countSystemCalls && !(options.tiny && job.caseName != "small_call") &&
        !(options.quick && now() - started > QUICK_NANOSECONDS);
    if (count) {
      for (auto& pair: pairs) countSystemCalls(job, *pair);
    }
  }

private:
  const DriverOptions& options;
  Results& results;
  kj::Vector<uint> cores;
  const uint64_t started = now();
  bool hurried = false;

  Row& rowFor(const Job& job, const Pair& pair) {
    return results.row(job.caseName, pair.transport.name, job.parameters);
  }

  void fill(Task::Builder task, const Job& job) {
    task.setCase(job.caseName);
    task.setPayloadBytes(job.parameters.payloadBytes);
    task.setWindow(kj::max(job.parameters.window, 1u));
    task.setGapMicroseconds(job.parameters.gapMicroseconds);
    task.setConnections(kj::max(job.parameters.connections, 1u));
    task.setCallsEach(kj::max(job.parameters.callsEach, 1u));
    task.setSeconds(options.tiny ? 0.005 : job.seconds);
    task.setWarmUpSeconds(options.tiny ? 0.001 : job.warmUpSeconds);
    task.setCalls(options.tiny ? kj::min(job.calls, uint64_t(1000)) : job.calls);
  }

  template <typename Use>
  void perform(Row& row, Pair& pair, capnp::MessageBuilder& task, Use&& use) {
    // A transport that fails in a case does not end the others.
    if (!row.error.empty()) return;
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
      auto message = pair.run(task);
      auto outcome = message->getRoot<Outcome>();
      if (outcome.isError()) {
        row.error = outcome.getError().cStr();
      } else {
        for (auto figure: outcome.getFigures()) {
          use(std::string(figure.getName().cStr()), figure.getValue());
        }
      }
    })) {
      row.error = kj::str(*exception).cStr();
    }
    if (!row.error.empty()) {
      results.note(kj::str(row.caseName.c_str(), " on ", pair.transport.name, " failed: ",
          row.error.c_str()));
      fprintf(stderr, "  %s failed: %s\n", pair.transport.name.cStr(), row.error.c_str());
    }
  }

  void measure(const Job& job, Pair& pair, kj::ArrayPtr<kj::Own<Child>> burners) {
    auto& row = rowFor(job, pair);
    capnp::MallocMessageBuilder task;
    fill(task.initRoot<Task>(), job);

    auto ownSeconds = [&]() {
      double result = pair.cpuSeconds();
      for (auto& burner: burners) result += cpuSecondsOf(burner->getPid());
      return result;
    };
    auto machineBefore = MachineUsage::now();
    double ownBefore = ownSeconds();
    uint64_t begin = now();
    perform(row, pair, task, [&](const std::string& name, double value) { row.add(name, value); });
    if (!row.error.empty()) return;
    double seconds = (now() - begin) * 1e-9;
    double own = ownSeconds() - ownBefore;
    auto machine = MachineUsage::now();

    // /proc/stat counts in ticks of 10 ms: less than some of them is no finding.
    double tick = 2.0 / sysconf(_SC_CLK_TCK);
    row.otherLoad = kj::max(row.otherLoad,
        (machine.busy - machineBefore.busy - own - tick) / seconds);
    row.stolen = kj::max(row.stolen, (machine.stolen - machineBefore.stolen - tick) / seconds);
  }

  void countSystemCalls(const Job& job, Pair& pair) {
    auto& row = rowFor(job, pair);
    capnp::MallocMessageBuilder message;
    auto task = message.initRoot<Task>();
    fill(task, job);
    task.setCountSystemCalls(!options.useStrace);
    task.setSeconds(kj::min(task.getSeconds(), COUNT_SECONDS));
    perform(row, pair, message, [&](const std::string& name, double value) {
      if (name == "syscalls_trapped") {
        row.countMethod =
            value ? "Syscall User Dispatch" : "perf_event_open, raw_syscalls:sys_enter";
      } else if (name.find("syscalls") != std::string::npos) {
        row.add(name, value);
      }
    });
    if (!row.countMethod.empty() || !row.error.empty()) return;
    KJ_IF_MAYBE(calls, systemCallsByStrace(pair, task, options.quick || options.tiny)) {
      row.add("syscalls_per_call", *calls);
      row.countMethod = "strace -c -f";
    }
  }
};

}  // namespace

void runAll(const DriverOptions& options, Results& results) {
  Driver driver(options, results);
  for (auto& job: makePlan(options)) {
    if (options.only.size() == 0 || options.only == job.caseName) driver.run(job);
  }
}

}  // namespace bench
}  // namespace capnpshm
