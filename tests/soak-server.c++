// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "soak.h"

#include "handover.h"
#include <errno.h>
#include <malloc.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// The processes beside the driver: the server, and the clients that are slow to read.

namespace capnpshm {
namespace soak {

using conformance::Root;
using conformance::RootImpl;
using conformance::ServerState;

namespace {

void report(kj::StringPtr text) {
  auto line = kj::str(text, '\n');
  KJ_SYSCALL(write(process::REPORT_FD, line.begin(), line.size()));
}

process::Progress& mapProgress() {
  void* address = mmap(nullptr, sizeof(process::Progress), PROT_READ | PROT_WRITE, MAP_SHARED,
      process::PROGRESS_FD, 0);
  KJ_REQUIRE(address != MAP_FAILED, strerror(errno));
  return *reinterpret_cast<process::Progress*>(address);
}

class Server final: private kj::TaskSet::ErrorHandler {
public:
  explicit Server(kj::AsyncIoContext& io)
      : io(io), progress(mapProgress()),
        handover(io, kj::AutoCloseFd(process::SOCKET_FD)), tasks(*this),
        ticking(tick().eagerlyEvaluate(nullptr)) {}

  kj::Promise<void> run() {
    return handover.next().then([this](kj::Maybe<process::Handover::Connection>&& next)
        -> kj::Promise<void> {
      KJ_IF_MAYBE(n, next) {
        accept(kj::mv(n->stream), n->tag != 0);
        return run();
      }
      return tasks.onEmpty();
    });
  }

private:
  struct Alive {
    // Relaxed, as all of these: figures for the driver, which order nothing.
    process::Progress& progress;
    explicit Alive(process::Progress& progress): progress(progress) {
      progress[ACCEPTED].fetch_add(1, std::memory_order_relaxed);
      progress[CONNECTIONS].fetch_add(1, std::memory_order_relaxed);
    }
    ~Alive() { progress[CONNECTIONS].fetch_sub(1, std::memory_order_relaxed); }
    KJ_DISALLOW_COPY(Alive);
  };

  struct Accepted {
    // A server of its own for each, so that a client can tell what its answers must be.
    Alive alive;  // Destroyed when nothing is left of the others.
    kj::Own<kj::AsyncCapabilityStream> stream;
    ServerState state;
    SharedMemoryVatNetwork network;
    capnp::RpcSystem<conformance::VatId> rpc;
    kj::ListLink<Accepted> link;

    Accepted(kj::Own<kj::AsyncCapabilityStream> streamParam, const SharedMemoryContext& context,
             process::Progress& progress)
        : alive(progress), stream(kj::mv(streamParam)),
          network(context, *stream, 2, process::Side::SERVER),
          rpc(capnp::makeRpcServer(
              network, capnp::Capability::Client(kj::heap<RootImpl>(state)))) {}
  };

  kj::AsyncIoContext& io;
  process::Progress& progress;
  process::Handover handover;
  kj::List<Accepted, &Accepted::link> connections;
  kj::TaskSet tasks;
  kj::Promise<void> ticking;

  void accept(kj::Own<kj::AsyncCapabilityStream> stream, bool trust) {
    auto accepted = kj::heap<Accepted>(kj::mv(stream), contextFor(io, trust), progress);
    auto& a = *accepted;
    connections.add(a);
    tasks.add(a.network.onDisconnect().then([this, &a]() {
      look(a);
      auto stats = a.network.getStats();
      if (stats.outgoing.transport == Transport::PLAIN) {
        progress[NOT_SHARED].fetch_add(1, std::memory_order_relaxed);
      }
      progress[HEAP_WAITS].fetch_add(stats.heapWaits, std::memory_order_relaxed);
      connections.remove(a);
    }).attach(kj::mv(accepted)));
  }

  void raise(uint index, uint64_t value) {
    if (value > progress[index].load(std::memory_order_relaxed)) {
      progress[index].store(value, std::memory_order_relaxed);
    }
  }

  void look(Accepted& accepted) {
    raise(LARGEST_QUEUE, accepted.network.getCurrentQueueSize());
    raise(LARGEST_SHARE, accepted.network.getStats().regionBytes);
  }

  kj::Promise<void> tick() {
    return io.provider->getTimer().afterDelay(20 * kj::MILLISECONDS).then([this]() {
      auto ticks = progress[TICKS].fetch_add(1, std::memory_order_relaxed);
      if (ticks % 10 == 0) {
        for (auto& connection: connections) look(connection);
      }
      // What is measured is what we hold, and not what the allocator keeps for later.
      if (connections.empty()) malloc_trim(0);
      return tick();
    });
  }

  void taskFailed(kj::Exception&& exception) override { KJ_LOG(ERROR, exception); }
};

}  // namespace

SharedMemoryContext contextFor(kj::AsyncIoContext& io, bool trust) {
  SharedMemoryContext result;
  result.port = &io.unixEventPort;
  result.options.maxBytes = MAX_BYTES;
  result.options.plainCalls = 1;
  result.options.trustPeer = trust;
  return result;
}

int serve() {
  auto io = kj::setupAsyncIo();
  Server server(io);
  report("ready");
  server.run().wait(io.waitScope);
  return 0;
}

int readSlowly(uint connections) {
  auto io = kj::setupAsyncIo();
  struct Slow {
    kj::Own<kj::AsyncCapabilityStream> stream;
    SharedMemoryClient client;
    Root::Client root;

    Slow(kj::AsyncIoContext& io, bool trust)
        : stream(process::wrapSocket(
              io, process::handOverNewPair(process::SOCKET_FD, trust))),
          client(contextFor(io, trust), *stream),
          root(client.bootstrap().castAs<Root>()) {}
  };
  kj::Vector<kj::Own<Slow>> all;
  for (uint i = 0; i < connections; i++) all.add(kj::heap<Slow>(io, i % 2 == 1));
  for (auto& slow: all) slow->root.sequenceRequest().send().wait(io.waitScope);

  // Until it is killed: asks for more than fits into shared memory, does not read for a while, and
  // then finds all of it. The number of calls is reported after each round of them.
  for (uint round = 0;; round++) {
    kj::Vector<kj::Promise<void>> calls;
    for (auto& slow: all) {
      for (uint i = 0; i < SLOW_CALLS; i++) {
        auto request = slow->root.fillRequest();
        request.setBytes(SLOW_BYTES - i);
        request.setSeed(uint8_t(round + i));
        calls.add(request.send().then([round, i](auto&& response) {
          KJ_REQUIRE(response.getData().size() == SLOW_BYTES - i);
          KJ_REQUIRE(conformance::isPattern(response.getData(), uint8_t(round + i)));
        }));
      }
    }
    io.waitScope.poll();
    usleep(500 * 1000);
    uint count = calls.size();
    kj::joinPromises(calls.releaseAsArray()).wait(io.waitScope);
    report(kj::str(count));
  }
}

}  // namespace soak
}  // namespace capnpshm
