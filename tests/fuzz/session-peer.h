// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "fuzz-connection.h"
#include <capnp-shm/memfd.h>
#include <capnp-shm/ring.h>
#include <kj/function.h>
#include <deque>

namespace capnpshm {
namespace fuzz {

class SessionPeer {
  // A CLIENT that keeps to docs/PROTOCOL.md, until it is told to lie. What cannot be done at the
  // moment (no room, nobody has agreed) is left out.

public:
  static constexpr size_t REGION_BYTES = 16 << 10;
  static constexpr uint FREE_ENTRIES = 64;

  explicit SessionPeer(Socket& socket);
  KJ_DISALLOW_COPY(SessionPeer);

  void setUp(bool victimTrusts, bool trust, uint plainMessages, Input& input);

  // Sending ---------------------------------------------------------------------

  void sendInline(Input& input);
  void sendByReference(Input& input, bool table);
  void sendInParts(Input& input);
  // Begins a message, or goes on with it.

  void announce(Input& input);
  void jump(Input& input);
  void retire(Input& input);
  void bell();
  void end();
  void hangUp();

  // Receiving -------------------------------------------------------------------

  void readSocket(bool accept);
  // Answers announcements, by a refusal if not `accept`.

  void take(uint count);
  void giveBack(Input& input);
  void sleep(Input& input);

  // Checking --------------------------------------------------------------------

  void lie(Input& input);
  // Changes a word of what it wrote, or sends something wrong.

  bool hasLied() const { return lied; }

  void wasReceived(capnp::IncomingRpcMessage& message);
  // By the victim, which must get what was sent.

  void finish(uint64_t sentByVictim, kj::Function<void(uint)> drop);
  // Ends the session as it should end, when no lie was told: everything must arrive.

private:
  struct Region {
    Region(uint32_t id, size_t bytes): id(id), memory(createRegion(bytes)) {}

    const uint32_t id;
    OwnRegion memory;
    bool mapped = false;
    bool answered = false;
    bool retired = false;
    bool holdsRing = false;
    bool zeroed = true;         // Since it was never used; a new ring must be.
    size_t top = 0;             // From where on there is room for data.
    uint64_t ringUntil = 0;     // Position after the JUMP that left the ring in it.
    uint64_t lastUse = 0;       // Position after the last descriptor that refers to it.
    uint64_t lastAttempt = 0;   // At a descriptor that may refer to it.
  };
  struct Expected {
    uint64_t number;
    uint32_t firstWords;        // Of its first segment.
    uint32_t words;
  };
  struct Place {
    Region* region;
    uint64_t* words;
    size_t offset;
  };

  Socket& socket;
  kj::Vector<kj::Own<Region>> regions;
  kj::ArrayPtr<byte> ring;
  uint64_t position = FIRST_RING_LINES;
  uint unanswered = 0;
  bool agreed = false;
  bool victimFrees = false;     // By handle.
  bool ended = false;
  bool lied = false;
  bool lost = false;            // Where the victim writes, by a lie about regions.
  uint64_t nextNumber = 0;
  uint64_t attempts = 0;        // At descriptors.
  std::deque<Expected> expected;
  uint fdsAhead = 0;
  uint64_t handles = 0;         // That the victim was given.
  uint64_t* lastData = nullptr;
  size_t lastDataWords = 0;

  // The message in parts.
  uint64_t partsMissing = 0;
  uint64_t partsDone = 0;

  // The victim's side.
  struct VictimsRegion { uint32_t id; kj::ArrayPtr<byte> bytes; };
  kj::Vector<VictimsRegion> victims;
  kj::Maybe<DescriptorConsumer> victimsRing;
  bool victimSwitched = false;
  bool victimEnded = false;
  alignas(capnp::word) byte unread[8192];
  size_t unreadSize = 0;
  std::deque<kj::AutoCloseFd> unreadFds;
  std::deque<uint64_t> toFree;
  uint64_t freed = 0;
  uint64_t taken = 0;           // Messages of the victim's.
  uint64_t victimsPartsMissing = 0;
  uint victimsFds = 0;          // Records that came.
  uint64_t epoch = 0;

  void sendPlain();
  RegionHeader& header();
  RegionHeader& victimsHeader();
  bool canSend(uint lines);
  DescriptorLine& line(uint64_t position);
  void publish(DescriptorHead head, kj::ArrayPtr<const uint64_t> body);
  kj::Maybe<Place> allocate(Input& input, size_t words);
  void expect(uint32_t firstWords, uint32_t words);
  uint64_t newHandle(Input& input);
  void sendControl(ControlFrame& frame, kj::ArrayPtr<const int> fds = nullptr);
  uint sendFds(Input& input);
  void handleFrame(kj::ArrayPtr<const capnp::word> frame, bool accept);
  kj::ArrayPtr<byte> victimsBytes(SegmentEntry entry);
  void takeOne(const Descriptor& descriptor);
};

}  // namespace fuzz
}  // namespace capnpshm
