// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Rewriting shared memory under somebody's eyes.

#include "hostile-live.h"

#include <atomic>
#include <capnp-shm/layout.h>
#include <functional>
#include <random>
#include <thread>

namespace capnpshm {
namespace hostile {

uint64_t damagedPointer(uint64_t pointer, std::mt19937_64& random);
// A Cap'n Proto pointer of which something was changed: sizes, counts, offset, kind.

class Tamperer {
  // A thread that does one deed after the other, at the pace of a peer in a hurry or of one that
  // waits for its moment. Joined by the destructor.

public:
  Tamperer(std::function<void(Tamperer&)> deed, uint64_t seed);
  ~Tamperer() noexcept(false);
  KJ_DISALLOW_COPY(Tamperer);

  uint64_t getDeeds() const { return deeds.load(); }

  std::mt19937_64 random;
  // For the thread.

  void rewrite(SharedWord& word, uint64_t value);
  void flip(SharedWord& word, uint64_t value, uint times);
  // Puts the value there and what was there back again, at once, so often.

  void wait();
  // A moment.

private:
  std::function<void(Tamperer&)> deed;
  uint pace;
  std::atomic<bool> stopped{false};
  std::atomic<uint64_t> deeds{0};
  std::thread thread;
};

class OwnRegions {
  // All shared memory that this process writes, found again from time to time.

public:
  kj::ArrayPtr<SharedWord> first();
  // The one with a header. Empty if there is none yet.

  DescriptorLine& line(std::mt19937_64& random);
  // Some line of the first ring.
  kj::ArrayPtr<SharedWord> freeRing();
  // As it was made, whatever the header says by now.

  SharedWord& any(std::mt19937_64& random);
  // Some word of them, not of a header. Only if first() is not empty.

private:
  std::vector<kj::ArrayPtr<SharedWord>> regions;
  size_t firstIndex = 0;
  uint64_t ringOffset = 0;
  uint uses = 0;

  void find();
};

std::function<void(Tamperer&)> deedFor(Attack attack, bool once);
// What to do to the regions of this process. `once`: nothing is put back.

}  // namespace hostile
}  // namespace capnpshm
