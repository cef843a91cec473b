// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/frame-reader.h>

#include <gtest/gtest.h>
#include <kj/debug.h>
#include <random>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <vector>

namespace capnpshm {
namespace {

using capnp::word;
using Words = std::vector<uint64_t>;

Words frameOf(std::vector<uint> segmentSizes, uint64_t content = 1) {
  // As capnp::writeMessage() would write it.
  std::vector<uint32_t> header { uint32_t(segmentSizes.size() - 1) };
  header.insert(header.end(), segmentSizes.begin(), segmentSizes.end());
  if (header.size() % 2 == 1) header.push_back(0);
  Words result(header.size() / 2);
  memcpy(result.data(), header.data(), header.size() * sizeof(uint32_t));
  for (uint size: segmentSizes) {
    for (uint i = 0; i < size; i++) result.push_back(content++);
  }
  return result;
}

Words operator+(Words a, const Words& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

kj::AutoCloseFd newCounter(uint value) {
  // A descriptor that can be told from others.
  int fd;
  KJ_SYSCALL(fd = eventfd(value, EFD_CLOEXEC));
  return kj::AutoCloseFd(fd);
}

uint64_t valueOf(int counter) {
  uint64_t value = 0;
  KJ_SYSCALL(read(counter, &value, sizeof(value)));
  return value;
}

class FrameReaderTest: public ::testing::Test {
protected:
  FrameReaderTest(): io(kj::setupAsyncIo()) { connect(); }
  ~FrameReaderTest() noexcept override {}

  void connect() {
    auto pipe = io.provider->newCapabilityPipe();
    peer = kj::mv(pipe.ends[0]);
    stream = kj::mv(pipe.ends[1]);
    reader = kj::heap<FrameReader>(*stream);
  }

  void send(kj::ArrayPtr<const kj::byte> bytes, std::vector<int> fds = {}) {
    peer->writeWithFds(bytes, nullptr, kj::arrayPtr(fds.data(), fds.size())).wait(io.waitScope);
  }
  void send(const Words& words, std::vector<int> fds = {}) {
    send(kj::arrayPtr(words.data(), words.size()).asBytes(), kj::mv(fds));
  }

  size_t leftInSocket() {
    int n = 0;
    KJ_SYSCALL(ioctl(KJ_ASSERT_NONNULL(stream->getFd()), FIONREAD, &n));
    return n;
  }

  kj::Maybe<FrameReader::Frame> next() { return reader->next(limits).wait(io.waitScope); }

  FrameReader::Frame expect(const Words& expected) {
    KJ_IF_MAYBE(frame, next()) {
      Words got(frame->words.size());
      memcpy(got.data(), frame->words.begin(), frame->words.asBytes().size());
      EXPECT_EQ(expected, got);
      EXPECT_EQ(expected[0], frame->header);
      return kj::mv(*frame);
    }
    ADD_FAILURE() << "the stream has ended";
    return {};
  }
  void expectBell() {
    auto frame = next();
    EXPECT_EQ(BELL, KJ_ASSERT_NONNULL(frame).header);
    EXPECT_EQ(0u, KJ_ASSERT_NONNULL(frame).words.size());
  }
  void expectFds(const FrameReader::Frame& frame, std::vector<uint64_t> values) {
    std::vector<uint64_t> got;
    for (auto& fd: frame.fds) got.push_back(valueOf(fd));
    EXPECT_EQ(values, got);
  }
  void expectCutOff() {
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { next(); })) {
      EXPECT_EQ(kj::Exception::Type::DISCONNECTED, exception->getType());
      EXPECT_STREQ("peer disconnected within a message", exception->getDescription().cStr());
    } else {
      ADD_FAILURE() << "no exception";
    }
  }

