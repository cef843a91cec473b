// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Load: many connections of one server, with mixed payloads, which come and go at random, some of
// whose clients are slow to read. Every reply is checked, and nothing may grow.
//
// Three processes, all of this one program: the server, the clients in the driver, and the slow
// clients. They live in rounds; after each all connections end and what the server still holds is
// measured.

#include "process-fixture.h"
#include <random>

namespace capnpshm {
namespace soak {

using kj::uint;

constexpr size_t MAX_BYTES = 1 << 20;
// SharedMemoryOptions::maxBytes of the server and of all clients. Less than a slow client asks for.

constexpr uint SLOW_CALLS = 20;
constexpr size_t SLOW_BYTES = 64 * 1024;
// What each slow client has asked for and does not read.

constexpr size_t QUEUE_LIMIT = 2 * SLOW_CALLS * SLOW_BYTES;
// What the server may have queued for a connection: no client ever asks for more at a time.

SharedMemoryContext contextFor(kj::AsyncIoContext& io, bool trust);

// Of the server: see process::Progress.
enum : uint {
  TICKS = 0,          // Of a timer on its loop.
  CONNECTIONS = 1,    // That are alive.
  ACCEPTED = 2,       // Since it began.
  LARGEST_QUEUE = 3,  // In bytes, of any connection.
  LARGEST_SHARE = 4,  // In bytes, of shared memory that it writes for any connection.
  NOT_SHARED = 5,     // Connections that stayed plain.
  HEAP_WAITS = 6      // Messages that had to wait for room.
};

struct Counts {
  uint64_t lives = 0;
  uint64_t calls = 0;       // Whose replies were checked.
  uint64_t bytes = 0;       // Of payload in them.
  uint64_t abandoned = 0;   // Calls under way when their connection was cut.
};

class Clients {
  // Connections in this process, which are replaced as they end.

public:
  Clients(kj::AsyncIoContext& io, int handover, uint64_t seed);

  void start(uint count);
  kj::Promise<void> finish();
  // Resolves when each has ended its present life.

  const Counts& getCounts() const { return counts; }

  kj::Maybe<kj::Exception> failure;
  // What went wrong first.

private:
  class Life;

  kj::AsyncIoContext& io;
  int handover;
  std::mt19937_64 random;
  bool stopping = false;
  Counts counts;
  kj::Vector<kj::Promise<void>> slots;

  kj::Promise<void> live();
};

int serve();
int readSlowly(uint connections);
// The other processes; see process-fixture.h for what they inherit.

}  // namespace soak
}  // namespace capnpshm
