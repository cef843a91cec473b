// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What most test fixtures have in common.

#include <capnp-shm/rpc-shm.h>
#include <kj/async-io.h>
#include <kj/debug.h>

namespace capnpshm {

#ifdef CAPNP_SHM_EMULATED
constexpr bool EMULATED = true;
#else
constexpr bool EMULATED = false;
#endif
// Whether this runs under an emulator of another processor.

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool SLOW = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool SLOW = true;
#else
constexpr bool SLOW = EMULATED;
#endif
#else
constexpr bool SLOW = EMULATED;
#endif
// Whether everything takes a multiple of the usual time, so that counts should be lower: with a
// sanitizer, or under an emulator.

class LoopFixture {
  // An event loop, and ways to wait on it which end.

protected:
  LoopFixture(): io(kj::setupAsyncIo()) {}

  template <typename T>
  T await(kj::Promise<T>&& promise) {
    // Waits, but not for ever: a deadlock shall fail the test that shows it.
    return promise.exclusiveJoin(io.provider->getTimer().afterDelay(100 * kj::SECONDS)
        .then([]() -> kj::Promise<T> { return KJ_EXCEPTION(FAILED, "deadlock"); }))
        .wait(io.waitScope);
  }

  template <typename Func>
  void until(Func&& condition) {
    // Waits for something that no promise tells.
    for (kj::uint i = 0; i < 30000 && !condition(); i++) {
      io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
    }
    KJ_ASSERT(condition(), "it did not happen");
  }

  template <typename Func, typename Network>
  void settle(Func&& call, Network& network) {
    // Makes calls on a connection of `network`, all to a peer that sleeps, until it has all the
    // descriptors that it will have: the last are those of a bell socket each way.
    for (kj::uint i = 0; i < 1000 && !hasRungOften(network.getStats()); i++) callAndPause(call);
    for (kj::uint i = 0; i < 3; i++) callAndPause(call);
  }

  void turn() {
    // Everything that happens without waiting for a timer.
    kj::Promise<void>(kj::NEVER_DONE).poll(io.waitScope);
  }

  kj::AsyncIoContext io;

private:
  template <typename Func>
  void callAndPause(Func&& call) {
    call();
    await(io.provider->getTimer().afterDelay(2 * kj::MILLISECONDS));
  }

  static bool hasRungOften(const SharedMemoryStats& stats) {
    return stats.outgoing.transport == Transport::PLAIN || stats.bellsRung > 8;
  }
  static bool hasRungOften(kj::Maybe<SharedMemoryStats>&& stats) {
    KJ_IF_MAYBE(s, stats) return hasRungOften(*s);
    return true;  // Of a TwoPartyVatNetwork.
  }
};

}  // namespace capnpshm
