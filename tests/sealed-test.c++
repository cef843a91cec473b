// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/sealed.h>

#include "emulator.h"
#include "process-fixture.h"
#include "process-limits.h"
#include <capnp/orphan.h>
#include <capnp/rpc.capnp.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <deque>

// Sealed segments between honest peers. What others do is in hostile-sealed-test.c++.

namespace capnpshm {
namespace {

using conformance::Side;
using process::Connection;
using process::readNumbered;
using process::resourcesOf;
using process::sendNumbered;

constexpr size_t THRESHOLD = 16 * 1024;
constexpr size_t LARGE = 100 * 1000;
constexpr size_t LARGE_FILE = 25 * 4096;  // What holds it.
constexpr kj::uint MAX_FDS = 2;

class Party {
  // One end of a connection, which keeps all messages that it receives.

public:
  Party(kj::AsyncIoContext& io, kj::Own<kj::AsyncIoStream> stream, Side side,
        const SharedMemoryOptions& options)
      : stream(kj::mv(stream)),
        network(SharedMemoryContext { &io.unixEventPort, options },
                kj::downcast<kj::AsyncCapabilityStream>(*this->stream), MAX_FDS, side) {
    if (side == Side::CLIENT) {
      capnp::MallocMessageBuilder message;
      auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
      vatId.setSide(Side::SERVER);
      connection = KJ_ASSERT_NONNULL(network.connect(vatId));
    } else {
      connection = network.accept().wait(io.waitScope);
    }
    resume();
  }

  void resume() {
    receiving = receive().eagerlyEvaluate([this](kj::Exception&& e) { failure = kj::mv(e); });
  }
  void pause() { receiving = kj::READY_NOW; }

  kj::Own<capnp::IncomingRpcMessage> take() {
    auto result = kj::mv(received.front());
    received.pop_front();
    return result;
  }

  kj::Own<kj::AsyncIoStream> stream;
  SharedMemoryVatNetwork network;
  kj::Own<Connection> connection;
  std::deque<kj::Own<capnp::IncomingRpcMessage>> received;
  kj::Maybe<kj::Exception> failure;

private:
  kj::Promise<void> receiving = kj::READY_NOW;

  kj::Promise<void> receive() {
    return connection->receiveIncomingMessage().then(
        [this](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) -> kj::Promise<void> {
      KJ_IF_MAYBE(m, message) {
        received.push_back(kj::mv(*m));
        return receive();
      }
      return kj::READY_NOW;
    });
  }
};

class Sealed: public testing::Test, protected LoopFixture {
protected:
  ~Sealed() noexcept override {}

  static SharedMemoryOptions sealing(size_t threshold = THRESHOLD) {
    SharedMemoryOptions options;
    options.sealedThresholdBytes = threshold;
    options.plainCalls = 1;
    return options;
  }

  void connect(const SharedMemoryOptions& clientOptions = sealing(),
               const SharedMemoryOptions& serverOptions = sealing()) {
    auto pipe = io.provider->newCapabilityPipe();
    server = kj::heap<Party>(io, kj::mv(pipe.ends[1]), Side::SERVER, serverOptions);
    client = kj::heap<Party>(io, kj::mv(pipe.ends[0]), Side::CLIENT, clientOptions);
    until([&]() {
      auto stats = client->network.getStats();
      return stats.outgoing.transport == Transport::SHARED_MEMORY &&
             stats.incoming.transport == Transport::SHARED_MEMORY;
    });
  }

  kj::Own<capnp::IncomingRpcMessage> next(Party& party) {
    until([&]() { return !party.received.empty() || party.failure != nullptr; });
    KJ_IF_MAYBE(e, party.failure) kj::throwFatalException(kj::cp(*e));
    return party.take();
  }

  void settleBells() {
    // So that no descriptor comes later.
    uint64_t number = 0;
    settle([&]() {
      sendNumbered(*client->connection, number, 10);
      sendNumbered(*server->connection, number, 10);
      expectNumbers(*server, number, 1);
      expectNumbers(*client, number++, 1);
    }, client->network);
  }

  void expectNumbers(Party& party, uint64_t first, uint64_t count) {
    for (uint64_t i = first; i < first + count; i++) EXPECT_EQ(i, readNumbered(*next(party)));
  }

