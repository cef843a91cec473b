// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-fixture.h"

#include <gtest/gtest.h>
#include <kj/thread.h>
#include <sys/socket.h>

// Messages that wait for room in shared memory, while the peer, on a thread of its own, makes it at
// any moment.

namespace capnpshm {
namespace conformance {
namespace {

SharedMemoryContext littleMemory(kj::AsyncIoContext& io, bool trustPeer) {
  SharedMemoryContext result;
  result.port = &io.unixEventPort;
  result.options.trustPeer = trustPeer;
  result.options.maxBytes = 128 * 1024;
  result.options.plainCalls = 1;
  return result;
}

class Waiting: public ::testing::TestWithParam<bool>, protected LoopFixture {
  // Whether both trust each other.

protected:
  Waiting() {
    int fds[2];
    KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    stream = io.lowLevelProvider->wrapSocketFd(fds[0], TAKE_OWNERSHIP);
    thread = kj::heap<kj::Thread>([fd = fds[1], trustPeer = GetParam()]() {
      auto io = kj::setupAsyncIo();
      auto stream = io.lowLevelProvider->wrapSocketFd(fd, TAKE_OWNERSHIP);
      ServerState state;
      SharedMemoryServer server(littleMemory(io, trustPeer), kj::heap<RootImpl>(state));
      server.accept(*stream).wait(io.waitScope);
    });
    client = kj::heap<SharedMemoryClient>(littleMemory(io, GetParam()), *stream);
  }
  ~Waiting() noexcept override {
    client = nullptr;
    stream = nullptr;
    thread = nullptr;
  }

  static constexpr auto TAKE_OWNERSHIP = kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP;
  kj::Own<kj::AsyncIoStream> stream;
  kj::Own<kj::Thread> thread;
  kj::Own<SharedMemoryClient> client;
};

TEST_P(Waiting, RoomIsNotOverlookedWhileThereIsTimeToPrepare) {
  auto root = client->bootstrap().castAs<Root>();
  await(root.sequenceRequest().send().ignoreResult());
  // A large block is in use, so there may be one to be zeroed ahead.
  auto held = root.echoRequest();
  held.initData(20000);
  for (uint i = 0; i < (SLOW ? 20 : 200); i++) {
    auto request = root.echoRequest();
    auto data = pattern(400000, i);
    request.setData(data);
    auto response = await(request.send());
    ASSERT_TRUE(isPattern(response.getData(), i));
  }
  EXPECT_GT(client->getStats().heapWaits, 0u);
}

INSTANTIATE_TEST_SUITE_P(Peers, Waiting, ::testing::Bool(),
    [](const ::testing::TestParamInfo<bool>& info) {
  return info.param ? "Trusted" : "Untrusted";
});

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
