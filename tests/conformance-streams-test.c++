// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

// Streaming calls and their flow control, receivers that stop reading, held memory, huge messages.

namespace capnpshm {
namespace conformance {
namespace {

size_t maxBytesOf(const EndMode& end, const LinkOptions& options) {
  if (end.kind != EndMode::CONTEXT) return SharedMemoryOptions().maxBytes;
  if (end.small) return 64 * 1024;
  return options.maxBytes == 0 ? SharedMemoryOptions().maxBytes : options.maxBytes;
}

kj::Promise<void> put(Sink::Client& sink, uint64_t n, size_t bytes) {
  auto request = sink.putRequest();
  request.setN(n);
  fillPattern(request.initFill(bytes), n);
  return request.send();
}

class Streams: public RawConformance {
protected:
  size_t windowOf(End& end, const LinkOptions& options) {
    // The flow control window of a sender, in bytes.
    if (isShared()) return kj::min(size_t(256) << 10, maxBytesOf(end.mode, options) / 4);
    if (mode().stream == StreamKind::IN_PROCESS) {
      return capnp::RpcFlowController::DEFAULT_WINDOW_SIZE;
    }
    int size = 0;
    uint length = sizeof(size);
    end.stream->getsockopt(SOL_SOCKET, SO_SNDBUF, &size, &length);
    return size;
  }

  void expectTotal(Sink::Client& sink, uint64_t count) {
    auto total = await(sink.totalRequest().send());
    EXPECT_EQ(count, total.getCount());
    EXPECT_EQ(count * (count - 1) / 2, total.getSum());
    EXPECT_TRUE(total.getOrdered());
  }

