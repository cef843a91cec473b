// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Peers that speak the protocol and meanwhile rewrite their shared memory, against a server that
// must not mind. The processes:
//
// - the driver (hostile-live.c++) starts the others, watches the victim and is its honest client;
// - the victim (hostile-live-victim.c++), a server which looks at every message that it receives
//   and serves it;
// - attackers (hostile-live-attacker.c++): one connection after the other, each of a kind below.
//
// In the control run the victim is compiled so that it reads in place what it should copy. That
// must be noticed.

#include "process-fixture.h"
#include <capnp-shm/rpc-shm.h>

namespace capnpshm {
namespace hostile {

using kj::byte;
using kj::uint;

struct LiveMode {
  // How the victim and the attackers use shared memory. What the two have in common is the name.

  const char* name;
  SharedMemoryOptions options;
};

std::vector<LiveMode> liveModes();
const LiveMode& findLiveMode(kj::StringPtr name);

enum class Attack: uint {
  HONEST,
  STAMPS_AS_PAYLOAD,
  // Honest too, but full of what would be stamps elsewhere. Replies are checked.

  // By a real client, whose regions another thread rewrites:
  STAMPS,
  HEADS,              // Of descriptors.
  ENTRIES,            // Of segments: overlaps, wrap-around, what is unaligned or far away.
  POINTERS,           // Cap'n Proto's, in payload: flipped, and flipped back.
  FREES,              // Handles and their counter.
  CONSUMED,
  SLEEP_WORD,
  HEADER,
  RANDOM,             // Any word.
  EVERYTHING,

  // By a peer that makes its own frames and lines:
  RACE,               // Pointers of all kinds in one message that is sent over and over.
  TABLES,             // Tables of segments, and of messages in parts.
  BELL_FLOOD,
  NO_BELLS,
  FD_FLOOD,
  NEVER_READS,
  NEVER_FREES,
  MID_FRAME,          // Stops there, on the plain stream or after it.
  CONTROLS,           // Control messages in any order.
  SEALED,             // Files that are said to be sealed, and what is in those that are.
  FCNTL               // And whatever else can be done to a descriptor that both sides hold.
};
constexpr uint ATTACKS = uint(Attack::FCNTL) + 1;

const char* attackName(Attack attack);

// Of the victim: see process::Progress.
enum : uint {
  TICKS = 0,           // Of a timer on its loop.
  CONNECTIONS = 1,     // That are alive.
  CHANGED = 2,         // Messages that were not the same when they were read again.
  INSPECTED = 3,       // Messages.
  READERS = 4,         // Of structs and lists in them, each checked to lie within its message.
  OUT_OF_BOUNDS = 5,   // Readers that did not.
  CALLS = 6,           // Served.
  LONGEST_GAP = 7      // Between two ticks, in milliseconds.
};

constexpr uint TICK_MILLISECONDS = 5;

// Lines that the victim reports: "ready"; "end ATTACK TYPE TEXT" for each connection, where TYPE is
// a kj::Exception::Type or -1 for a clean end; "out of bounds ..."; "log ..."; "done".
// Those of an attacker: "did ATTACK DEEDS" for each connection, where deeds are words rewritten,
// bells rung, ...; "wrong TEXT".

struct LiveContext {
  // What an attack has to do with.

  kj::AsyncIoContext& io;
  int handover;
  const LiveMode& mode;
  uint64_t seed;
  kj::Maybe<kj::String> complaint;
  // What went wrong where nothing may.
};

uint64_t attackByClient(LiveContext& context, Attack attack);
uint64_t attackByHand(LiveContext& context, Attack attack);
// One connection; how many deeds. Throws if the victim ended it, which is as good as any other end.

bool isByHand(Attack attack);

}  // namespace hostile
}  // namespace capnpshm
