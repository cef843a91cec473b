// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "soak.h"

#include "handover.h"
#include <unistd.h>

namespace capnpshm {
namespace soak {

using conformance::ItemImpl;
using conformance::Root;
using conformance::ServerState;
using conformance::isPattern;
using conformance::pattern;

class Clients::Life {
  // One connection, from its beginning to its end.

public:
  Life(Clients& clients, bool trust)
      : clients(clients), random(clients.random()), operations(5 + random() % 60),
        stream(process::wrapSocket(
            clients.io, process::handOverNewPair(clients.handover, trust))),
        client(contextFor(clients.io, trust), *stream, 2),
        root(client.bootstrap().castAs<Root>()) {}

  kj::Promise<void> run() {
    if (operations-- == 0 || clients.stopping) return end();
    return operate().then([this]() { return run(); });
  }

private:
  Clients& clients;
  std::mt19937_64 random;
  uint operations;
  uint64_t sequence = 0;
  bool streamed = false;
  ServerState mine;
  kj::Own<kj::AsyncCapabilityStream> stream;
  SharedMemoryClient client;
  Root::Client root;
  kj::Vector<kj::Promise<void>> abandoned;

  void checked(size_t bytes = 0) {
    ++clients.counts.calls;
    clients.counts.bytes += bytes;
  }

  size_t randomSize() {
    switch (random() % 16) {
      case 0: return random() % 200000;
      case 1: case 2: case 3: return random() % 20000;
      case 4: case 5: case 6: case 7: return random() % 2000;
      default: return random() % 200;
    }
  }

  kj::Promise<void> operate() {
    switch (random() % 8) {
      case 0: return add();
      case 1: return count();
      case 2: return make();
      case 3: return visit();
      case 4: return fill();
      case 5: return random() % 4 == 0 ? puts() : count();
      case 6: return random() % 4 == 0 ? files() : add();
      default: return echo();
    }
  }

  kj::Promise<void> add() {
    auto request = root.addRequest();
    int64_t a = uint32_t(random()), b = uint32_t(random());
    request.setA(a);
    request.setB(b);
    return request.send().then([this, a, b](auto&& response) {
      KJ_REQUIRE(response.getValue() == a + b);
      checked();
    });
  }

  kj::Promise<void> count() {
    // Several at once, in order.
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = random() % 20; i > 0; i--) {
      calls.add(root.sequenceRequest().send().then([this](auto&& response) {
        KJ_REQUIRE(response.getValue() == sequence, response.getValue(), sequence);
        ++sequence;
        checked();
      }));
    }
    return kj::joinPromises(calls.releaseAsArray());
  }

  kj::Promise<void> make() {
    auto request = root.makeRequest();
    request.setName("soaked");
    return request.send().getItem().nameRequest().send().then([this](auto&& response) {
      KJ_REQUIRE(response.getName() == "soaked");
      checked();
    });
  }

  kj::Promise<void> visit() {
    auto request = root.visitRequest();
    request.setItem(kj::heap<ItemImpl>(mine, "visited"));
    uint count = random() % 5;
    request.setCount(count);
    return request.send().then([this, count](auto&& response) {
      KJ_REQUIRE(response.getValue() == count * (count - 1) / 2 || count == 0);
      checked();
    });
  }

  kj::Promise<void> echo() {
    size_t bytes = randomSize();
    uint seed = uint8_t(random());
    auto request = root.echoRequest();
    conformance::fillPattern(request.initData(bytes), seed);
    return request.send().then([this, bytes, seed](auto&& response) {
      KJ_REQUIRE(response.getData().size() == bytes);
      KJ_REQUIRE(isPattern(response.getData(), seed));
      checked(2 * bytes);
    });
  }

  kj::Promise<void> fill() {
    size_t bytes = randomSize();
    uint seed = uint8_t(random());
    auto request = root.fillRequest();
    request.setBytes(bytes);
    request.setSeed(seed);
    return request.send().then([this, bytes, seed](auto&& response) {
      KJ_REQUIRE(response.getData().size() == bytes);
      KJ_REQUIRE(isPattern(response.getData(), seed));
      checked(bytes);
    });
  }

  kj::Promise<void> puts() {
    // Once a life, since the server counts from the first.
    if (streamed) return add();
    streamed = true;
    auto sink = root.openRequest().send().getSink();
    return put(kj::mv(sink), 0, 1 + random() % 20);
  }
  kj::Promise<void> put(conformance::Sink::Client sink, uint n, uint count) {
    if (n == count) {
      return sink.totalRequest().send().then([this, count](auto&& response) {
        KJ_REQUIRE(response.getCount() == count);
        KJ_REQUIRE(response.getSum() == uint64_t(count) * (count - 1) / 2);
        KJ_REQUIRE(response.getOrdered());
        checked();
      });
    }
    auto request = sink.putRequest();
    request.setN(n);
    conformance::fillPattern(request.initFill(random() % 20000), n);
    return request.send().then([this, sink, n, count]() mutable {
      return put(kj::mv(sink), n + 1, count);
    });
  }

  kj::Promise<void> files() {
    auto request = root.filesRequest();
    auto items = request.initItems(2);
    items.set(0, kj::heap<conformance::FileItem>(mine, conformance::pipeWith("soaked")));
    items.set(1, kj::heap<ItemImpl>(mine, "without"));
    return request.send().then([this](auto&& response) {
      auto contents = response.getContents();
      KJ_REQUIRE(contents.size() == 2 && contents[0] == "soaked" && contents[1] == "none");
      checked();
    });
  }

  kj::Promise<void> end() {
    if (random() % 3 == 0) {
      // In the middle of things: calls are sent, and some perhaps served, but nobody waits.
      for (uint i = 0; i < 10; i++) {
        auto request = root.echoRequest();
        request.initData(randomSize());
        abandoned.add(request.send().ignoreResult());
        ++clients.counts.abandoned;
      }
      if (random() % 2 == 0) return kj::evalLast([]() {});
    }
    return kj::READY_NOW;
  }
};

Clients::Clients(kj::AsyncIoContext& io, int handover, uint64_t seed)
    : io(io), handover(handover), random(seed) {}

void Clients::start(uint count) {
  stopping = false;
  for (uint i = 0; i < count; i++) {
    slots.add(live().catch_([this](kj::Exception&& exception) {
      if (failure == nullptr) failure = kj::mv(exception);
      stopping = true;
    }).eagerlyEvaluate(nullptr));
  }
}

kj::Promise<void> Clients::finish() {
  stopping = true;
  return kj::joinPromises(slots.releaseAsArray());
}

kj::Promise<void> Clients::live() {
  if (stopping) return kj::READY_NOW;
  ++counts.lives;
  auto life = kj::heap<Life>(*this, random() % 2 == 1);
  auto running = life->run();
  return running.attach(kj::mv(life)).then([this]() { return live(); });
}

}  // namespace soak
}  // namespace capnpshm
