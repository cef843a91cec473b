// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-fixture.h"

#include <capnp/rpc.capnp.h>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <random>
#include <string.h>

// Messages and threads: built on worker threads, as libmultiprocess does, and destroyed on any
// thread at any time.

namespace capnpshm {
namespace conformance {
namespace {

using Connection = capnp::TwoPartyVatNetworkBase::Connection;
using Incoming = kj::Own<capnp::IncomingRpcMessage>;
using Outgoing = kj::Own<capnp::OutgoingRpcMessage>;

class Workers {
  // A few threads that do what they are given, in any order.

public:
  explicit Workers(uint count) {
    for (uint i = 0; i < count; i++) threads.add(kj::heap<kj::Thread>([this]() { run(); }));
  }
  ~Workers() noexcept(false) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ended = true;
    }
    changed.notify_all();
    threads.clear();
  }

  void post(kj::Function<void()> job) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      jobs.push_back(kj::mv(job));
    }
    changed.notify_one();
  }

private:
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<kj::Function<void()>> jobs;
  bool ended = false;
  kj::Vector<kj::Own<kj::Thread>> threads;

  void run() {
    for (;;) {
      kj::Maybe<kj::Function<void()>> job;
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this]() { return ended || !jobs.empty(); });
        if (jobs.empty()) return;
        job = kj::mv(jobs.front());
        jobs.pop_front();
      }
      KJ_ASSERT_NONNULL(job)();
    }
  }
};

class Done {
  // Tells a loop that a worker is done. What the worker wrote is visible to who has asked wait().

public:
  Done() {
    auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
    promise = kj::mv(paf.promise);
    fulfiller = kj::mv(paf.fulfiller);
  }

  void tell() {
    // The worker. Nothing of this object is touched afterwards.
    std::lock_guard<std::mutex> lock(mutex);
    told = true;
    fulfiller->fulfill();
  }

  kj::Promise<void> wait() {
    // The loop's thread.
    return promise.then([this]() {
      std::lock_guard<std::mutex> lock(mutex);
      KJ_ASSERT(told);
    });
  }

private:
  std::mutex mutex;
  bool told = false;
  kj::Promise<void> promise = nullptr;
  kj::Own<kj::CrossThreadPromiseFulfiller<void>> fulfiller;
};

std::vector<Mode> modes(bool reference) {
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    if (reference && strcmp(mode.name, "TwoParty") == 0) result.push_back(mode);
    for (auto name: { "Untrusted", "TrustedPort", "TrustedNoPort", "SmallTrusted" }) {
      if (strcmp(mode.name, name) == 0) result.push_back(mode);
    }
  }
  return result;
}

// =======================================================================================
// Calls

class WorkerRoot final: public Root::Server {
  // Reads params and builds results on worker threads.

public:
  explicit WorkerRoot(Workers& workers): workers(workers) {}

  kj::Promise<void> echo(EchoContext context) override {
    auto done = kj::heap<Done>();
    workers.post([context, &done = *done]() mutable {
      auto data = context.getParams().getData();
      auto results = context.getResults().initData(data.size());
      memcpy(results.begin(), data.begin(), data.size());
      done.tell();
    });
    auto promise = done->wait();
    return promise.attach(kj::mv(done));
  }

private:
  Workers& workers;
};

class ThreadCalls: public ThreadedConformance {};

INSTANTIATE_TEST_SUITE_P(Modes, ThreadCalls, testing::ValuesIn(modes(true)), modeName);

TEST_P(ThreadCalls, ResultsBuiltOnOtherThreads) {
  auto thread = connectThread(state);
  auto root = thread->client->root();
  constexpr uint ROUNDS = SLOW ? 4 : 20;
  for (uint round = 0; round < ROUNDS; round++) {
    auto promises = kj::heapArrayBuilder<kj::Promise<void>>(8);
    for (uint i = 0; i < 8; i++) {
      size_t bytes = i % 4 == 3 ? 300000 : i * 700 + round;
      auto request = root.onThreadRequest();
      request.setBytes(bytes);
      request.setSeed(round + i);
      promises.add(request.send().then([=](capnp::Response<Root::OnThreadResults>&& response) {
        EXPECT_EQ(bytes, response.getData().size());
        EXPECT_TRUE(isPattern(response.getData(), uint8_t(round + i)));
      }));
    }
    await(kj::joinPromises(promises.finish()));
  }
}

