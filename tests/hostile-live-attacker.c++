// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// An attacker: `hostile-live-attacker MODE SEED [ATTACK]`. One connection after the other, each of
// another kind, or all of the one given, until it is killed. See hostile-live.h.

#include "hostile-live.h"

#include <random>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <kj/debug.h>

#if defined(__SANITIZE_THREAD__)
// Its threads race with each other; that is what they are for.
extern "C" const char* __tsan_default_options() { return "report_bugs=0"; }
#endif

namespace capnpshm {
namespace hostile {
namespace {

void report(kj::StringPtr text) {
  auto line = kj::str(text, '\n');
  for (auto& c: line.asArray().slice(0, line.size() - 1)) {
    if (c < ' ') c = ' ';
  }
  kj::FdOutputStream(process::REPORT_FD).write(line.begin(), line.size());
}

class Silence final: public kj::ExceptionCallback {
  // What an attacker's own library says of the havoc is of no interest.

public:
  void logMessage(kj::LogSeverity, const char*, int, int, kj::String&&) override {}
};

void attack(const LiveMode& mode, uint64_t seed, kj::Maybe<Attack> only) {
  auto io = kj::setupAsyncIo();
  std::mt19937_64 random(seed);
  for (;;) {
    auto kind = Attack(1 + random() % (ATTACKS - 1));
    KJ_IF_MAYBE(o, only) kind = *o;
    LiveContext context { io, process::SOCKET_FD, mode, random(), nullptr };
    uint64_t deeds = 0;
    // An exception is the victim's hanging up, or our own library's seeing what was done to it.
    kj::runCatchingExceptions([&]() {
      deeds = isByHand(kind) ? attackByHand(context, kind) : attackByClient(context, kind);
    });
    report(kj::str("did ", uint(kind), ' ', deeds));
    KJ_IF_MAYBE(complaint, context.complaint) report(kj::str("wrong ", *complaint));
  }
}

}  // namespace
}  // namespace hostile
}  // namespace capnpshm

int main(int argc, char** argv) {
  using namespace capnpshm::hostile;
  // So that it does not outlive a test that crashed.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Silence silence;
  kj::Maybe<Attack> only;
  if (argc > 3) only = Attack(atoi(argv[3]));
  attack(findLiveMode(argv[1]), strtoull(argv[2], nullptr, 10), only);
}
