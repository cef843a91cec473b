// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "outbox-pair.h"
#include <capnp-shm/doorbell.h>
#include <capnp-shm/event-bell.h>

#include <gtest/gtest.h>
#include <kj/debug.h>
#include <kj/thread.h>
#include <poll.h>

namespace capnpshm {
namespace {

constexpr uint64_t BOTH = WANT_DATA | WANT_ROOM;

TEST(Doorbell, RingsOnceForEachSleep) {
  SharedWord word{0};
  SleepWord mine(word);
  PeerSleepWord peer(word);

  EXPECT_FALSE(peer.mustRing(BOTH)) << "it never slept";
  EXPECT_TRUE(mine.arm(WANT_DATA));
  EXPECT_TRUE(mine.isArmed());
  EXPECT_TRUE(peer.mustRing(WANT_DATA));
  EXPECT_FALSE(peer.mustRing(WANT_DATA)) << "the bell is on its way";
  mine.wake();
  EXPECT_FALSE(mine.isArmed());
  EXPECT_FALSE(peer.mustRing(WANT_DATA));
  EXPECT_TRUE(mine.arm(WANT_DATA));
  EXPECT_TRUE(peer.mustRing(WANT_DATA)) << "another sleep";

  // Not even if the peer did not look while it was awake.
  mine.wake();
  EXPECT_TRUE(mine.arm(WANT_DATA));
  EXPECT_TRUE(peer.mustRing(WANT_DATA));
}

TEST(Doorbell, OnlyForWhatIsWanted) {
  SharedWord word{0};
  SleepWord mine(word);
  PeerSleepWord peer(word);
  EXPECT_TRUE(mine.arm(WANT_ROOM));
  EXPECT_FALSE(peer.mustRing(0));
  EXPECT_FALSE(peer.mustRing(WANT_DATA));
  EXPECT_TRUE(peer.mustRing(BOTH)) << "that was not a ring for this sleep";

  // Other interests are another sleep, and must be checked again by whoever sleeps.
  EXPECT_TRUE(mine.arm(BOTH));
  EXPECT_FALSE(mine.arm(BOTH)) << "nothing changed";
  EXPECT_TRUE(peer.mustRing(WANT_DATA));
  EXPECT_FALSE(peer.mustRing(WANT_ROOM)) << "it will see both when it wakes";
}

TEST(Doorbell, WhatThePeerSees) {
  // docs/PROTOCOL.md: epoch<<2 | wantRoom<<1 | wantData, a new epoch with every change.
  SharedWord word{0};
  SleepWord mine(word);
  mine.wake();
  EXPECT_EQ(0u, word.load()) << "it was awake";
  mine.arm(WANT_DATA);
  EXPECT_EQ(1u << 2 | 1, word.load());
  mine.arm(WANT_DATA);
  EXPECT_EQ(1u << 2 | 1, word.load());
  mine.arm(WANT_ROOM);
  EXPECT_EQ(2u << 2 | 2, word.load());
  mine.wake();
  EXPECT_EQ(3u << 2, word.load());
  mine.wake();
  EXPECT_EQ(3u << 2, word.load());
}

TEST(Doorbell, WhateverAHostilePeerWritesCostsOneBellACall) {
  SharedWord word{0};
  PeerSleepWord peer(word);
  testing::Random random(1);
  for (int i = 0; i < 10000; i++) {
    uint64_t value = random();
    word.store(value);
    bool first = peer.mustRing(WANT_DATA);
    EXPECT_TRUE(!first || (value & WANT_DATA));
    EXPECT_FALSE(peer.mustRing(WANT_DATA));
  }
}

class Side {
  // One thread of the stress below: counts up `mine`, waits until the peer's count has reached it,
  // and goes to sleep if it has not.

public:
  alignas(CACHE_LINE_PAIR) SharedWord count{0};
  alignas(CACHE_LINE_PAIR) SharedWord sleepWord{0};
  alignas(CACHE_LINE_PAIR) EventBell bell;          // Rung to wake this side.
  uint64_t rung = 0;
  uint64_t slept = 0;
  std::atomic<bool> lost{false};

  void run(Side& peer, uint64_t rounds, uint seed) {
    SleepWord mine(sleepWord);
    PeerSleepWord theirs(peer.sleepWord);
    testing::Random random(seed);
    for (uint64_t i = 1; i <= rounds; i++) {
      // Now and then late, so that the other side does go to sleep, however fast the cores are.
      uint64_t delay = random() % 8 == 0 ? random() % 2048 : 0;
      while (delay > 0 && !lost.load(std::memory_order_relaxed)) delay--;
      count.store(i, std::memory_order_release);
      if (theirs.mustRing(WANT_DATA)) {
        peer.bell.ring();
        ++peer.rung;
      }
      auto isThere = [&]() { return peer.count.load(std::memory_order_acquire) >= i; };
      // Mostly both sides stay awake, so that what matters happens often: one gives up just when
      // the other publishes.
      uint64_t patience = random() % 8 == 0 ? random() % 128 : 50000;
      while (patience > 0 && !isThere()) patience--;
      while (!isThere()) {
        if (mine.arm(WANT_DATA) && isThere()) break;
        ++slept;
        if (!waitForBell()) {
          lost = true;
          return;
        }
        mine.wake();
      }
      mine.wake();
      if (peer.lost) return;
    }
  }

private:
  bool waitForBell() {
    struct pollfd fd { bell.getFd(), POLLIN, 0 };
    // Long enough to tell a lost wake-up from a busy machine.
    int n;
    do {
      n = ::poll(&fd, 1, 20000);
    } while (n < 0 && errno == EINTR);
    uint64_t value;
    return n == 1 && read(bell.getFd(), &value, sizeof(value)) == sizeof(value);
  }
};

TEST(Doorbell, NoWakeUpIsLost) {
  // Two threads in a ping-pong, each often on its way to sleep when the other publishes. Without
  // either of the two fences this hangs.
  constexpr uint64_t ROUNDS = SLOW ? 20000 : 200000;
  Side a, b;
  {
    kj::Thread thread([&]() { a.run(b, ROUNDS, 1); });
    b.run(a, ROUNDS, 2);
  }
  EXPECT_FALSE(a.lost || b.lost) << a.count << " " << b.count;
  EXPECT_EQ(ROUNDS, a.count);
  EXPECT_EQ(ROUNDS, b.count);
  // It was about something: both slept, and were not rung more often than they went to sleep.
  EXPECT_GT(a.slept + b.slept, 10u);
}

}  // namespace
}  // namespace capnpshm