TEST_P(ThreadCalls, ParamsReadAndResultsBuiltByAPoolOfWorkers) {
  Workers workers(4);
  auto thread = kj::heap<ServerThread>(GetParam(), io, LinkOptions(),
      [&workers](kj::AsyncIoContext&) -> capnp::Capability::Client {
    return kj::heap<WorkerRoot>(workers);
  });
  thread->client->start(nullptr);
  auto root = thread->client->root();
  constexpr uint ROUNDS = SLOW ? 10 : 60;
  for (uint round = 0; round < ROUNDS; round++) {
    auto promises = kj::heapArrayBuilder<kj::Promise<void>>(20);
    for (uint i = 0; i < 20; i++) {
      auto data = pattern(i % 10 == 9 ? 100000 : i * i * 10 + round, round + i);
      auto request = root.echoRequest();
      request.setData(data);
      promises.add(request.send().then([data = kj::mv(data)](auto&& response) {
        EXPECT_TRUE(response.getData() == data.asPtr());
      }));
    }
    await(kj::joinPromises(promises.finish()));
  }
}

TEST_P(ThreadCalls, RequestsBuiltAndResponsesReadOnOtherThreads) {
  auto thread = connectThread(state);
  auto root = thread->client->root();
  for (uint i = 0; i < (SLOW ? 20 : 100); i++) {
    auto data = pattern(i % 10 == 9 ? 100000 : i * 50, i);
    // The request, on a thread of its own, while the loop waits for that.
    kj::Maybe<capnp::Request<Root::EchoParams, Root::EchoResults>> request;
    {
      kj::Thread builder([&]() {
        request = root.echoRequest();
        KJ_ASSERT_NONNULL(request).setData(data);
      });
    }
    auto promise = KJ_ASSERT_NONNULL(request).send();
    auto response = await(kj::mv(promise));
    kj::Thread reader([&]() { KJ_ASSERT(response.getData() == data.asPtr()); });
  }
}

// =======================================================================================
// Messages

class ThreadMessages: public Conformance {
  // Speaks to the connections themselves, both on this thread. (Not TwoPartyVatNetwork's, whose
  // reference counts are not atomic.)

protected:
  static constexpr uint WORKERS = 3;

  struct Ends {
    kj::Own<Link> link;
    kj::Own<Connection> from, to;
    kj::Promise<void> listening = nullptr;
    bool over = false;
    // Whether the peer of `from` is gone.
  };

  kj::Own<Ends> connectEnds() {
    auto result = kj::heap<Ends>();
    auto& ends = *result;
    ends.link = kj::heap<Link>(GetParam(), io, LinkOptions());
    ends.from = ends.link->client->connect();
    ends.to = await(ends.link->server->network.get().accept());
    ends.listening = ends.from->receiveIncomingMessage().then(
        [&ends](auto&& message) { ends.over = message == nullptr; },
        [&ends](kj::Exception&&) { ends.over = true; }).eagerlyEvaluate(nullptr);
    // A few messages, so that both directions become what they will be.
    for (uint i = 0; i < 5; i++) {
      send(ends.from->newOutgoingMessage(0), i, 10);
      expectMessage(receive(ends), i, 10);
      turn();
    }
    return result;
  }

