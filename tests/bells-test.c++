// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hand-made-peer.h"

#include <capnp-shm/bell-socket.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

// What a connection tells a hand-made peer of its sleep, by which bells it wakes one that sleeps,
// and by which it is woken itself.

namespace capnpshm {
namespace testing {
namespace {

class SleepyPeer: public HandMadePeer {
  // One that sleeps all the time, and listens to a bell socket.

public:
  SleepyPeer() {
    takesBellSocket = true;
    upgrade();
  }

  void makeItRing() {
    header().sleepWord.store(++epoch << SLEEP_EPOCH_SHIFT | WANT_DATA);
    send(8);
    settle();
  }

  void awaitBellSocket() {
    // Up to and with the offer of one, after eight bells.
    for (uint i = 0; i < 8; i++) {
      makeItRing();
      expectBell();
    }
    makeItRing();
    kj::AutoCloseFd fdSpace[1];
    auto frame = capnp::readMessage(*pipe.ends[1], fdSpace).wait(io.waitScope);
    auto control = KJ_ASSERT_NONNULL(asControl(frame.reader->getRoot<capnp::AnyPointer>()));
    ASSERT_EQ(control.which(), protocol::Control::BELL_SOCKET);
    ASSERT_EQ(1u, frame.fds.size());
    bellSocket = kj::mv(frame.fds[0]);
    expectBell();
  }

  void answer(bool taken) {
    writeControl([&](protocol::Control::Builder control) { control.setBellSocketTaken(taken); });
    settle();
  }

  uint bellsOnBellSocket() {
    char buffer[100];
    ssize_t n = recv(bellSocket, buffer, sizeof(buffer), MSG_DONTWAIT);
    return n < 0 ? 0 : n;
  }

