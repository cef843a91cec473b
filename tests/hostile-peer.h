// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// A peer that breaks the rules, and a test of what comes of it: one clear exception at its victim,
// the connection closed, nothing left, and the victim's other connections unharmed.

#include "process-fixture.h"
#include <capnp-shm/handshake.h>
#include <capnp-shm/layout.h>
#include <capnp-shm/memfd.h>
#include <fcntl.h>
#include <functional>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace capnpshm {
namespace hostile {

using kj::uint;

constexpr size_t REGION_BYTES = 32 * 1024;
constexpr uint64_t LIMIT_WORDS = 3000;
// The victim's limit for one message, where it can be set: in the network, not in the server.

kj::AutoCloseFd file(int fd);
// Takes what a system call has returned. Throws if that is an error.

kj::AutoCloseFd makeMemfd(int seals, size_t bytes, bool allocated = true, unsigned flags = 0);
// `flags` beside those that every memfd needs here.

kj::AutoCloseFd makeOrdinaryFile(size_t bytes);
// Without a name, in the current directory.

class HostilePeer {
  // The CLIENT end of a connection whose frames and lines the test writes as it likes. Its victim
  // is a SERVER.
  //
  // Layout of its first region: header, free ring, descriptor ring, and from DATA on what the test
  // wants.

public:
  static constexpr size_t FREE_ENTRIES = 64;
  static constexpr size_t RING = sizeof(RegionHeader) + FREE_ENTRIES * 8;
  static constexpr size_t DATA = 8192;

  explicit HostilePeer(kj::AsyncIoContext& io);

  // The socket ------------------------------------------------------------------

  void writeBytes(kj::ArrayPtr<const kj::byte> bytes, kj::ArrayPtr<const int> fds = nullptr);
  void writeWords(std::initializer_list<uint64_t> words);
  void write(capnp::MessageBuilder& message, kj::ArrayPtr<const int> fds = nullptr);

  template <typename Func>
  void control(Func&& fill, kj::ArrayPtr<const int> fds = nullptr) {
    ControlMessage message;
    fill(message.get());
    write(message.getMessage(), fds);
  }

  void offer(uint64_t bytes = REGION_BYTES, uint minVersion = 1, uint maxVersion = 1);
  void switchOver() { switchOver(region.fd.get()); }
  void switchOver(int fd) { control([](auto c) { c.setSwitch(); }, kj::arrayPtr(&fd, 1)); }
  void mapped() { control([](auto c) { c.setMapped(); }); }
  void announce(uint id, uint64_t bytes, int fd) {
    control([&](auto c) {
      c.initRegion().setId(id);
      c.getRegion().setBytes(bytes);
    }, kj::arrayPtr(&fd, 1));
  }
  void sealed(kj::ArrayPtr<const uint64_t> bytes, kj::ArrayPtr<const int> fds);
  // Files of which is said that they are sealed and of that size.
  void bell() { writeWords({ ~uint64_t(0) }); }
  void hangUp() { stream = nullptr; }

  protocol::Control::Which readControl();
  void awaitHangUp();
  // Throws if the victim does not close the connection.

  // Setting up --------------------------------------------------------------------

  RegionHeader& header() { return *reinterpret_cast<RegionHeader*>(memory().begin()); }
  void writeHeader();
  void agree();
  // Offers and both sides' switch, up to and without our `mapped`.
  void upgrade();
  // All of it.

  // Shared memory -----------------------------------------------------------------

  kj::ArrayPtr<kj::byte> memory() { return region.mapping.bytes(); }
  uint64_t& word(size_t offset) { return *reinterpret_cast<uint64_t*>(memory().begin() + offset); }
  DescriptorLine& line(uint64_t position) {
    return reinterpret_cast<DescriptorLine*>(memory().begin() + RING)[position % FIRST_RING_LINES];
  }

  void publish(DescriptorHead head, std::vector<uint64_t> body);
  // With as many lines as the body needs, or as the head says.
  void publishMessage();
  // An honest one.

  std::vector<uint64_t> handlesInVictimsRing();
  // Of the messages by reference that the victim has published, as they are in its ring.

  kj::AsyncIoContext& io;
  kj::Own<kj::AsyncCapabilityStream> victimsEnd;
  kj::Own<kj::AsyncCapabilityStream> stream;
  OwnRegion region;
  uint64_t victimsRegionBytes = 0;
  kj::Maybe<Mapping> victimsRegion;
  uint64_t position = FIRST_RING_LINES;
  std::function<void(size_t)> letVictimSend;
  // A message of so many bytes. Only where the victim is a bare network.
};

std::vector<uint64_t> entry(uint32_t region, uint32_t words, uint64_t offset);
std::vector<uint64_t> operator+(std::vector<uint64_t> a, const std::vector<uint64_t>& b);

struct Misdeed {
  const char* name;
  const char* complaint;
  // What the victim's exception must say.
  std::function<void(HostilePeer&)> commit;
  bool bareNetworkOnly = false;
  bool plain = false;
  // What it breaks is the plain stream, on which, as with TwoPartyVatNetwork, nobody who got an
  // exception reads again.
  bool acceptSealed = false;
  // Whether the victim, who does not trust it then, accepts sealed segments.
};

inline void PrintTo(const Misdeed& misdeed, std::ostream* out) { *out << misdeed.name; }
inline std::string misdeedName(const testing::TestParamInfo<Misdeed>& info) {
  return info.param.name;
}

class HostileTest: public testing::TestWithParam<Misdeed>, protected LoopFixture {
protected:
  ~HostileTest() noexcept override {}

  void run(const Misdeed& misdeed);
  // Against a bare network and against a server, each untrusting and trusting.

private:
  void runAgainstNetwork(const Misdeed& misdeed, const SharedMemoryContext& context);
  void runAgainstServer(const Misdeed& misdeed, const SharedMemoryContext& context);
};

}  // namespace hostile
}  // namespace capnpshm
