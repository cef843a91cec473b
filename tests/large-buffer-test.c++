// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include <capnp-shm/huge-pages.h>
#include <capnp-shm/large-buffer.h>

#include <gtest/gtest.h>
#include <kj/exception.h>
#include <string.h>
#include <thread>

namespace capnpshm {
namespace {

using capnp::word;

constexpr size_t LEAST = HUGE_PAGE / sizeof(word);
constexpr size_t LEAST_BYTES = LEAST * sizeof(word);

TEST(LargeBuffer, IsZeroOfAnySize) {
  constexpr size_t LARGE = LARGE_BUFFER_WORDS;
  for (size_t words: { size_t(0), size_t(1), LARGE - 1, LARGE, LEAST, 5 * LEAST + 1 }) {
    auto buffer = newZeroedBuffer(words);
    ASSERT_EQ(words, buffer.size());
    for (auto byte: buffer.asBytes()) ASSERT_EQ(0, byte);
    memset(buffer.asBytes().begin(), 0xff, words * sizeof(word));
  }
}

TEST(LargeBuffer, ImpossibleSizeIsAnException) {
  EXPECT_THROW(newZeroedBuffer(size_t(1) << 59), kj::Exception);
}

TEST(BufferPool, KeepsWhatWasUsedLast) {
  auto pool = kj::atomicRefcounted<BufferPool>(8 * LEAST_BYTES);
  auto a = pool->take(LEAST);
  auto b = pool->take(LEAST);
  word* first = a.begin();
  word* second = b.begin();
  EXPECT_NE(first, second);
  EXPECT_EQ(0u, pool->getKeptBytes());
  pool->giveBack(kj::mv(a));
  pool->giveBack(kj::mv(b));
  EXPECT_EQ(2 * LEAST_BYTES, pool->getKeptBytes());
  a = pool->take(LEAST / 2 + 1);
  EXPECT_EQ(second, a.begin());
  b = pool->take(LEAST);
  EXPECT_EQ(first, b.begin());
  EXPECT_EQ(0u, pool->getKeptBytes());
}

TEST(BufferPool, GivesNoneThatIsTooSmallOrMuchTooLarge) {
  auto pool = kj::atomicRefcounted<BufferPool>(64 * LEAST_BYTES);
  pool->giveBack(pool->take(8 * LEAST));
  word* there = pool->take(8 * LEAST).begin();
  pool->giveBack(pool->take(8 * LEAST));
  EXPECT_GE(pool->take(8 * LEAST + 1).size(), 8 * LEAST + 1);
  auto small = pool->take(3 * LEAST);
  EXPECT_NE(there, small.begin());
  EXPECT_LT(small.size(), 8 * LEAST);
  EXPECT_EQ(8 * LEAST, pool->take(4 * LEAST).size());
}

TEST(BufferPool, KeepsNoMoreThanItsLimit) {
  auto pool = kj::atomicRefcounted<BufferPool>(3 * LEAST_BYTES);
  pool->giveBack(pool->take(4 * LEAST));
  EXPECT_EQ(0u, pool->getKeptBytes()) << "too large to be kept at all";
  kj::Array<word> buffers[] = { pool->take(LEAST), pool->take(LEAST), pool->take(2 * LEAST) };
  word* second = buffers[1].begin();
  for (auto& buffer: buffers) pool->giveBack(kj::mv(buffer));
  EXPECT_EQ(3 * LEAST_BYTES, pool->getKeptBytes());
  EXPECT_EQ(2 * LEAST, pool->take(2 * LEAST).size());
  EXPECT_EQ(second, pool->take(LEAST).begin()) << "the oldest went";
}

TEST(BufferPool, DropsWhatIsNotUsedForAWhile) {
  auto pool = kj::atomicRefcounted<BufferPool>(8 * LEAST_BYTES);
  auto late = pool->take(LEAST);
  pool->giveBack(pool->take(2 * LEAST));
  pool->passed(200);
  pool->giveBack(kj::mv(late));
  EXPECT_EQ(3 * LEAST_BYTES, pool->getKeptBytes());
  pool->passed(300);
  EXPECT_EQ(LEAST_BYTES, pool->getKeptBytes());
  pool->passed(1000);
  EXPECT_EQ(0u, pool->getKeptBytes());
}

TEST(BufferPool, AnyThread) {
  auto pool = kj::atomicRefcounted<BufferPool>(8 * LEAST_BYTES);
  auto work = [&]() {
    for (uint i = 0; i < 200; i++) {
      auto buffer = pool->take(LEAST + i * 1000);
      buffer[0] = word();
      pool->passed(i);
      pool->giveBack(kj::mv(buffer));
    }
  };
  std::thread other(work);
  work();
  other.join();
  EXPECT_LE(pool->getKeptBytes(), 8 * LEAST_BYTES);
}

}  // namespace
}  // namespace capnpshm
