// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Calls to a server of the conformance suite which lead a connection through its phases. All
// results are checked.

#include "conformance-server.h"
#include <kj/debug.h>
#include <kj/vector.h>
#include <unistd.h>

namespace capnpshm {
namespace process {

enum class Phase: kj::uint {
  SET_UP,   // The first call, and the switch to shared memory.
  GROWTH,   // Large messages and many at once: further regions, a larger ring. File descriptors.
  STEADY,   // Small and middling messages, for which all is there; file descriptors.
  END
};

struct WorkloadSize {
  kj::uint pipelined = 100;    // Calls under way at once; from about 50 on the ring grows.
  size_t largeBytes = 300000;
  kj::uint steadyCalls = 20;
  bool fds = true;             // Needs a connection that passes them.
};

template <typename Await>
void exerciseFiles(conformance::Root::Client& root, conformance::ServerState& mine,
                   Await&& await, bool expectFds = true) {
  // `mine` is for what we pass, which the peer may hold until the connection ends.

  auto request = root.filesRequest();
  request.initItems(1).set(0,
      kj::heap<conformance::FileItem>(mine, conformance::pipeWith("contents")));
  auto response = await(request.send());
  auto text = response.getContents()[0];
  if (expectFds) {
    KJ_REQUIRE(text == "contents", text);
    auto fd = await(response.getItem().getFd());
    char buffer[16];
    ssize_t n;
    KJ_SYSCALL(n = read(KJ_REQUIRE_NONNULL(fd, "the reply came without its fd"), buffer,
        sizeof(buffer)));
    KJ_REQUIRE(kj::heapString(buffer, n) == "reply");
  } else {
    KJ_REQUIRE(text == "contents" || text == "none", text);
  }
}

template <typename Await>
void exercise(conformance::Root::Client& root, conformance::ServerState& mine, Phase phase,
              const WorkloadSize& size, Await&& await) {
  // `await` waits for a promise. Throws what a call throws, and type FAILED for a wrong result.

  auto add = [&](kj::uint n) {
    auto request = root.addRequest();
    request.setA(n);
    request.setB(1000);
    return request.send().then([n](auto&& response) {
      KJ_REQUIRE(response.getValue() == n + 1000, "wrong sum");
    });
  };
  auto echo = [&](size_t bytes, kj::uint seed) {
    auto request = root.echoRequest();
    request.setData(conformance::pattern(bytes, seed));
    auto response = await(request.send());
    KJ_REQUIRE(response.getData().size() == bytes && conformance::isPattern(
        response.getData(), seed), "wrong data", bytes);
  };

  switch (phase) {
    case Phase::SET_UP:
      await(add(0));
      await(add(1));
      break;
    case Phase::GROWTH: {
      echo(size.largeBytes, 1);
      kj::Vector<kj::Promise<void>> calls;
      for (kj::uint i = 0; i < size.pipelined; i++) calls.add(add(i));
      await(kj::joinPromises(calls.releaseAsArray()));
      echo(size.largeBytes / 2, 2);
      break;
    }
    case Phase::STEADY:
      for (kj::uint i = 0; i < size.steadyCalls; i++) {
        await(add(i));
        if (i % 4 == 0) echo(3000, i);
      }
      break;
    case Phase::END:
      break;
  }
  if (size.fds && (phase == Phase::GROWTH || phase == Phase::STEADY)) {
    exerciseFiles(root, mine, await);
  }
}

}  // namespace process
}  // namespace capnpshm
