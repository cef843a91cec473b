// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"

#include <capnp/message.h>
#include <capnp/orphan.h>

// Messages: sizes, segments, limits, order, lifetimes, queue figures, and the time of the upgrade.

namespace capnpshm {
namespace conformance {
namespace {

constexpr kj::StringPtr TOO_LARGE = "larger than our single-message size limit"_kj;

class Messages: public RawConformance {
protected:
  static std::vector<size_t> sizes() {
    // In bytes: every number of words around what fits into the ring, into a private first segment
    // and into the first blocks, then around every power of two.
    std::vector<size_t> result;
    for (size_t words = 0; words < 160; words++) result.push_back(words * 8);
    for (size_t words = 128; words <= (SLOW ? 32u << 10 : 512u << 10); words *= 2) {
      for (size_t bytes: { words * 8 - 8, words * 8, words * 8 + 3, words * 8 + 8 }) {
        result.push_back(bytes);
      }
    }
    return result;
  }

  void expectEcho(Root::Client root, size_t bytes, kj::Maybe<capnp::MessageSize> hint = nullptr) {
    auto request = root.echoRequest(hint);
    fillPattern(request.initData(bytes), bytes);
    auto response = await(request.send());
    EXPECT_EQ(bytes, response.getData().size());
    EXPECT_TRUE(isPattern(response.getData(), bytes)) << bytes;
  }

  kj::Promise<int64_t> add(Root::Client root, int64_t a, int64_t b) {
    auto request = root.addRequest();
    request.setA(a);
    request.setB(b);
    return request.send().then([](capnp::Response<Sum>&& r) { return r.getValue(); });
  }

  size_t arenaBytes(End& end) {
    KJ_IF_MAYBE(stats, end.network.getStats()) return stats->arenaBytesInUse;
    return 0;
  }