  static uint64_t sealedBytesOf(Party& party) {
    return party.network.getStats().outgoing.sealedBytes;
  }

  struct Building {
    kj::Own<capnp::OutgoingRpcMessage> message;
    capnp::Text::Builder text;
  };
  static Building build(Party& party, size_t bytes) {
    auto message = party.connection->newOutgoingMessage(0);
    auto text = message->getBody().initAs<capnp::rpc::Message>().initResolve().initException()
        .initReason(bytes);
    memset(text.begin(), 'a', bytes);
    return { kj::mv(message), text };
  }
  static capnp::Text::Reader textIn(capnp::IncomingRpcMessage& message) {
    return message.getBody().getAs<capnp::rpc::Message>().getResolve().getException().getReason();
  }
  static bool isAll(kj::StringPtr text, char c) {
    for (char x: text) {
      if (x != c) return false;
    }
    return true;
  }

  kj::Own<Party> client;
  kj::Own<Party> server;
};

TEST_F(Sealed, LargeSegmentsAreNotCopied) {
  connect();
  for (bool back: { false, true }) {
    auto& from = back ? *server : *client;
    auto& to = back ? *client : *server;
    for (uint64_t i = 0; i < 20; i++) sendNumbered(*from.connection, i, LARGE);
    expectNumbers(to, 0, 20);
    auto sent = from.network.getStats().outgoing;
    auto received = to.network.getStats().incoming;
    EXPECT_GE(sent.sealedBytes, 20 * LARGE);
    EXPECT_EQ(sent.sealedBytes, received.sealedBytes);
    EXPECT_LT(sent.copiedBytes, LARGE);
    EXPECT_LT(received.copiedBytes, LARGE);
  }
}

TEST_F(Sealed, OrderIsKeptAmongAllKindsOfMessages) {
  connect();
  constexpr uint64_t COUNT = SLOW ? 150 : 501;
  for (uint64_t i = 0; i < COUNT; i++) {
    sendNumbered(*client->connection, i, i % 7 * 5000 + 10);
    if (i % 3 == 0) sendNumbered(*server->connection, i / 3, i % 5 * 9000 + 10);
  }
  expectNumbers(*server, 0, COUNT);
  expectNumbers(*client, 0, COUNT / 3);
  EXPECT_GT(sealedBytesOf(*client), 0);
  EXPECT_GT(sealedBytesOf(*server), 0);
}

TEST_F(Sealed, BuilderStaysUsableAndWhatItWritesStaysPrivate) {
  connect();
  auto building = build(*client, LARGE);
  building.message->send();
  turn();
  ASSERT_GE(sealedBytesOf(*client), LARGE);
  for (size_t i = 0; i < LARGE; i += 1000) building.text[i] = 'b';
  auto message = next(*server);
  EXPECT_TRUE(isAll(textIn(*message), 'a'));
  memset(building.text.begin(), 'c', LARGE);
  EXPECT_TRUE(isAll(textIn(*message), 'a'));
  EXPECT_TRUE(isAll(building.text.asReader(), 'c'));
  // Also when everything else is gone.
  message = nullptr;
  client = nullptr;
  server = nullptr;
  memset(building.text.begin(), 'd', LARGE);
  EXPECT_TRUE(isAll(building.text.asReader(), 'd'));
}

TEST_F(Sealed, MessagesOutliveTheConnectionAndDieOnAnyThread) {
  auto before = resourcesOf();
  connect();
  for (uint64_t i = 0; i < 4; i++) sendNumbered(*client->connection, i, LARGE);
  auto unsent = build(*client, LARGE);
  std::deque<kj::Own<capnp::IncomingRpcMessage>> kept;
  for (uint i = 0; i < 4; i++) kept.push_back(next(*server));
  client = nullptr;
  server = nullptr;
  for (uint64_t i = 0; i < 4; i++) EXPECT_EQ(i, readNumbered(*kept[i]));
  kj::Thread([&]() {
    kept.clear();
    unsent.message = nullptr;
  });
  EXPECT_EQ(before, resourcesOf());
}

TEST_F(Sealed, UnsentAndWaitingMessagesAreDropped) {
  auto before = resourcesOf();
  connect();
  server->pause();
  auto unsent = build(*client, LARGE);
  for (uint64_t i = 0; i < 100; i++) sendNumbered(*client->connection, i, LARGE);
  unsent.message = nullptr;
  client = nullptr;
  server = nullptr;
  EXPECT_EQ(before, resourcesOf());
}

TEST_F(Sealed, OnlyIfBothSidesWantIt) {
  struct { size_t client; bool trust; size_t server; bool serverTrusts; bool sealed; } cases[] = {
    { 0, false, 0, false, false },
    { THRESHOLD, false, 0, false, false },
    { 0, false, THRESHOLD, false, false },
    { THRESHOLD, false, THRESHOLD, false, true },
    { THRESHOLD, true, THRESHOLD, false, true },   // It is the reader's trust that counts.
    { THRESHOLD, false, THRESHOLD, true, false },
  };
  for (auto& c: cases) {
    SCOPED_TRACE(&c - cases);
    auto clientOptions = sealing(c.client), serverOptions = sealing(c.server);
    clientOptions.trustPeer = c.trust;
    serverOptions.trustPeer = c.serverTrusts;
    connect(clientOptions, serverOptions);
    sendNumbered(*client->connection, 0, LARGE);
    expectNumbers(*server, 0, 1);
    EXPECT_EQ(c.sealed, sealedBytesOf(*client) > 0);
  }
}

TEST_F(Sealed, OnlyWhatIsLargeEnough) {
  connect(sealing(LARGE), sealing());
  sendNumbered(*client->connection, 0, LARGE - 100);
  sendNumbered(*server->connection, 0, LARGE - 100);
  {
    // A large segment of which little is used.
    auto message = client->connection->newOutgoingMessage(1 << 20);
    message->getBody().initAs<capnp::rpc::Message>().initResolve().initException().setReason("1 ");
    message->send();
  }
  expectNumbers(*server, 0, 2);
  expectNumbers(*client, 0, 1);
  EXPECT_EQ(0, sealedBytesOf(*client));
  EXPECT_GT(sealedBytesOf(*server), 0);
  sendNumbered(*client->connection, 2, LARGE + 100);
  expectNumbers(*server, 2, 1);
  EXPECT_GT(sealedBytesOf(*client), 0);
}

TEST_F(Sealed, WhatThePeerWouldNotMapIsNotSealed) {
  auto little = sealing();
  little.sealedHeldBytes = LARGE_FILE - 4096;
  connect(sealing(), little);
  sendNumbered(*client->connection, 0, LARGE);
  sendNumbered(*client->connection, 1, LARGE / 2);
  expectNumbers(*server, 0, 2);
  EXPECT_GE(sealedBytesOf(*client), LARGE / 2);
  EXPECT_LT(sealedBytesOf(*client), LARGE);
}

TEST_F(Sealed, TotalIsLimitedUnlessThePeerIsTrusted) {
  for (bool trust: { false, true }) {
    auto options = sealing();
    options.sealedTotalBytes = 3 * LARGE_FILE + 4096;
    options.trustPeer = trust;
    connect(options);
    for (uint64_t i = 0; i < 10; i++) sendNumbered(*client->connection, i, LARGE);
    expectNumbers(*server, 0, 10);
    if (trust) {
      EXPECT_GE(sealedBytesOf(*client), 10 * LARGE);
    } else {
      EXPECT_GE(sealedBytesOf(*client), 3 * LARGE);
      EXPECT_LT(sealedBytesOf(*client), 4 * LARGE);
    }
  }
}

TEST_F(Sealed, TotalHoldsForMessagesBuiltBefore) {
  auto options = sealing();
  options.sealedTotalBytes = 2 * LARGE_FILE;
  connect(options);
  std::vector<Building> building;
  for (uint i = 0; i < 5; i++) building.push_back(build(*client, LARGE));
  for (auto& b: building) b.message->send();
  for (uint i = 0; i < 5; i++) EXPECT_TRUE(isAll(textIn(*next(*server)), 'a'));
  EXPECT_LT(sealedBytesOf(*client), 3 * LARGE);
}

TEST_F(Sealed, WhatIsHeldBeyondTheLimitIsCopied) {
  auto options = sealing();
  options.sealedHeldBytes = 2 * LARGE_FILE + 4096;
  connect(sealing(), options);
  auto regions = resourcesOf().regions;
  auto incoming = [&]() { return server->network.getStats().incoming; };
  std::deque<kj::Own<capnp::IncomingRpcMessage>> held;
  for (uint64_t i = 0; i < 5; i++) {
    sendNumbered(*client->connection, i, LARGE);
    held.push_back(next(*server));
  }
  EXPECT_EQ(regions + 2, resourcesOf().regions);
  EXPECT_LT(incoming().sealedBytes, 3 * LARGE);
  EXPECT_GE(incoming().copiedBytes, 3 * LARGE);
  for (uint64_t i = 0; i < 5; i++) EXPECT_EQ(i, readNumbered(*held[i]));

  held.pop_front();
  sendNumbered(*client->connection, 5, LARGE);
  held.push_back(next(*server));
  EXPECT_EQ(5, readNumbered(*held.back()));
  EXPECT_GE(incoming().sealedBytes, 3 * LARGE);
  EXPECT_EQ(regions + 2, resourcesOf().regions);
}

TEST_F(Sealed, WhatCannotBeSealedIsCopiedAndNothingIsTriedAgain) {
  CAPNP_SHM_NEEDS_MAPPING_AGAIN;
  connect();
  auto building = build(*client, LARGE);
  // Another writable mapping of the same file, as a pinned page would be.
  auto page = reinterpret_cast<uintptr_t>(building.text.begin()) / 4096 * 4096;
  void* other = mremap(reinterpret_cast<void*>(page), 0, 4096, MREMAP_MAYMOVE);
  ASSERT_NE(MAP_FAILED, other) << strerror(errno);
  building.message->send();
  auto message = next(*server);
  EXPECT_TRUE(isAll(textIn(*message), 'a'));
  EXPECT_EQ(0, sealedBytesOf(*client));
  memset(building.text.begin(), 'b', LARGE);
  EXPECT_TRUE(isAll(textIn(*message), 'a'));
  munmap(other, 4096);

  sendNumbered(*client->connection, 0, LARGE);
  sendNumbered(*server->connection, 0, LARGE);
  expectNumbers(*server, 0, 1);
  expectNumbers(*client, 0, 1);
  EXPECT_EQ(0, sealedBytesOf(*client));
  EXPECT_GT(sealedBytesOf(*server), 0);
}

TEST_F(Sealed, FileDescriptorsTravelBesideTheFiles) {
  connect();
  settleBells();
  auto before = resourcesOf();
  for (kj::uint count = 0; count < 5; count++) {
    auto building = build(*client, LARGE);
    std::vector<kj::AutoCloseFd> pipes;
    for (kj::uint i = 0; i < count; i++) pipes.push_back(conformance::pipeWith(kj::str(i)));
    building.message->setFds(KJ_MAP(p, pipes) { return p.get(); });
    building.message->send();
    auto message = next(*server);
    EXPECT_TRUE(isAll(textIn(*message), 'a'));
    auto fds = message->getAttachedFds();
    ASSERT_EQ(kj::min(count, MAX_FDS), fds.size());
    for (kj::uint i = 0; i < fds.size(); i++) {
      char c = 0;
      ASSERT_EQ(1, read(fds[i], &c, 1));
      EXPECT_EQ(char('0' + i), c);
    }
  }
  EXPECT_GE(sealedBytesOf(*client), 5 * LARGE);
  EXPECT_EQ(before, resourcesOf());
}

TEST_F(Sealed, NoMoreFilesAreAheadThanThePeerAllows) {
  connect();
  server->pause();
  turn();
  auto before = resourcesOf();
  constexpr uint64_t COUNT = SLOW ? 100 : 200;
  for (uint64_t i = 0; i < COUNT; i++) {
    sendNumbered(*client->connection, i, LARGE);
    turn();
  }
  // Each is a file that waits at the reader, or a buffer in a message that waits at the sender.
  EXPECT_LE(resourcesOf().fds, before.fds + 2 * MAX_FDS_AHEAD);
  server->resume();
  expectNumbers(*server, 0, COUNT);
  EXPECT_LT(sealedBytesOf(*client), COUNT * (LARGE + 100));
  EXPECT_GE(sealedBytesOf(*client), MAX_FDS_AHEAD * LARGE);
}

TEST_F(Sealed, AMessageInPartsMayHaveHadSealedSegments) {
  auto options = sealing();
  options.firstRegionBytes = 16 << 10;
  options.maxBytes = 64 << 10;
  connect(options);
  auto foreign = kj::heapArray<capnp::word>(40 << 10);
  memset(foreign.asBytes().begin(), 7, foreign.asBytes().size());
  constexpr uint ROUNDS = SLOW ? 10 : 50;
  for (uint round = 0; round < ROUNDS; round++) {
    auto message = client->connection->newOutgoingMessage(0);
    auto call = message->getBody().initAs<capnp::rpc::Message>().initCall();
    auto list = call.getParams().getContent().initAs<capnp::List<capnp::Data>>(2);
    memset(list.init(0, LARGE).begin(), round, LARGE);
    list.adopt(1, capnp::Orphanage::getForMessageContaining(list).referenceExternalData(
        capnp::Data::Reader(foreign.asBytes().begin(), foreign.asBytes().size())));
    message->send();
    sendNumbered(*client->connection, round, LARGE);
    auto received = next(*server);
    auto content = received->getBody().getAs<capnp::rpc::Message>().getCall().getParams()
        .getContent().getAs<capnp::List<capnp::Data>>();
    ASSERT_EQ(LARGE, content[0].size());
    for (auto b: content[0]) ASSERT_EQ(round, b);
    ASSERT_TRUE(content[1] == foreign.asBytes());
    expectNumbers(*server, round, 1);
  }
  EXPECT_GE(sealedBytesOf(*client), ROUNDS * LARGE);
}

TEST_F(Sealed, WithoutFileDescriptorsMessagesGoAsBefore) {
  connect();
  int lowest;
  KJ_SYSCALL(lowest = fcntl(0, F_DUPFD_CLOEXEC, 0));
  close(lowest);
  rlimit limit;
  KJ_SYSCALL(getrlimit(RLIMIT_NOFILE, &limit));
  auto none = limit;
  none.rlim_cur = lowest;
  KJ_SYSCALL(setrlimit(RLIMIT_NOFILE, &none));
  auto building = build(*client, LARGE);
  KJ_SYSCALL(setrlimit(RLIMIT_NOFILE, &limit));
  building.message->send();
  EXPECT_TRUE(isAll(textIn(*next(*server)), 'a'));
  EXPECT_EQ(0, sealedBytesOf(*client));
  sendNumbered(*client->connection, 0, LARGE);
  expectNumbers(*server, 0, 1);
  EXPECT_GT(sealedBytesOf(*client), 0);
}

TEST_F(Sealed, AnApplicationMayHoldAnyNumberOfBuilders) {
  connect();
  settleBells();
  auto before = resourcesOf();
  std::vector<Building> building;
  for (uint i = 0; i < 150; i++) building.push_back(build(*client, LARGE));
  // The rest is built in regions, some of which are not announced yet, or on the heap.
  EXPECT_LE(resourcesOf().fds, before.fds + 64 + 16);
  for (uint i = 0; i < 150; i += 2) building[i].message->send();
  for (uint i = 0; i < 75; i++) EXPECT_TRUE(isAll(textIn(*next(*server)), 'a'));
  EXPECT_GE(sealedBytesOf(*client), 32 * LARGE);
  building.clear();
  EXPECT_EQ(before.fds, resourcesOf().fds);
}

TEST_F(Sealed, ForkChildrenNeitherPreventItNorDisturbIt) {
  CAPNP_SHM_NEEDS_MADVISE;
  connect();
  sendNumbered(*client->connection, 0, LARGE);
  auto received = next(*server);
  auto building = build(*client, LARGE);
  int goOn[2];
  KJ_SYSCALL(pipe2(goOn, O_CLOEXEC));
  pid_t child = fork();
  if (child == 0) {
    // What is destroyed here is not unmapped: it never was mapped here.
    received = nullptr;
    building.message = nullptr;
    char c;
    close(goOn[1]);
    _exit(read(goOn[0], &c, 1) == 0 ? 0 : 1);
  }
  ASSERT_GT(child, 0);
  close(goOn[0]);
  building.message->send();
  EXPECT_TRUE(isAll(textIn(*next(*server)), 'a'));
  EXPECT_GE(sealedBytesOf(*client), 2 * LARGE);
  EXPECT_EQ(0, readNumbered(*received));
  close(goOn[1]);
  int status = -1;
  ASSERT_EQ(child, waitpid(child, &status, 0));
  EXPECT_EQ(0, status);
}

}  // namespace
}  // namespace capnpshm