  static size_t sizeOf(uint n) {
    constexpr size_t SIZES[] = { 8, 100, 1000, 160, 0, 30000, 24, 3000, 130, 70000, 400, 50 };
    return SIZES[n * 5 % kj::size(SIZES)] + n % 7;
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, Streams, testing::ValuesIn(allModes()), modeName);

TEST_P(Streams, ManySizesInOrder) {
  auto link = connect(state);
  auto sink = await(link->client->root().openRequest().send()).getSink();
  uint count = SLOW ? 150 : 1500;
  for (uint i = 0; i < count; i++) await(put(sink, i, i % 500 == 77 ? 700000 : sizeOf(i)));
  expectTotal(sink, count);
}

TEST_P(Streams, SentWithoutWaiting) {
  // The caller does not heed flow control, and begins before the connection is upgraded.
  auto link = connect(state);
  auto sink = link->client->root().openRequest().send().getSink();
  kj::Vector<kj::Promise<void>> promises;
  uint count = SLOW ? 200 : 2000;
  for (uint i = 0; i < count; i++) promises.add(put(sink, i, sizeOf(i)));
  expectTotal(sink, count);
  await(kj::joinPromises(promises.releaseAsArray()));
}

TEST_P(Streams, TwoStreamsBothWays) {
  auto link = connect(capnp::Capability::Client(kj::heap<RootImpl>(state)), LinkOptions(),
      capnp::Capability::Client(kj::heap<RootImpl>(mine)));
  auto up = await(link->client->root().openRequest().send()).getSink();
  auto down = await(link->server->root().openRequest().send()).getSink();
  uint count = SLOW ? 100 : 1000;
  kj::Function<kj::Promise<void>(Sink::Client&, uint)> pump =
      [&](Sink::Client& sink, uint i) -> kj::Promise<void> {
    if (i == count) return kj::READY_NOW;
    return put(sink, i, sizeOf(i)).then([&pump, &sink, i]() { return pump(sink, i + 1); });
  };
  auto both = kj::heapArrayBuilder<kj::Promise<void>>(2);
  both.add(pump(up, 0));
  both.add(pump(down, 0));
  await(kj::joinPromises(both.finish()));
  expectTotal(up, count);
  expectTotal(down, count);
}

TEST_P(Streams, ReceiverThatDoesNotReturnHoldsTheSender) {
  LinkOptions options;
  options.maxBytes = 2 << 20;
  auto link = connect(state, options);
  auto sink = await(link->client->root().openRequest().send()).getSink();
  link->check();
  state.holdPuts = true;
  for (size_t bytes: { 1000, 9000 }) {
    uint before = state.putCount;
    uint n = before;
    kj::Promise<void> blocked = nullptr;
    size_t window;
    for (;;) {
      // As it is when the sender looks: the system makes that of a TCP socket larger meanwhile.
      window = windowOf(*link->client, options);
      auto promise = put(sink, n++, bytes);
      if (!promise.poll(io.waitScope)) {
        blocked = kj::mv(promise);
        break;
      }
      ASSERT_LT(n - before, 1000000u);
    }
    // What is under way fills the window, and exceeds it by two messages at most. (The call's own
    // words, about 130 bytes, count too.)
    EXPECT_GE((n - before) * (bytes + 300), window);
    EXPECT_LE((n - before) * bytes, window + 2 * (bytes + 300));
    turn();
    EXPECT_FALSE(blocked.poll(io.waitScope));

    // One return makes room for about one more.
    until([&]() { return !state.puts.empty(); });
    while (!blocked.poll(io.waitScope)) {
      until([&]() { return !state.puts.empty(); });
      state.puts.front()->fulfill();
      state.puts.pop_front();
      ASSERT_LE(state.putCount - before, 6u);
    }
    while (state.putCount < n || !state.puts.empty()) {
      until([&]() { return !state.puts.empty(); });
      state.puts.front()->fulfill();
      state.puts.pop_front();
      turn();
    }
  }
  state.holdPuts = false;
  uint total = state.putCount;
  expectTotal(sink, total);
}

TEST_P(Streams, ErrorComesWithALaterCall) {
  auto link = connect(state);
  auto sink = await(link->client->root().openRequest().send()).getSink();
  state.failPut = 20;
  uint n = 0;
  kj::Maybe<kj::Exception> error;
  while (error == nullptr && n < 10000) {
    error = kj::runCatchingExceptions([&]() { await(put(sink, n, 3000)); });
    ++n;
  }
  EXPECT_GT(n, 20u);
  EXPECT_LT(n, 10000u);
  KJ_IF_MAYBE(e, error) {
    EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), "this put fails")) << kj::str(*e).cStr();
  }
  EXPECT_FAILS(FAILED, "this put fails", put(sink, n, 10));
  EXPECT_FAILS(FAILED, "this put fails", sink.totalRequest().send().ignoreResult());
  // Another stream of the same connection goes on.
  state.putCount = 0;
  state.putSum = 0;
  state.failPut = kj::maxValue;
  state.ordered = true;
  auto other = await(link->client->root().openRequest().send()).getSink();
  for (uint i = 0; i < 30; i++) await(put(other, i, 3000));
  expectTotal(other, 30);
}

TEST_P(Streams, ErrorComesWithTotal) {
  // When all was sent before the error came back.
  auto link = connect(state);
  auto sink = await(link->client->root().openRequest().send()).getSink();
  state.failPut = 3;
  for (uint i = 0; i < 5; i++) await(put(sink, i, 100));
  EXPECT_FAILS(FAILED, "this put fails", sink.totalRequest().send().ignoreResult());
}

TEST_P(Streams, FlowLimitOfTheReceiver) {
  // The RPC system itself stops receiving while more than so many words of calls are running.
  auto link = connect(state);
  KJ_ASSERT_NONNULL(link->server->rpc).setFlowLimit(2000);
  auto root = link->client->root();
  std::vector<kj::Promise<capnp::Response<Root::EchoResults>>> promises;
  uint count = SLOW ? 60 : 600;
  auto slow = root.slowRequest().send();
  for (uint i = 0; i < count; i++) {
    auto request = root.echoRequest();
    fillPattern(request.initData(sizeOf(i)), i);
    promises.push_back(request.send());
  }
  until([&]() { return state.slow.size() == 1; });
  state.slow.front()->fulfill();
  for (uint i = 0; i < count; i++) {
    auto response = await(kj::mv(promises[i]));
    ASSERT_EQ(sizeOf(i), response.getData().size());
    ASSERT_TRUE(isPattern(response.getData(), i));
  }
  EXPECT_EQ(42, await(kj::mv(slow)).getValue());
}

// =======================================================================================
// Receivers that stop reading

TEST_P(Streams, ReceiversThatStopReading) {
  // Neither end calls receiveIncomingMessage() for a while, and both send far more than there is
  // room for. Then all must arrive, in order.
  LinkOptions options;
  options.maxBytes = 512 * 1024;
  auto raw = connectRaw(options);
  settle(*raw);
  uint count = SLOW ? 400 : 3000;
  auto expectWithinLimit = [&]() {
    for (auto end: { raw->link.client.get(), raw->link.server.get() }) {
      KJ_IF_MAYBE(stats, end->network.getStats()) {
        ASSERT_LE(stats->regionBytes, maxBytesOf(end->mode, options));
      }
    }
  };
  for (uint round = 0; round < 2; round++) {
    for (uint i = 0; i < count; i++) {
      sendMessage(*raw->client, i, sizeOf(i));
      sendMessage(*raw->server, i, sizeOf(i + 1));
      if (i % 50 == 0) {
        turn();
        expectWithinLimit();
      }
    }
    for (auto end: { raw->link.client.get(), raw->link.server.get() }) {
      if (end->mode.kind != EndMode::CONTEXT) continue;
      EXPECT_LT(0u, end->network.getCurrentQueueCount());
      EXPECT_LT(0u, KJ_ASSERT_NONNULL(end->network.getStats()).heapWaits);
    }
    for (uint i = 0; i < count; i++) {
      ASSERT_TRUE(isMessage(*next(*raw->server), i, sizeOf(i)));
      if (round == 0) {
        ASSERT_TRUE(isMessage(*next(*raw->client), i, sizeOf(i + 1)));
      }
      if (i % 50 == 0) expectWithinLimit();
    }
    // In the second round one direction after the other.
    if (round == 1) {
      for (uint i = 0; i < count; i++) {
        ASSERT_TRUE(isMessage(*next(*raw->client), i, sizeOf(i + 1)));
      }
    }
    settle(*raw);
    EXPECT_EQ(0, raw->link.client->network.getCurrentQueueCount());
    EXPECT_EQ(0, raw->link.server->network.getCurrentQueueCount());
  }
}

TEST_P(Streams, ReceiverThatStopsAndHolds) {
  // What was received before is kept while the sender fills all there is.
  LinkOptions options;
  options.maxBytes = 512 * 1024;
  auto raw = connectRaw(options);
  settle(*raw);
  uint count = SLOW ? 150 : 600;
  std::vector<Incoming> held;
  for (uint i = 0; i < count; i++) {
    sendMessage(*raw->client, i, sizeOf(i));
    if (i < 40) held.push_back(next(*raw->server));
  }
  for (uint i = 40; i < count; i++) {
    held.push_back(next(*raw->server));
    KJ_IF_MAYBE(stats, raw->link.client->network.getStats()) {
      ASSERT_LE(stats->regionBytes, maxBytesOf(raw->link.client->mode, options));
    }
  }
  for (uint i = 0; i < count; i++) ASSERT_TRUE(isMessage(*held[i], i, sizeOf(i)));
}

// =======================================================================================
// For long, and large

TEST_P(Streams, MemoryDoesNotGrowWhileOneMessageIsHeld) {
  auto link = connect(state);
  auto root = link->client->root();

  // Held for good: results, at the client, and params, at the server.
  auto fill = root.fillRequest();
  fill.setBytes(10000);
  fill.setSeed(1);
  auto results = await(fill.send());
  auto never = root.neverRequest();
  fillPattern(never.initData(10000), 2);
  auto params = never.send();

  kj::StringPtr name = mode().name;
  uint total = SLOW ? 5000 : name == "Untrusted" || name == "TrustedPort" ? 1000000 : 20000;
  constexpr uint BATCH = 250;
  for (uint done = 0; done < total; done += BATCH) {
    auto promises = kj::heapArrayBuilder<kj::Promise<int64_t>>(BATCH);
    for (uint i = 0; i < BATCH; i++) {
      if (i % 25 == 7) {
        // Some by reference.
        auto request = root.echoRequest();
        fillPattern(request.initData(i * 8), i);
        promises.add(request.send().then([i](capnp::Response<Root::EchoResults>&& r) -> int64_t {
          EXPECT_TRUE(r.getData().size() == i * 8 && isPattern(r.getData(), i));
          return 0;
        }));
        continue;
      }
      auto request = root.addRequest();
      request.setA(done);
      request.setB(i);
      promises.add(request.send().then(
          [](capnp::Response<Sum>&& r) -> int64_t { return r.getValue(); }));
    }
    auto values = await(kj::joinPromises(promises.finish()));
    for (uint i = 0; i < BATCH; i++) {
      ASSERT_EQ(i % 25 == 7 ? 0 : done + i, values[i]);
    }
    for (auto end: { link->client.get(), link->server.get() }) {
      KJ_IF_MAYBE(stats, end->network.getStats()) {
        // A region comes and goes when a batch happens to need more than the last thousands did.
        ASSERT_LE(stats->regionBytes, 1u << 20) << "after " << done << " calls";
      }
    }
  }
  // Both sides look at what they got back; the last batch may have left a ring for a larger one.
  for (uint i = 0; i < 20; i++) {
    auto request = root.echoRequest();
    fillPattern(request.initData(2000), i);
    await(request.send().ignoreResult());
  }
  turn();
  for (auto end: { link->client.get(), link->server.get() }) {
    KJ_IF_MAYBE(stats, end->network.getStats()) {
      // What is held, what was not looked at since, and a ring that has grown.
      EXPECT_LE(stats->arenaBytesInUse, stats->ringBytes + 64 * 1024);
    }
  }
  EXPECT_TRUE(isPattern(results.getData(), 1));
  EXPECT_EQ(1, state.running);
}

class HugeMessages: public Streams {};

INSTANTIATE_TEST_SUITE_P(Modes, HugeMessages, testing::ValuesIn([]() {
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    kj::StringPtr name = mode.name;
    if (name == "TwoParty" || name == "Untrusted" || name == "TrustedPort") result.push_back(mode);
  }
  return result;
}()), modeName);