  void expectNoneLeft(RawLink& raw, size_t before) {
    // What the client had in shared memory was freed. A message more makes it look.
    for (uint i = 0; i < 3; i++) {
      sendMessage(*raw.client, i, 2000);
      EXPECT_TRUE(isMessage(*next(*raw.server), i, 2000));
      settle(raw);
    }
    EXPECT_LE(arenaBytes(*raw.link.client), before);
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, Messages, testing::ValuesIn(allModes()), modeName);

// =======================================================================================
// Sizes and segments

TEST_P(Messages, ParamsAndResultsOfEverySize) {
  auto link = connect(state);
  auto root = link->client->root();
  for (size_t bytes: sizes()) expectEcho(root, bytes);
}

TEST_P(Messages, ParamsOfEverySizeWithHint) {
  // With a hint the whole message is one segment, of exactly that size.
  auto link = connect(state);
  auto root = link->client->root();
  for (size_t bytes: sizes()) expectEcho(root, bytes, capnp::MessageSize { bytes / 8 + 2, 0 });
}

TEST_P(Messages, ResultsAloneOfEverySize) {
  auto link = connect(state);
  auto root = link->client->root();
  std::vector<kj::Promise<capnp::Response<Root::FillResults>>> promises;
  for (size_t bytes: sizes()) {
    auto request = root.fillRequest();
    request.setBytes(bytes);
    request.setSeed(uint8_t(bytes / 8));
    promises.push_back(request.send());
  }
  size_t i = 0;
  for (size_t bytes: sizes()) {
    auto response = await(kj::mv(promises[i++]));
    EXPECT_EQ(bytes, response.getData().size());
    EXPECT_TRUE(isPattern(response.getData(), uint8_t(bytes / 8))) << bytes;
  }
}

TEST_P(Messages, EverySizeBothWaysAtOnce) {
  auto raw = connectRaw();
  settle(*raw);
  uint n = 0;
  for (size_t bytes: sizes()) {
    for (uint hint: { 0u, 1u, uint(bytes / 8 + 20) }) {
      sendMessage(*raw->client, ++n, bytes, hint);
      sendMessage(*raw->server, n, bytes, hint);
      EXPECT_TRUE(isMessage(*next(*raw->server), n, bytes));
      EXPECT_TRUE(isMessage(*next(*raw->client), n, bytes));
    }
  }
}

TEST_P(Messages, SizeInWordsIsThePayload) {
  // The library's own count of a received message has its first segment twice in 0.9.2, hence only
  // for our own networks.
  auto raw = connectRaw();
  settle(*raw);
  for (size_t bytes: { 0, 8, 80, 160, 400, 1000, 5000, 40000, 200000 }) {
    for (uint hint: { 0u, uint(bytes / 8 + 20) }) {
      auto message = newMessage(*raw->client, 1, bytes, hint);
      capnp::MallocMessageBuilder same(hint == 0 ? capnp::SUGGESTED_FIRST_SEGMENT_WORDS : hint);
      auto call = same.initRoot<capnp::rpc::Message>().initCall();
      call.getParams().getContent().initAs<capnp::Data>(bytes);
      size_t words = message->sizeInWords();
      // A segment more costs a landing pad.
      EXPECT_LE(same.sizeInWords(), words + 1);
      EXPECT_LE(words, same.sizeInWords() + 1);
      message->send();
      auto received = next(*raw->server);
      EXPECT_TRUE(isMessage(*received, 1, bytes));
      if (isOurs(mode(), mode().server)) {
        EXPECT_EQ(words, received->sizeInWords());
      }
    }
  }
}

kj::Array<kj::Array<uint64_t>> foreignData(uint count) {
  // Data that lies in nobody's message, each of another size.
  auto result = kj::heapArrayBuilder<kj::Array<uint64_t>>(count);
  for (uint i = 0; i < count; i++) {
    auto words = kj::heapArray<uint64_t>(1 + i % 40);
    fillPattern(words.asBytes(), i);
    result.add(kj::mv(words));
  }
  return result.finish();
}

template <typename Builder>
void referTo(Builder owner, capnp::List<capnp::Data>::Builder list,
             kj::ArrayPtr<const kj::Array<uint64_t>> foreign) {
  auto orphanage = capnp::Orphanage::getForMessageContaining(owner);
  for (uint i = 0; i < foreign.size(); i++) {
    list.adopt(i, orphanage.referenceExternalData(foreign[i].asBytes()));
  }
}

uint firstSegmentFor(uint foreign) { return 64 + 4 * foreign; }
// Everything but the foreign data, with its landing pads.

TEST_P(Messages, SegmentsUpToTheLimit) {
  auto raw = connectRaw();
  settle(*raw);
  for (uint count: { 2, 3, 4, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 128, 510, 511 }) {
    auto foreign = foreignData(count - 1);
    auto fill = [&](capnp::AnyPointer::Builder body) {
      auto call = body.initAs<capnp::rpc::Message>().initCall();
      auto list = call.getParams().getContent().initAs<capnp::List<capnp::Data>>(foreign.size());
      referTo(call, list, foreign);
    };
    capnp::MallocMessageBuilder same(firstSegmentFor(foreign.size()));
    fill(same.getRoot<capnp::AnyPointer>());
    ASSERT_EQ(count, same.getSegmentsForOutput().size());

    for (auto direction: { 0, 1 }) {
      auto& from = direction == 0 ? *raw->client : *raw->server;
      auto& to = direction == 0 ? *raw->server : *raw->client;
      {
        auto message = from.newOutgoingMessage(firstSegmentFor(foreign.size()));
        fill(message->getBody());
        message->send();
      }
      sendMessage(from, count, 100);
      auto received = next(to);
      auto list = received->getBody().getAs<capnp::rpc::Message>().getCall().getParams()
          .getContent().getAs<capnp::List<capnp::Data>>();
      ASSERT_EQ(foreign.size(), list.size());
      for (uint i = 0; i < list.size(); i++) {
        ASSERT_EQ(foreign[i].asBytes().size(), list[i].size());
        ASSERT_TRUE(isPattern(list[i], i)) << i << " of " << count;
      }
      EXPECT_TRUE(isMessage(*next(to), count, 100));
    }
  }
}

TEST_P(Messages, ManyGrowingSegments) {
  // Each piece is larger than what is left of the segment before.
  auto raw = connectRaw();
  settle(*raw);
  for (uint round = 0; round < 3; round++) {
    constexpr uint COUNT = 16;
    auto size = [](uint i) { return (size_t(1) << i) * 9 + i % 8; };
    {
      auto message = raw->client->newOutgoingMessage(1);
      auto call = message->getBody().initAs<capnp::rpc::Message>().initCall();
      auto list = call.getParams().getContent().initAs<capnp::List<capnp::Data>>(COUNT);
      for (uint i = 0; i < COUNT; i++) fillPattern(list.init(i, size(i)), i);
      message->send();
    }
    auto received = next(*raw->server);
    auto list = received->getBody().getAs<capnp::rpc::Message>().getCall().getParams()
        .getContent().getAs<capnp::List<capnp::Data>>();
    ASSERT_EQ(COUNT, list.size());
    for (uint i = 0; i < COUNT; i++) {
      EXPECT_EQ(size(i), list[i].size());
      EXPECT_TRUE(isPattern(list[i], i)) << i;
    }
  }
}

TEST_P(Messages, ForeignDataAmongOwn) {
  // Foreign memory in params of a call, beside small and large memory of the message's own.
  auto link = connect(state);
  auto root = link->client->root();
  auto foreign = foreignData(60);
  auto request = root.partsRequest();
  auto parts = request.initParts(120);
  Root::PartsParams::Builder params = request;
  auto orphanage = capnp::Orphanage::getForMessageContaining(params);
  for (uint i = 0; i < 60; i++) {
    fillPattern(parts.init(2 * i, i * i), i);
    parts.adopt(2 * i + 1, orphanage.referenceExternalData(foreign[i].asBytes()));
  }
  auto response = await(request.send());
  auto back = response.getParts();
  ASSERT_EQ(120, back.size());
  for (uint i = 0; i < 60; i++) {
    EXPECT_EQ(i * i, back[2 * i].size());
    EXPECT_TRUE(isPattern(back[2 * i], i));
    EXPECT_EQ(foreign[i].asBytes().size(), back[2 * i + 1].size());
    EXPECT_TRUE(isPattern(back[2 * i + 1], i));
  }
}

TEST_P(Messages, TooManySegmentsEndTheConnection) {
  // As TwoPartyVatNetwork does it; where that has no such limit (its 1.x), ours has it in shared
  // memory alone.
  auto foreign = foreignData(511);
  auto attempt = [&](const Mode& m) -> kj::Maybe<kj::Exception> {
    Link link(m, io, LinkOptions());
    link.start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
    auto root = link.client->root();
    EXPECT_EQ(3, await(add(root, 1, 2)));
    link.check();
    auto request = root.partsRequest(capnp::MessageSize { firstSegmentFor(foreign.size()), 0 });
    Root::PartsParams::Builder params = request;
    referTo(params, request.initParts(foreign.size()), foreign);
    auto result = kj::runCatchingExceptions([&]() {
      auto response = await(request.send());
      EXPECT_EQ(foreign.size(), response.getParts().size());
    });
    if (result == nullptr) {
      EXPECT_EQ(3, await(add(root, 1, 2)));
    } else {
      EXPECT_FAILS(DISCONNECTED, "too many segments", add(root, 1, 2));
    }
    return result;
  };

  auto reference = attempt(allModes()[0]);
  auto result = attempt(mode());
  EXPECT_EQ(reference == nullptr && !isShared(), result == nullptr);
  KJ_IF_MAYBE(e, result) {
    EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), "too many segments"))
        << kj::str(*e).cStr();
  }
}

// =======================================================================================
// The traversal limit

TEST_P(Messages, TooLargeIsRefusedAtSend) {
  LinkOptions options;
  options.reader.traversalLimitInWords = 4096;
  auto raw = connectRaw(options);
  settle(*raw);
  size_t overhead = newMessage(*raw->client, 0, 8)->sizeInWords() - 1;
  auto before = raw->link.client->network.getStats();

  for (size_t words: { size_t(4096) - overhead, size_t(4097), size_t(1) << 20 }) {
    auto message = newMessage(*raw->client, 1, words * 8, words + overhead);
    ASSERT_EQ(words + overhead, message->sizeInWords());
    KJ_IF_MAYBE(e, kj::runCatchingExceptions([&]() { message->send(); })) {
      EXPECT_EQ(uint(kj::Exception::Type::FAILED), uint(e->getType()));
      EXPECT_NE(nullptr, strstr(e->getDescription().cStr(), TOO_LARGE.cStr()));
    } else {
      ADD_FAILURE() << words << " words were not refused";
    }
    EXPECT_EQ(0, raw->link.client->network.getCurrentQueueCount());
    EXPECT_EQ(0, raw->link.client->network.getCurrentQueueSize());
  }
  turn();
  KJ_IF_MAYBE(b, before) {
    auto after = KJ_ASSERT_NONNULL(raw->link.client->network.getStats());
    EXPECT_EQ(b->outgoing.messages, after.outgoing.messages);
    EXPECT_EQ(b->outgoing.socketBytes, after.outgoing.socketBytes);
    EXPECT_EQ(b->bellsRung, after.bellsRung);
  }

  // One word less passes.
  size_t most = (4095 - overhead) * 8;
  sendMessage(*raw->client, 2, most, 4096);
  // Read once, or the reader's limit would be reached too.
  EXPECT_TRUE(isMessage(
      *KJ_ASSERT_NONNULL(await(raw->server->receiveIncomingMessage())), 2, most));
  settle(*raw);
}

TEST_P(Messages, RefusedMessageLeavesNoRegion) {
  LinkOptions options;
  options.reader.traversalLimitInWords = 4096;
  auto raw = connectRaw(options);
  settle(*raw);
  newMessage(*raw->client, 0, 1000);
  settle(*raw);
  auto before = raw->link.client->network.getStats();
  {
    auto message = newMessage(*raw->client, 1, 8 << 20);
    EXPECT_FALSE(kj::runCatchingExceptions([&]() { message->send(); }) == nullptr);
  }
  settle(*raw);
  KJ_IF_MAYBE(b, before) {
    // Bells are all that went over the socket.
    auto after = KJ_ASSERT_NONNULL(raw->link.client->network.getStats());
    if (isShared()) {
      EXPECT_LE(after.outgoing.socketBytes - b->outgoing.socketBytes,
          8 * (after.bellsRung - b->bellsRung));
    }
  }
}

TEST_P(Messages, TooLargeCallFailsAlone) {
  LinkOptions options;
  options.reader.traversalLimitInWords = 100000;
  auto link = connect(state, options);
  auto root = link->client->root();
  auto add1 = add(root, 1, 2);
  auto request = root.echoRequest();
  request.initData(1 << 20);
  EXPECT_FAILS(FAILED, TOO_LARGE.cStr(), request.send().ignoreResult());
  auto fill = root.fillRequest();
  fill.setBytes(1 << 20);
  EXPECT_FAILS(FAILED, TOO_LARGE.cStr(), fill.send().ignoreResult());
  EXPECT_EQ(3, await(kj::mv(add1)));
  for (uint i = 0; i < 100; i++) expectEcho(root, i * 100);
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
