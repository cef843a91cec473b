// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Several small calls at once.

#include "client.h"

namespace capnpshm {
namespace bench {

class Lanes {
  // Each lane makes a call as soon as its last one has returned.

public:
  explicit Lanes(Session& session): session(session) {}

  void add(Target::Client& target) { targets.add(&target); }
  // A lane that calls this. It must outlive this.

  void run(Slice& slice) {
    // Warms up, then measures.
    slice.warmUp([this]() { turns(WARM_UP_TURNS); });
    slice.start();
    more = [&slice](uint64_t nanoseconds) {
      slice.record(nanoseconds);
      return slice.more();
    };
    all().wait(session.waitScope());
    slice.stop();
  }

  kj::Promise<void> goOn() {
    // As long as the result lives.
    more = [](uint64_t) { return true; };
    return all().eagerlyEvaluate(nullptr);
  }

private:
  static constexpr uint WARM_UP_TURNS = 4;

  Session& session;
  kj::Vector<Target::Client*> targets;
  kj::Function<bool(uint64_t)> more = [](uint64_t) { return false; };
  bool done = false;

  void turns(uint count) {
    uint64_t left = targets.size() * count;
    more = [left](uint64_t) mutable { return --left > 0; };
    all().wait(session.waitScope());
  }

  kj::Promise<void> all() {
    done = false;
    return kj::joinPromises(KJ_MAP(target, targets) { return lane(*target); });
  }

  kj::Promise<void> lane(Target::Client& target) {
    if (done) return kj::READY_NOW;
    uint64_t begin = now();
    return session.echo(target).then([this, begin, &target]() {
      if (!more(now() - begin)) done = true;
      return lane(target);
    });
  }
};

}  // namespace bench
}  // namespace capnpshm