  kj::AutoCloseFd bellSocket;

private:
  uint64_t epoch = 0;
};

TEST(Bells, PeerThatSleepsOftenGetsABellSocket) {
  SleepyPeer peer;
  peer.awaitBellSocket();
  peer.answer(true);
  for (uint i = 0; i < 20; i++) {
    peer.makeItRing();
    EXPECT_EQ(1u, peer.bellsOnBellSocket());
  }
  // Should nobody listen there, the control socket is still there.
  peer.bellSocket = nullptr;
  peer.makeItRing();
  peer.expectBell();
  EXPECT_EQ(peer.failure, "");
}

TEST(Bells, BellsStayWhereTheyWereIfTheBellSocketIsNotTaken) {
  for (bool answered: { false, true }) {
    SleepyPeer peer;
    peer.awaitBellSocket();
    // Not before the answer, either: the peer may have got no descriptor.
    if (answered) peer.answer(false);
    for (uint i = 0; i < 20; i++) {
      peer.makeItRing();
      peer.expectBell();
    }
    EXPECT_EQ(0u, peer.bellsOnBellSocket());
    EXPECT_EQ(peer.failure, "");
  }
}

TEST(Bells, BellSocketWithoutItsDescriptorIsNotTaken) {
  HandMadePeer peer;
  peer.upgrade();
  peer.writeControl([](protocol::Control::Builder control) { control.setBellSocket(); });
  auto message = peer.read();
  auto control = KJ_ASSERT_NONNULL(asControl(message->getRoot<capnp::AnyPointer>()));
  ASSERT_EQ(control.which(), protocol::Control::BELL_SOCKET_TAKEN);
  EXPECT_FALSE(control.getBellSocketTaken());
  peer.settle();
  EXPECT_EQ(peer.failure, "");
}

TEST(Bells, EventBellThatGotLostIsReplacedByTheSocket) {
  SharedMemoryOptions options;
  options.trustPeer = true;
  HandMadePeer peer(options);
  peer.trustsPeer = true;
  peer.upgrade();
  ASSERT_EQ(peer.readControl(), protocol::Control::BELL);
  // Our eventfd, which the network has no descriptor to spare for, say.
  peer.writeControl([](protocol::Control::Builder control) { control.setBell(); });
  auto message = peer.read();
  auto control = KJ_ASSERT_NONNULL(asControl(message->getRoot<capnp::AnyPointer>()));
  ASSERT_EQ(control.which(), protocol::Control::BELL_SOCKET_TAKEN);
  EXPECT_FALSE(control.getBellSocketTaken());

  // And its, which we lost: what was rung there is rung once more, and then on the socket alone.
  peer.header().sleepWord.store(uint64_t(1) << SLEEP_EPOCH_SHIFT | WANT_DATA);
  peer.send(8);
  peer.settle();
  peer.writeControl([](protocol::Control::Builder control) { control.setBellSocketTaken(false); });
  peer.expectBell();
  for (uint epoch = 2; epoch < 6; epoch++) {
    peer.header().sleepWord.store(uint64_t(epoch) << SLEEP_EPOCH_SHIFT | WANT_DATA);
    peer.send(8);
    peer.expectBell();
  }
  // It can get lost only once.
  EXPECT_EQ(peer.failure, "");
  peer.writeControl([](protocol::Control::Builder control) { control.setBellSocketTaken(false); });
  peer.expectFailure("not offered to it");
}

TEST(Bells, BellSocketWakes) {
  HandMadePeer peer;
  peer.upgrade();
  BellSocket bell;
  int fd = bell.takePeersEnd().release();
  kj::AutoCloseFd own(fd);
  peer.writeControl([](protocol::Control::Builder control) { control.setBellSocket(); },
      kj::arrayPtr(&fd, 1));
  ASSERT_EQ(peer.readControl(), protocol::Control::BELL_SOCKET_TAKEN);
  for (uint i = 0; i < 200; i++) {
    bool arrived = false;
    peer.receiving = nullptr;
    peer.receiving = peer.connection->receiveIncomingMessage().then(
        [&](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) {
      arrived = message != nullptr;
    }).eagerlyEvaluate(nullptr);
    ASSERT_FALSE(peer.receiving.poll(peer.io.waitScope));
    uint64_t root = 0;
    auto& ring = KJ_ASSERT_NONNULL(peer.ring);
    ring.updateConsumed(ring.getPosition());
    ring.publish({ DescriptorKind::MESSAGE, 0, 1, 0, 1 }, kj::arrayPtr(&root, 1));
    bell.ring();
    peer.receiving.wait(peer.io.waitScope);
    ASSERT_TRUE(arrived);
  }
}

TEST(Bells, BellSocketIsAnsweredByOne) {
  HandMadePeer peer;
  peer.takesBellSocket = true;
  peer.upgrade();
  BellSocket bell;
  int fd = bell.takePeersEnd().release();
  kj::AutoCloseFd own(fd);
  peer.writeControl([](protocol::Control::Builder control) { control.setBellSocket(); },
      kj::arrayPtr(&fd, 1));
  ASSERT_EQ(peer.readControl(), protocol::Control::BELL_SOCKET_TAKEN);
  peer.settle();
  pollfd request { KJ_ASSERT_NONNULL(peer.pipe.ends[1]->getFd()), POLLIN, 0 };
  ASSERT_EQ(1, ::poll(&request, 1, 0)) << "nothing follows";
  EXPECT_EQ(peer.readControl(), protocol::Control::BELL_SOCKET);
}

TEST(Bells, WhoSendsIsAwake) {
  // And says so, since it will look for the answer, which then needs no bell.
  HandMadePeer peer;
  peer.upgrade();
  auto& header = peer.networksHeader();
  uint64_t before = header.sleepWord.load();
  ASSERT_NE(0u, before & WANT_DATA);
  peer.send(8);
  peer.settle();
  uint64_t after = header.sleepWord.load();
  EXPECT_EQ(2u, (after >> SLEEP_EPOCH_SHIFT) - (before >> SLEEP_EPOCH_SHIFT));
  EXPECT_NE(0u, after & WANT_DATA) << "asleep again";
}

TEST(Bells, WhoRunsTellsOnWhichCpu) {
  cpu_set_t before, here;
  KJ_SYSCALL(sched_getaffinity(0, sizeof(before), &before));
  KJ_DEFER(KJ_SYSCALL(sched_setaffinity(0, sizeof(before), &before)));
  HandMadePeer peer;
  peer.upgrade();
  auto& header = peer.networksHeader();
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &before)) continue;
    CPU_ZERO(&here);
    CPU_SET(cpu, &here);
    KJ_SYSCALL(sched_setaffinity(0, sizeof(here), &here));
    peer.send(8);
    peer.settle();
    EXPECT_EQ(cpu + 1u, header.cpu.load());
  }
}

}  // namespace
}  // namespace testing
}  // namespace capnpshm