size_t availableMemory() {
  // In bytes.
  FILE* file = fopen("/proc/meminfo", "r");
  if (file == nullptr) return 0;
  KJ_DEFER(fclose(file));
  char line[256];
  size_t kib = 0;
  while (fgets(line, sizeof(line), file) != nullptr) {
    if (sscanf(line, "MemAvailable: %zu kB", &kib) == 1) break;
  }
  return kib * 1024;
}

TEST_P(HugeMessages, OneGibibyte) {
  constexpr size_t WORDS = size_t(1) << 27;
  constexpr size_t STEP = 512;  // A word of every page.
  if (SLOW) GTEST_SKIP() << "too slow with a sanitizer or an emulator";
  if (availableMemory() < size_t(4) << 30) GTEST_SKIP() << "needs 4 GiB of available memory";

  LinkOptions options;
  options.reader.traversalLimitInWords = WORDS * 2;
  auto raw = connectRaw(options);
  settle(*raw);
  {
    auto message = raw->client->newOutgoingMessage(64);
    auto call = message->getBody().initAs<capnp::rpc::Message>().initCall();
    call.setQuestionId(77);
    auto list = call.getParams().getContent().initAs<capnp::List<uint64_t>>(WORDS);
    for (size_t i = 0; i < WORDS; i += STEP) list.set(i, i * 31 + 1);
    message->send();
  }
  sendMessage(*raw->client, 78, 1000);
  auto received = next(*raw->server);
  auto call = received->getBody().getAs<capnp::rpc::Message>().getCall();
  EXPECT_EQ(77, call.getQuestionId());
  auto list = call.getParams().getContent().getAs<capnp::List<uint64_t>>();
  ASSERT_EQ(WORDS, list.size());
  for (size_t i = 0; i < WORDS; i += STEP) {
    ASSERT_EQ(i * 31 + 1, list[i]);
    ASSERT_EQ(0, list[i + 1]);
  }
  EXPECT_TRUE(isMessage(*next(*raw->server), 78, 1000));
  KJ_IF_MAYBE(stats, raw->link.client->network.getStats()) {
    EXPECT_LE(stats->regionBytes, SharedMemoryOptions().maxBytes);
  }
}