  kj::AsyncIoContext io;
  kj::Own<kj::AsyncCapabilityStream> peer;
  kj::Own<kj::AsyncCapabilityStream> stream;
  kj::Own<FrameReader> reader;
  FrameReader::Limits limits { 511, 1 << 20, 64, 4, false };
};

TEST_F(FrameReaderTest, WhatCameAtOnceIsReadAtOnce) {
  send(frameOf({ 3 }) + frameOf({ 2, 0, 4 }) + Words { BELL } + frameOf({ 5 }));
  expect(frameOf({ 3 }));
  EXPECT_EQ(0u, leftInSocket());
  EXPECT_FALSE(reader->isEmpty());
  expect(frameOf({ 2, 0, 4 }));
  expectBell();
  expect(frameOf({ 5 }));
  EXPECT_TRUE(reader->isEmpty());
}

TEST_F(FrameReaderTest, OneWordAheadReadsNothingOfTheNextFrame) {
  limits.aheadWords = 1;
  send(frameOf({ 3 }) + frameOf({ 1, 1, 1, 1 }) + Words { BELL } + frameOf({ 5 }));
  expect(frameOf({ 3 }));
  EXPECT_EQ((3 + 4 + 1 + 6) * sizeof(word), leftInSocket());
  EXPECT_TRUE(reader->isEmpty());
  expect(frameOf({ 1, 1, 1, 1 }));
  expectBell();
  EXPECT_EQ(6 * sizeof(word), leftInSocket());
  expect(frameOf({ 5 }));
}

TEST_F(FrameReaderTest, DescriptorsBelongToTheFrameTheyCameWith) {
  auto one = newCounter(1), two = newCounter(2), three = newCounter(3);
  send(frameOf({ 1 }) + frameOf({ 2 }));
  send(frameOf({ 3 }), { one, two });
  send(frameOf({ 4 }), { three });
  send(frameOf({ 5 }) + frameOf({ 6 }));
  expectFds(expect(frameOf({ 1 })), {});
  expectFds(expect(frameOf({ 2 })), {});
  expectFds(expect(frameOf({ 3 })), { 1, 2 });
  expectFds(expect(frameOf({ 4 })), { 3 });
  expectFds(expect(frameOf({ 5 })), {});
  expectFds(expect(frameOf({ 6 })), {});
}

TEST_F(FrameReaderTest, DescriptorsOfAFrameOfWhichOnlyTheBeginningFitsBehindOthers) {
  // Neither the one before nor the one behind it gets them.
  auto one = newCounter(1);
  for (uint before: { 1u, 60u, 61u, 62u, 63u }) {
    SCOPED_TRACE(before);
    send(frameOf({ before - 1 }));
    send(frameOf({ 10, 20, 30, 40 }, before), { one });
    send(frameOf({ 7 }));
    expectFds(expect(frameOf({ before - 1 })), {});
    auto large = expect(frameOf({ 10, 20, 30, 40 }, before));
    ASSERT_EQ(1u, large.fds.size());
    expectFds(expect(frameOf({ 7 })), {});
  }
}

TEST_F(FrameReaderTest, NoMoreDescriptorsThanAllowed) {
  limits.fds = 2;
  auto one = newCounter(1), two = newCounter(2), three = newCounter(3);
  send(frameOf({ 1 }), { one, two, three });
  expectFds(expect(frameOf({ 1 })), { 1, 2 });
  // Nobody has a use for those of a bell; and they do not come with what follows.
  send(Words { BELL }, { one });
  send(frameOf({ 2 }));
  expectBell();
  expectFds(expect(frameOf({ 2 })), {});
}

TEST_F(FrameReaderTest, DescriptorAsStream) {
  limits.aheadWords = 1;
  limits.fdAsStream = true;
  int ends[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
  kj::AutoCloseFd a(ends[0]), b(ends[1]);
  send(frameOf({ 5 }), { b });
  auto frame = expect(frameOf({ 5 }));
  KJ_SYSCALL(write(a, "x", 1));
  char c = 0;
  EXPECT_EQ(1u, frame.fdStream->tryRead(&c, 1, 1).wait(io.waitScope));
  EXPECT_EQ('x', c);
  send(frameOf({ 5 }));
  EXPECT_EQ(nullptr, expect(frameOf({ 5 })).fdStream.get());
}

TEST_F(FrameReaderTest, WhateverItIsCutInto) {
  // At each place, the rest coming only when the beginning was read.
  auto all = frameOf({ 2 }) + frameOf({ 1, 2, 3 }) + Words { BELL } + frameOf({ 0 }) +
      frameOf({ 1, 70, 1, 1 });
  auto bytes = kj::arrayPtr(all.data(), all.size()).asBytes();
  for (size_t ahead: { 1, 2, 5, 64, 512 }) {
    limits.aheadWords = ahead;
    for (size_t cut = 1; cut < bytes.size(); cut++) {
      send(bytes.slice(0, cut));
      auto promise = reader->next(limits).then([&](kj::Maybe<FrameReader::Frame>&& frame) {
        EXPECT_EQ(3u, KJ_ASSERT_NONNULL(frame).words.size());
      }).eagerlyEvaluate(nullptr);
      EXPECT_EQ(cut >= 24, promise.poll(io.waitScope)) << cut;
      send(bytes.slice(cut, bytes.size()));
      promise.wait(io.waitScope);
      expect(frameOf({ 1, 2, 3 }));
      expectBell();
      expect(frameOf({ 0 }));
      expect(frameOf({ 1, 70, 1, 1 }));
      ASSERT_TRUE(reader->isEmpty()) << cut;
      ASSERT_FALSE(::testing::Test::HasFailure()) << ahead << ", " << cut;
    }
  }
}

TEST_F(FrameReaderTest, AnyFramesInAnyPieces) {
  std::mt19937 random(::testing::UnitTest::GetInstance()->random_seed());
  auto below = [&](uint n) { return uint(random() % n); };
  for (uint round = 0; round < 200; round++) {
    // Pieces without descriptors may hold parts of several frames; a frame with some begins one.
    struct Piece { std::vector<kj::byte> bytes; std::vector<int> fds; };
    std::vector<Piece> pieces(1);
    std::vector<Words> frames;
    std::vector<uint> fdCounts;
    auto counter = newCounter(1);
    for (uint i = 0; i < 12; i++) {
      Words frame { BELL };
      if (below(4) > 0) {
        std::vector<uint> sizes;
        uint segments = 1 + below(below(8) == 0 ? 300 : 4);
        for (uint n = segments; n > 0; n--) {
          sizes.push_back(below(segments <= 4 && below(8) == 0 ? 200 : 4));
        }
        frame = frameOf(sizes, random());
      }
      uint fds = frame[0] != BELL && below(3) == 0 ? 1 + below(3) : 0;
      auto begin = reinterpret_cast<const kj::byte*>(frame.data());
      std::vector<kj::byte> bytes(begin, begin + frame.size() * sizeof(uint64_t));
      bool own = fds > 0 || pieces.back().fds.size() > 0;
      if (own) pieces.push_back({ {}, std::vector<int>(fds, counter.get()) });
      pieces.back().bytes.insert(pieces.back().bytes.end(), bytes.begin(), bytes.end());
      frames.push_back(frame);
      fdCounts.push_back(fds);
    }

    size_t got = 0;
    auto takeSome = [&](bool wait) -> kj::Promise<void> {
      while (got < frames.size()) {
        limits.aheadWords = below(2) == 0 ? 1 : 1 + below(600);
        auto promise = reader->next(limits).then([&](kj::Maybe<FrameReader::Frame>&& frame) {
          auto& f = KJ_ASSERT_NONNULL(frame);
          auto& expected = frames[got];
          EXPECT_EQ(expected[0], f.header);
          if (f.header != BELL) {
            ASSERT_EQ(expected.size(), f.words.size());
            EXPECT_EQ(0, memcmp(expected.data(), f.words.begin(), f.words.asBytes().size()));
          }
          EXPECT_EQ(fdCounts[got], f.fds.size());
          ++got;
        }).eagerlyEvaluate(nullptr);
        if (!wait && !promise.poll(io.waitScope)) return promise;
        promise.wait(io.waitScope);
      }
      return kj::READY_NOW;
    };
    kj::Promise<void> pending = kj::READY_NOW;
    uint unread = 0;
    for (auto& piece: pieces) {
      size_t sent = 0;
      while (sent < piece.bytes.size()) {
        size_t n = kj::min(piece.bytes.size() - sent, 1 + below(below(3) == 0 ? 4000 : 100));
        send(kj::arrayPtr(piece.bytes.data() + sent, n),
            sent == 0 ? piece.fds : std::vector<int>());
        sent += n;
        // Before the socket is full.
        if ((++unread == 20 || below(2) == 0) && pending.poll(io.waitScope)) {
          pending.wait(io.waitScope);
          pending = takeSome(false);
          unread = 0;
        }
      }
    }
    pending.wait(io.waitScope);
    takeSome(true).wait(io.waitScope);
    ASSERT_EQ(frames.size(), got);
    ASSERT_TRUE(reader->isEmpty());
    ASSERT_FALSE(::testing::Test::HasFailure())
        << "round " << round << ", seed " << ::testing::UnitTest::GetInstance()->random_seed();
  }
}

TEST_F(FrameReaderTest, LargerOnesThanAllowedAreNotRead) {
  struct { Words header; uint64_t words; uint segments; } cases[] = {
    { frameOf({ 9 }), 8, 511 },
    { frameOf({ 4, 4, 1 }), 8, 511 },
    { frameOf({ 1, 1, 1 }), 8, 2 },
    { { uint64_t(7) << 32 | 0xfffffffe }, 1000, 511 },
    { { 0xffffffff }, uint64_t(1) << 40, 511 },
    { { uint64_t(0xffffffff) << 32 }, 1000, 511 },
  };
  for (auto& c: cases) {
    SCOPED_TRACE(c.header[0]);
    reader = kj::heap<FrameReader>(*stream);
    limits.words = c.words;
    limits.segments = c.segments;
    // Not even the header need be whole.
    send(kj::arrayPtr(c.header.data(), kj::min(c.header.size(), size_t(2))).asBytes());
    auto frame = next();
    EXPECT_EQ(c.header[0], KJ_ASSERT_NONNULL(frame).header);
    EXPECT_EQ(0u, KJ_ASSERT_NONNULL(frame).words.size());
  }
  reader = kj::heap<FrameReader>(*stream);
  limits.words = 9;
  limits.segments = 3;
  send(frameOf({ 9 }) + frameOf({ 4, 4, 1 }));
  expect(frameOf({ 9 }));
  expect(frameOf({ 4, 4, 1 }));
}

TEST_F(FrameReaderTest, EndBetweenFrames) {
  send(frameOf({ 1 }) + frameOf({ 2 }));
  peer = nullptr;
  expect(frameOf({ 1 }));
  expect(frameOf({ 2 }));
  EXPECT_TRUE(next() == nullptr);
}

TEST_F(FrameReaderTest, EndWithinAFrame) {
  auto frame = frameOf({ 1 }) + frameOf({ 1, 70, 1 });
  for (size_t bytes: { 17, 23, 24, 31, 32, 33, 100, 600 }) {
    SCOPED_TRACE(bytes);
    reader = nullptr;
    connect();
    send(kj::arrayPtr(frame.data(), frame.size()).asBytes().slice(0, bytes));
    peer = nullptr;
    expect(frameOf({ 1 }));
    expectCutOff();
  }
}

TEST_F(FrameReaderTest, SocketThatWasResetFailsLater) {
  // The peer left something unread.
  kj::StringPtr unread = "unread";
  stream->write(unread.begin(), unread.size()).wait(io.waitScope);
  peer = nullptr;
  auto promise = reader->next(limits);
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { promise.wait(io.waitScope); })) {
    EXPECT_EQ(kj::Exception::Type::DISCONNECTED, exception->getType());
  } else {
    ADD_FAILURE() << "no exception";
  }
}

}  // namespace
}  // namespace capnpshm
