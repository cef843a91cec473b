// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "emulator.h"
#include "process-fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#include <iostream>

// What passes between two processes while both live: backpressure, file descriptors, what crosses
// the socket, and fork().

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::FileItem;
using conformance::RootImpl;
using kj::uint;

class Processes: public ProcessTest {
protected:
  static constexpr uint COUNT = 600;
  static constexpr size_t SMALL_MAX = 64 * 1024;  // What EndMode::small means.

  void sendMuch(End& end, Connection& connection) {
    for (uint i = 1; i <= COUNT; i++) {
      sendNumbered(connection, i, i % 40 == 0 ? 100000 : numberedBytes(i));
      if (i % 10 == 0) turn();
      KJ_IF_MAYBE(stats, end.network.getStats()) {
        ASSERT_LE(stats->regionBytes, SMALL_MAX);
      }
    }
  }
};

TEST_P(Processes, ReceiverThatDoesNotRead) {
  auto before = resourcesOf();
  // The application does not receive; then the whole process is stopped.
  for (bool stopped: { false, true }) {
    auto peer = start(mode().arguments("hold", { "small=1" }));
    auto end = newEnd(kj::mv(peer.stream), Side::SERVER, true);
    auto connection = rawConnection(*end);
    auto first = KJ_ASSERT_NONNULL(await(connection->receiveIncomingMessage()));
    EXPECT_EQ(0, readNumbered(*first));
    first = nullptr;
    auto receiving = connection->receiveIncomingMessage().eagerlyEvaluate(nullptr);
    sendNumbered(*connection, 0, 100);
    until([&]() { return peer.process->hasReported(); });
    EXPECT_EQ("holding", peer.process->line());
    if (stopped) {
      peer.process->signal(SIGSTOP);
      peer.process->awaitStop();
    }
    sendMuch(*end, *connection);
    EXPECT_GT(end->network.getCurrentQueueCount(), 0);
    KJ_IF_MAYBE(stats, end->network.getStats()) {
      EXPECT_EQ(Transport::SHARED_MEMORY, stats->outgoing.transport);
      EXPECT_GT(stats->heapWaits, 0);
    }
    if (stopped) peer.process->signal(SIGCONT);
    peer.process->proceed();
    await(connection->shutdown());
    turn();
    EXPECT_EQ(0, end->network.getCurrentQueueCount());
    receiving = nullptr;
    connection = nullptr;
    end->expectTransport(mode().expected());
    end = nullptr;
    // It checks order and contents.
    EXPECT_EQ(kj::str(COUNT + 1), peer.process->line().c_str());
    EXPECT_EQ(0, peer.process->wait());
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(Processes, FileDescriptors) {
  auto before = resourcesOf();
  {
    constexpr uint MAX = 3;
    auto peer = start(mode().arguments("serve", { "maxFds=3" }));
    auto end = newEnd(kj::mv(peer.stream), Side::CLIENT, false, MAX);
    end->start(nullptr);
    auto root = end->root();
    settle([&]() { await(root.sequenceRequest().send().ignoreResult()); }, end->network);
    auto own = resourcesOf();
    auto peers = resourcesOf(peer.process->getPid());

    // As many as are allowed, none, more.
    uint excess = areExcessFdsClosed() ? 2 : 0;
    if (excess == 0) std::cout << "left out: more of them, as under qemu-user none is closed\n";
    for (uint count: { 1u, MAX, 0u, MAX + excess, 1u }) {
      for (size_t fill: { size_t(0), size_t(100000) }) {
        auto request = root.filesRequest();
        auto items = request.initItems(count);
        for (uint i = 0; i < count; i++) {
          items.set(i, kj::heap<FileItem>(state, conformance::pipeWith(kj::str("text ", i))));
        }
        auto data = conformance::pattern(fill, 1);
        request.setFill(data);
        auto response = await(request.send());
        auto contents = response.getContents();
        ASSERT_EQ(count, contents.size());
        for (uint i = 0; i < count; i++) {
          EXPECT_EQ(i < MAX ? kj::str("text ", i) : kj::str("none"), contents[i]);
        }
        auto fd = await(response.getItem().getFd());
        char buffer[16];
        ASSERT_EQ(5, read(KJ_ASSERT_NONNULL(fd), buffer, sizeof(buffer)));
        EXPECT_EQ("reply", kj::heapString(buffer, 5));
      }
    }
    // Many under way at once, each with its own.
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = 0; i < 100; i++) {
      auto request = root.filesRequest();
      request.initItems(1).set(0,
          kj::heap<FileItem>(state, conformance::pipeWith(kj::str("call ", i))));
      calls.add(request.send().then([i](auto&& response) {
        EXPECT_EQ(kj::str("call ", i), response.getContents()[0]);
      }));
    }
    await(kj::joinPromises(calls.releaseAsArray()));

    // Once all is released, nothing is left open on either side.
    until([&]() { return state.items == 0; });
    until([&]() { return resourcesOf(peer.process->getPid()).fds == peers.fds; });
    until([&]() { return resourcesOf().fds == own.fds; });
    end->expectTransport(mode().expected());
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_P(Processes, NoMessageDataOnTheSocket) {
  // A proxy that passes file descriptors on counts what crosses between the two.
  auto front = newSocketPair();
  auto back = newSocketPair();
  int ends[] = { front.peers, back.mine };
  PeerProcess proxy(ends, { "proxy" });
  int serverEnd = back.peers;
  PeerProcess server(kj::arrayPtr(&serverEnd, 1), mode().arguments("serve"));
  front.peers = nullptr;
  back.mine = nullptr;
  back.peers = nullptr;
  auto end = newEnd(wrapSocket(io, kj::mv(front.mine)), Side::CLIENT);
  end->start(nullptr);
  auto root = end->root();
  auto echo = [&](size_t bytes) {
    auto request = root.echoRequest();
    request.setData(conformance::pattern(bytes, 2));
    auto response = await(request.send());
    EXPECT_EQ(bytes, response.getData().size());
  };
  // Until both directions have switched and have their regions, which they make after a few.
  for (uint i = 0; i < 20; i++) echo(100000);
  auto count = [&]() {
    return proxy.getProgress(FORWARD_BYTES) + proxy.getProgress(BACKWARD_BYTES);
  };

  constexpr uint CALLS = 100;
  constexpr size_t BYTES = 5000;
  uint64_t start = count();
  for (uint i = 0; i < CALLS; i++) echo(BYTES);
  uint64_t crossed = count() - start;
  if (mode().isShared()) {
    // Call, Return and Finish; each may need a bell for data and one for room.
    EXPECT_LE(crossed, CALLS * 3 * 2 * 8);
    EXPECT_EQ(0, crossed % 8);
    auto stats = KJ_ASSERT_NONNULL(end->network.getStats());
    EXPECT_EQ(0, stats.outgoing.socketMessageBytesAfterSwitch);
    EXPECT_EQ(0, stats.incoming.socketMessageBytesAfterSwitch);
    EXPECT_GT(stats.outgoing.bytes, CALLS * BYTES);
  } else {
    // So the proxy does count.
    EXPECT_GT(crossed, CALLS * 2 * BYTES);
  }
  if (mode().trust) {
    EXPECT_EQ(0, crossed);
  }
  end->expectTransport(mode().expected());
}

class Fork: public Processes {
protected:
  int inChild(kj::Function<void()> run) {
    // The exit code of a fork() of this process in which `run` is called.
    pid_t pid;
    KJ_SYSCALL(pid = fork());
    if (pid == 0) {
      alarm(60);
      int code = 0;
      KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { run(); })) {
        KJ_LOG(ERROR, *exception);
        code = 1;
      }
      _exit(code);
    }
    int status;
    KJ_SYSCALL(waitpid(pid, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
};

TEST_P(Fork, ChildHarmsNeitherItselfNorTheConnection) {
  CAPNP_SHM_NEEDS_MADVISE;
  auto peer = start(mode().arguments("serve"));
  auto end = newEnd(kj::mv(peer.stream), Side::CLIENT);
  end->start(nullptr);
  auto root = end->root();
  uint sequence = 0;
  auto check = [&]() {
    for (uint i = 0; i < 20; i++) {
      EXPECT_EQ(sequence++, await(root.sequenceRequest().send().then(
          [](auto&& response) { return response.getValue(); })));
      auto request = root.echoRequest();
      request.setData(conformance::pattern(3000, 3));
      EXPECT_TRUE(conformance::isPattern(await(request.send()).getData(), 3));
    }
  };
  check();

  // What a process may hold at any time: a response, a request that is half built, a call.
  auto fill = root.fillRequest();
  fill.setBytes(50000);
  fill.setSeed(9);
  auto response = kj::heap(await(fill.send()));
  auto unsent = kj::heap(root.echoRequest());
  unsent->setData(conformance::pattern(20000, 4));
  auto slow = kj::heap<kj::Promise<void>>(root.slowRequest().send().ignoreResult());
  check();  // By then, memory for these is there.
  settle([&]() { await(root.sequenceRequest().send().ignoreResult()); ++sequence; },
      end->network);
  auto before = resourcesOf();
  EXPECT_EQ(mode().isShared(), before.regions > 0);

  // It exits.
  EXPECT_EQ(0, inChild([]() {}));
  check();

  // It has no mapping of ours.
  EXPECT_EQ(0, inChild([]() { KJ_REQUIRE(resourcesOf().regions == 0); }));
  check();

  // It calls. Nothing may come of that.
  EXPECT_EQ(0, inChild([&]() {
    auto sent = root.sequenceRequest().send().ignoreResult().eagerlyEvaluate(
        [](kj::Exception&&) {});
    auto data = root.echoRequest();
    data.setData(conformance::pattern(20000, 4));
    auto sent2 = data.send().ignoreResult().eagerlyEvaluate([](kj::Exception&&) {});
    end->network.getStats();
  }));
  check();

  // It destroys everything that is ours (the stream is KJ's, and its destructor concerns the epoll
  // that both processes share).
  EXPECT_EQ(0, inChild([&]() {
    response = nullptr;
    unsent = nullptr;
    slow = nullptr;
    root = nullptr;
    end->rpc = nullptr;
    end->network.~Network();
  }));
  check();

  // What was held is as it was. (Regions come and go as memory is needed.)
  EXPECT_EQ(before.fds, resourcesOf().fds);
  EXPECT_TRUE(conformance::isPattern(response->getData(), 9));
  EXPECT_TRUE(conformance::isPattern(await(unsent->send()).getData(), 4));
  end->expectTransport(mode().expected());
}

TEST_P(Fork, ChildThatLivesOnDoesNotKeepTheMemory) {
  CAPNP_SHM_NEEDS_MADVISE;
  // The peer's death is seen though the child has the socket, since the peer's end was its alone.
  auto before = resourcesOf();
  pid_t child;
  {
    auto peer = start(mode().arguments("serve"));
    auto end = newEnd(kj::mv(peer.stream), Side::CLIENT);
    end->start(nullptr);
    auto root = end->root();
    for (uint i = 0; i < 3; i++) await(root.sequenceRequest().send().ignoreResult());
    KJ_SYSCALL(child = fork());
    if (child == 0) {
      for (;;) pause();
    }
    EXPECT_EQ(0, resourcesOf(child).regions);
    auto slow = root.slowRequest().send().ignoreResult();
    turn();
    peer.process->signal(SIGKILL);
    EXPECT_FAILS(DISCONNECTED, "", kj::mv(slow));
    EXPECT_EQ(-SIGKILL, peer.process->wait());
  }
  EXPECT_EQ(before, resourcesOf());
  KJ_SYSCALL(kill(child, SIGKILL));
  KJ_SYSCALL(waitpid(child, nullptr, 0));
}

INSTANTIATE_TEST_SUITE_P(Modes, Processes, testing::ValuesIn(processModes()), modeName);
INSTANTIATE_TEST_SUITE_P(Modes, Fork, testing::ValuesIn(processModes()), modeName);

}  // namespace
}  // namespace process
}  // namespace capnpshm
