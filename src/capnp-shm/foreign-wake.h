// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/async.h>
#include <kj/refcount.h>
#include <mutex>

namespace capnpshm {

class ForeignWake final: public kj::AtomicRefcounted {
  // Lets other threads wake an event loop, after they have left something for it to pick up: a
  // message that was destroyed on a worker thread has memory to give back, which someone may be
  // waiting for.
  //
  // Owned by the connection and by whatever its messages own. Once closed it does nothing.

public:
  kj::Promise<void> next() {
    // Resolves after the next wake(). Only on the loop's thread, and only one at a time.
    auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
    std::lock_guard<std::mutex> lock(mutex);
    fulfiller = kj::mv(paf.fulfiller);
    return kj::mv(paf.promise);
  }

  void wake() {
    // Any thread. Costs a system call once for each next().
    std::lock_guard<std::mutex> lock(mutex);
    KJ_IF_MAYBE(f, fulfiller) {
      (*f)->fulfill();
      fulfiller = nullptr;
    }
  }

  void close() {
    // The loop's thread. The promise must have been dropped, or this would wake the loop through
    // its port.
    std::lock_guard<std::mutex> lock(mutex);
    fulfiller = nullptr;
  }

private:
  std::mutex mutex;
  kj::Maybe<kj::Own<kj::CrossThreadPromiseFulfiller<void>>> fulfiller;
};

}  // namespace capnpshm
