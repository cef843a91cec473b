// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "hostile-live.h"
#include "hostile-peer.h"

#include <capnp-shm/ring.h>
#include <capnp/any.h>
#include <capnp/message.h>
#include <atomic>
#include <random>
#include <vector>

// What attacks by hand, of a peer that makes its own frames and lines, are made of.

namespace capnpshm {
namespace hostile {

class RawPeer {
  // A hostile peer that can go on for long: it takes what the victim sends, makes room, rings.

public:
  RawPeer(LiveContext& context, Attack attack);

  void upgrade();

  void listen();
  // For attacks that have upgraded themselves.

  int socket() { return KJ_ASSERT_NONNULL(peer.stream->getFd()); }

  bool goOn(bool consume = true);
  // Lets things happen; false once the victim has ended the connection.

  void pause(uint milliseconds);

  bool hasRoom();
  // For any descriptor.

  void ring();
  // As it should be done: if the victim sleeps.

  bool trySend(uint64_t word);

  template <typename Func>
  void control(Func&& fill, kj::ArrayPtr<const int> fds = nullptr) {
    // Waits, but only as long as the victim reads.
    peer.control(fill, fds);
    ++deeds;
  }

  bool victimsHeaderIsKnown() { return victimsRing.get() != nullptr; }
  const RegionHeader& victimsHeader();
  kj::ArrayPtr<byte> victimsMemory();

  HostilePeer peer;
  std::mt19937_64 random;
  uint64_t deeds = 0;
  bool ended = false;
  std::atomic<bool> changed{false};  // By somebody who should not be able to.

private:
  kj::Own<DescriptorConsumer> victimsRing;
  kj::Promise<void> answering = nullptr;
  uint64_t received[64];

  void takeAll();
  kj::Promise<void> answer();
  void refuse(uint id);
};

void fillMessage(capnp::MessageBuilder& message, uint depth, bool quiet);
// With a bit of everything to which a pointer can point. The victim returns it in an
// `unimplemented`, and so copies all of it. Or, a quiet one, it is something that the RPC system
// does not look into, so that only the application, as which the victim looks at all of it, finds
// what is wrong, and goes on.

constexpr size_t QUIET_WORDS = 1 + 2 + 2 + 1;
// At the beginning of a quiet one, which are what keeps it quiet: the root pointer, Message,
// Message and Resolve, each of a word of data and a pointer, of which the last is the first that
// nobody else looks at.

struct Dish {
  // A message that lies in our region.
  std::vector<uint64_t> entries;
  uint segments = 0;
  std::vector<size_t> pointers;  // Offsets of words that may be pointers.
};

Dish serve(HostilePeer& peer, capnp::AllocationStrategy strategy, uint firstWords, size_t end,
           bool quiet = false);
// One that ends at `end`.

inline SharedWord& shared(HostilePeer& peer, size_t offset) {
  return reinterpret_cast<SharedWord&>(peer.word(offset));
}

bool tryToChange(int fd, std::mt19937_64& random);
// In one way or another: the contents or the size of a memfd that its receiver holds. Whether it
// could be done, which must be impossible.

void attackWithSealed(RawPeer& raw, uint milliseconds);
// Attack::SEALED.

}  // namespace hostile
}  // namespace capnpshm