// =======================================================================================
// Between two threads

class ThreadedStreams: public ThreadedConformance {};

INSTANTIATE_TEST_SUITE_P(Modes, ThreadedStreams, testing::ValuesIn(socketModes()), modeName);

TEST_P(ThreadedStreams, ManySizesInOrder) {
  auto server = connectThread(state);
  auto sink = await(server->client->root().openRequest().send()).getSink();
  uint count = SLOW ? 200 : 3000;
  uint64_t n = 0;
  for (uint i = 0; i < count; i++) {
    await(put(sink, n++, i % 100 == 50 ? 300000 : i * 37 % 2000));
  }
  auto total = await(sink.totalRequest().send());
  EXPECT_EQ(count, total.getCount());
  EXPECT_EQ(uint64_t(count) * (count - 1) / 2, total.getSum());
  EXPECT_TRUE(total.getOrdered());
}

TEST_P(ThreadedStreams, BulkBothWays) {
  // Large params and results at the same time, more than the smaller memories hold.
  auto server = connectThread(state);
  auto root = server->client->root();
  // Or all could be sent, and come back, before the end of the set-up gets through.
  await(root.sequenceRequest().send());
  uint count = SLOW ? 30 : 300;
  std::vector<kj::Promise<capnp::Response<Root::EchoResults>>> promises;
  auto size = [](uint i) { return size_t(i * 977 % 50000); };
  for (uint i = 0; i < count; i++) {
    auto request = root.echoRequest();
    fillPattern(request.initData(size(i)), i);
    promises.push_back(request.send());
  }
  for (uint i = 0; i < count; i++) {
    auto response = await(kj::mv(promises[i]));
    ASSERT_EQ(size(i), response.getData().size());
    ASSERT_TRUE(isPattern(response.getData(), i));
  }
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