  static void build(capnp::OutgoingRpcMessage& message, uint number, size_t bytes) {
    auto call = message.getBody().initAs<capnp::rpc::Message>().initCall();
    call.setQuestionId(number);
    auto data = call.initParams().getContent().initAs<capnp::Data>(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = number * 7 + i;
  }
  static void send(Outgoing message, uint number, size_t bytes) {
    build(*message, number, bytes);
    message->send();
  }
  static void expectMessage(Incoming message, uint number, size_t bytes) {
    KJ_ASSERT(isMessage(*message, number, bytes), number);
  }
  static bool isMessage(capnp::IncomingRpcMessage& message, uint number, size_t bytes) {
    auto call = message.getBody().getAs<capnp::rpc::Message>().getCall();
    auto data = call.getParams().getContent().getAs<capnp::Data>();
    if (call.getQuestionId() != number || data.size() != bytes) return false;
    for (size_t i = 0; i < bytes; i++) {
      if (data[i] != byte(number * 7 + i)) return false;
    }
    return true;
  }
  static size_t sizeOf(uint number) {
    // Inline, by reference, and so large that a few fill the "Small" modes' memory.
    return number % 11 == 10 ? 20000 : number % 3 == 0 ? number % 60 : 100 + number % 2000;
  }

  Incoming receive(Ends& ends) {
    return KJ_ASSERT_NONNULL(await(ends.to->receiveIncomingMessage()));
  }

  uint count() { return SLOW ? 300 : 3000; }
};

INSTANTIATE_TEST_SUITE_P(Modes, ThreadMessages, testing::ValuesIn(modes(false)), modeName);

TEST_P(ThreadMessages, BuiltOnManyThreadsAtOnce) {
  auto own = connectEnds();
  auto& ends = *own;
  Workers workers(WORKERS);
  struct Slot {
    Done done;
    Outgoing message;
  };
  for (uint batch = 0; batch < count() / 30; batch++) {
    kj::Vector<kj::Own<Slot>> slots;
    for (uint i = 0; i < 30; i++) {
      uint number = batch * 30 + i;
      slots.add(kj::heap<Slot>());
      // Made and built there; or made here, where it gets shared memory, and built there.
      if (i % 3 == 0) slots[i]->message = ends.from->newOutgoingMessage(sizeOf(number) / 8);
      workers.post([&slot = *slots[i], &ends, number]() {
        if (slot.message.get() == nullptr) {
          slot.message = ends.from->newOutgoingMessage(number % 500);
        }
        build(*slot.message, number, sizeOf(number));
        // One that is given up where it was built.
        auto dropped = ends.from->newOutgoingMessage(number % 300);
        build(*dropped, 0, 2000);
        slot.done.tell();
      });
      // Meanwhile the loop's thread uses the connection too.
      send(ends.from->newOutgoingMessage(0), 1000000 + number, 900);
      expectMessage(receive(ends), 1000000 + number, 900);
    }
    for (uint i = 0; i < 30; i++) await(slots[i]->done.wait());
    // Sent in another order than built.
    for (uint i = 0; i < 30; i++) slots[(i * 7) % 30]->message->send();
    for (uint i = 0; i < 30; i++) {
      uint number = batch * 30 + (i * 7) % 30;
      expectMessage(receive(ends), number, sizeOf(number));
    }
  }
}

TEST_P(ThreadMessages, ReceivedOnesAreReadAndDestroyedOnOtherThreads) {
  // Where memory is small, the sender can go on only when it hears of what they gave back.
  auto own = connectEnds();
  auto& ends = *own;
  std::atomic<uint> wrong{0};
  Workers workers(WORKERS);
  uint sent = 0;
  for (uint number = 0; number < count(); number++) {
    while (sent < number + 40 && sent < count()) {
      send(ends.from->newOutgoingMessage(0), sent, sizeOf(sent));
      ++sent;
    }
    workers.post([&wrong, number, message = receive(ends)]() mutable {
      if (!isMessage(*message, number, sizeOf(number))) ++wrong;
      message = nullptr;
    });
  }
  EXPECT_EQ(0, wrong);
}

TEST_P(ThreadMessages, SentOnesAreDestroyedOnOtherThreads) {
  // As RpcSystem keeps a message with capabilities. Its memory is free when both have let go, in
  // whichever order.
  auto own = connectEnds();
  auto& ends = *own;
  Workers workers(WORKERS);
  for (uint number = 0; number < count(); number++) {
    auto message = ends.from->newOutgoingMessage(number % 2 ? 0 : sizeOf(number) / 8 + 20);
    build(*message, number, sizeOf(number));
    message->send();
    auto destroy = [&]() { workers.post([m = kj::mv(message)]() mutable { m = nullptr; }); };
    if (number % 3 == 0) destroy();
    expectMessage(receive(ends), number, sizeOf(number));
    if (number % 3 != 0) destroy();
  }
}

TEST_P(ThreadMessages, BothKindsOutliveConnectionStreamAndLoop) {
  for (bool foreign: { false, true }) {
    kj::Vector<Incoming> received;
    kj::Vector<Outgoing> unsent, sent;
    {
      auto own = connectEnds();
      auto& ends = *own;
      for (uint number = 0; number < 20; number++) {
        sent.add(ends.from->newOutgoingMessage(number * 20));
        build(*sent.back(), number, sizeOf(number));
        sent.back()->send();
        received.add(receive(ends));
        unsent.add(ends.from->newOutgoingMessage(number * 20));
        build(*unsent.back(), number, sizeOf(number));
      }
      // One that is still under way.
      sent.add(ends.from->newOutgoingMessage(0));
      build(*sent.back(), 99, 5000);
      sent.back()->send();
    }
    if (foreign) {
      // Not the loop of this thread, but of one that has ended by now.
      kj::Vector<Incoming> there;
      kj::Vector<Outgoing> thereToo;
      kj::Thread([&]() {
        for (auto& message: received) there.add(kj::mv(message));
        for (auto& message: unsent) thereToo.add(kj::mv(message));
        for (uint i = 0; i < there.size(); i++) KJ_ASSERT(isMessage(*there[i], i, sizeOf(i)));
        // Still a builder, on whichever thread.
        for (auto& message: thereToo) build(*message, 1, 3000);
        there.clear();
        thereToo.clear();
        sent.clear();
      });
    } else {
      for (uint i = 0; i < received.size(); i++) {
        EXPECT_TRUE(isMessage(*received[i], i, sizeOf(i)));
        EXPECT_EQ(unsent[i]->sizeInWords(), sent[i]->sizeInWords());
      }
      for (auto& message: unsent) build(*message, 1, 3000);
    }
  }
}

class ThreadLoops: public testing::TestWithParam<Mode> {};

INSTANTIATE_TEST_SUITE_P(Modes, ThreadLoops, testing::ValuesIn(modes(false)), modeName);

TEST_P(ThreadLoops, MessagesOutliveTheirLoopAndItsThread) {
  // A whole event loop lives and dies on a thread; what is left of it goes here, and on a third
  // thread at the same time.
  class Body final: public ThreadMessages {
  public:
    explicit Body(kj::Vector<Incoming>& received, kj::Vector<Outgoing>& built)
        : received(received), built(built) {}
    void TestBody() override {
      auto own = connectEnds();
      auto& ends = *own;
      for (uint number = 0; number < 40; number++) {
        send(ends.from->newOutgoingMessage(0), number, sizeOf(number) % 1500);
        received.add(receive(ends));
        built.add(ends.from->newOutgoingMessage(number * 10));
        build(*built.back(), number, sizeOf(number));
      }
    }
    static bool isRight(capnp::IncomingRpcMessage& message, uint number) {
      return isMessage(message, number, sizeOf(number) % 1500);
    }
  private:
    kj::Vector<Incoming>& received;
    kj::Vector<Outgoing>& built;
  };
  kj::Vector<Incoming> received;
  kj::Vector<Outgoing> built;
  kj::Thread([&]() { Body(received, built).TestBody(); });
  ASSERT_EQ(40u, received.size());
  for (uint i = 0; i < 40; i++) EXPECT_TRUE(Body::isRight(*received[i], i));
  kj::Vector<Incoming> others;
  for (uint i = 20; i < 40; i++) others.add(kj::mv(received[i]));
  kj::Thread thread([&]() { others.clear(); });
  received.clear();
  built.clear();
}

TEST_P(ThreadMessages, DestroyedElsewhereWhileTheConnectionGoesDown) {
  // Neither waits for the other, and neither touches what the other has destroyed.
  for (uint round = 0; round < (SLOW ? 20 : 100); round++) {
    Workers workers(WORKERS);
    auto own = connectEnds();
    auto& ends = *own;
    for (uint number = 0; number < 12; number++) {
      auto message = ends.from->newOutgoingMessage(number * 20);
      build(*message, number, sizeOf(number) % 1500);
      message->send();
      workers.post([m = kj::mv(message)]() mutable { m = nullptr; });
      workers.post([m = receive(ends)]() mutable { m = nullptr; });
      auto unsent = ends.from->newOutgoingMessage(300);
      build(*unsent, number, 2000);
      workers.post([m = kj::mv(unsent)]() mutable { m = nullptr; });
    }
    if (round % 2) {
      ends.listening = nullptr;
      ends.from = nullptr;
      ends.link->destroyClient();
    }
  }
}

TEST_P(ThreadMessages, EndOfAConnectionDoesNotWakeItsOwnLoop) {
  // What lets other threads wake it goes away, which must not pass for a wake-up.
  auto ends = connectEnds();
  while (io.unixEventPort.poll()) {}
  ends = nullptr;
  EXPECT_FALSE(io.unixEventPort.poll());
}

TEST_P(ThreadMessages, MadeAfterThePeerIsGone) {
  auto own = connectEnds();
  auto& ends = *own;
  ends.to = nullptr;
  ends.link->destroyServer();
  until([&]() { return ends.over; });
  Outgoing there;
  kj::Thread([&]() {
    there = ends.from->newOutgoingMessage(200);
    build(*there, 1, 5000);
  });
  auto here = ends.from->newOutgoingMessage(200);
  build(*here, 2, 5000);
  // Dropped silently, or refused, but no worse.
  kj::runCatchingExceptions([&]() { there->send(); });
  kj::runCatchingExceptions([&]() { here->send(); });
  kj::Thread([&]() { here = nullptr; });
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
