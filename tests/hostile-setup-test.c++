// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "emulator.h"
#include "hostile-peer.h"

#include <capnp-shm/bell-socket.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

// Bad input on the control socket: offers, files that are no regions, messages out of order,
// garbage, streams that break off. Beside setup-test.c++, which has what is no error.

namespace capnpshm {
namespace hostile {
namespace {

using process::resourcesOf;
using protocol::Control;

constexpr int ALL_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;
constexpr size_t HUGE_BYTES = 2 << 20;

kj::AutoCloseFd memfd(int seals, size_t bytes = REGION_BYTES, bool allocated = true,
                      unsigned flags = 0) {
  return makeMemfd(seals, bytes, allocated, flags);
}

kj::AutoCloseFd holesAndBlocksBeyondTheEnd() {
  // As many blocks as the region has, but none where the region is.
  auto result = memfd(0, REGION_BYTES, false);
  KJ_SYSCALL(fallocate(result, FALLOC_FL_KEEP_SIZE, REGION_BYTES, REGION_BYTES));
  KJ_SYSCALL(fcntl(result, F_ADD_SEALS, ALL_SEALS));
  return result;
}

kj::AutoCloseFd ordinaryFile() { return makeOrdinaryFile(REGION_BYTES); }

kj::AutoCloseFd pipeEnd() {
  int fds[2];
  KJ_SYSCALL(pipe2(fds, O_CLOEXEC));
  close(fds[1]);
  return kj::AutoCloseFd(fds[0]);
}

class HostileSetup: public HostileTest {};
TEST_P(HostileSetup, IsRefused) { run(GetParam()); }

Misdeed offered(const char* name, const char* complaint,
                std::function<kj::AutoCloseFd()> make, uint64_t bytes = REGION_BYTES) {
  return { name, complaint, [make, bytes](HostilePeer& peer) {
    auto fd = make();
    peer.offer(bytes);
    peer.switchOver(fd);
  } };
}

INSTANTIATE_TEST_SUITE_P(Offers, HostileSetup, testing::Values(
    offered("NoBytes", "positive multiple of the page size",
        []() { return memfd(ALL_SEALS); }, 0),
    offered("HalfAPage", "positive multiple of the page size",
        []() { return memfd(ALL_SEALS); }, REGION_BYTES + 2048),
    offered("LargerThanAnnounced", "another size than it announced",
        []() { return memfd(ALL_SEALS, 2 * REGION_BYTES); }),
    offered("SmallerThanAnnounced", "another size than it announced",
        []() { return memfd(ALL_SEALS, REGION_BYTES / 2); }),
    offered("NoSeals", "without the seals", []() { return memfd(0); }),
    offered("MayShrink", "without the seals",
        []() { return memfd(F_SEAL_GROW | F_SEAL_FUTURE_WRITE); }),
    offered("MayGrow", "without the seals",
        []() { return memfd(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE); }),
    offered("MayBeWritten", "without the seals",
        []() { return memfd(F_SEAL_SHRINK | F_SEAL_GROW); }),
    offered("Holes", "with holes", []() { return memfd(ALL_SEALS, REGION_BYTES, false); }),
    offered("HolesAndBlocksBeyondTheEnd", "with holes", holesAndBlocksBeyondTheEnd),
    offered("OrdinaryFile", "a file that cannot be sealed", ordinaryFile),
    offered("Pipe", "a file that cannot be sealed", pipeEnd),
    offered("Socket", "a file that cannot be sealed",
        []() { return file(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }),
    offered("Device", "a file that cannot be sealed",
        []() { return file(open("/dev/zero", O_RDWR | O_CLOEXEC)); }),
    offered("Directory", "a file that cannot be sealed",
        []() { return file(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)); }),
    offered("Path", "a file that cannot be sealed",
        []() { return file(open("/", O_PATH | O_CLOEXEC)); }),
    offered("EventFd", "a file that cannot be sealed",
        []() { return file(eventfd(0, EFD_CLOEXEC)); }),
    Misdeed { "Twice", "offered shared memory twice", [](HostilePeer& peer) {
      peer.offer();
      peer.offer();
    } }
), misdeedName);

TEST_F(HostileTest, HugePages) {
  int probe = memfd_create("hostile", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
  if (probe < 0) GTEST_SKIP() << "memfd_create() with MFD_HUGETLB: " << strerror(errno);
  close(probe);
  // Not allocated: there need be no huge page in the pool, and that is the danger.
  run({ "HugePages", "not an ordinary memfd", [](HostilePeer& peer) {
    auto fd = memfd(ALL_SEALS, HUGE_BYTES, false, MFD_HUGETLB);
    peer.offer(HUGE_BYTES);
    peer.switchOver(fd);
  } });
}

Misdeed inHeader(const char* name, const char* complaint,
                 std::function<void(RegionHeader&)> change) {
  return { name, complaint, [change](HostilePeer& peer) {
    peer.writeHeader();
    change(peer.header());
    peer.offer();
    peer.switchOver();
  } };
}

INSTANTIATE_TEST_SUITE_P(Headers, HostileSetup, testing::Values(
    inHeader("NoMagic", "has no header", [](RegionHeader& h) { h.magic = 0; }),
    inHeader("Version", "header of another version", [](RegionHeader& h) { h.version = 2; }),
    inHeader("Size", "header with another size", [](RegionHeader& h) { h.regionBytes = 4096; }),
    inHeader("RingMisaligned", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringOffset = HostilePeer::RING + 8; }),
    inHeader("RingInHeader", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringOffset = 448; }),
    inHeader("RingBeyond", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringOffset = REGION_BYTES - 64; }),
    inHeader("RingOffsetMax", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringOffset = ~uint64_t(63); }),
    inHeader("RingLinesMax", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringLines = ~uint64_t(0); }),
    inHeader("RingLinesOverflow", "descriptor ring lies outside",
        [](RegionHeader& h) { h.ringLines = (uint64_t(1) << 58) + FIRST_RING_LINES; }),
    inHeader("NoRing", "not of the size", [](RegionHeader& h) { h.ringLines = 0; }),
    inHeader("SmallRing", "not of the size", [](RegionHeader& h) { h.ringLines = 32; }),
    inHeader("FreeRingMisaligned", "free ring lies outside",
        [](RegionHeader& h) { h.freeOffset = sizeof(RegionHeader) + 4; }),
    inHeader("FreeRingInHeader", "free ring lies outside",
        [](RegionHeader& h) { h.freeOffset = 384; }),
    inHeader("FreeRingBeyond", "free ring lies outside",
        [](RegionHeader& h) { h.freeOffset = REGION_BYTES - 8; }),
    inHeader("FreeEntriesOverflow", "free ring lies outside",
        [](RegionHeader& h) { h.freeEntries = (uint64_t(1) << 61) + 64; }),
    inHeader("FreeEntriesNoPowerOfTwo", "peer's free ring has a size that is no power of two",
        [](RegionHeader& h) { h.freeEntries = 63; })
), misdeedName);

Misdeed early(const char* name, const char* complaint, std::function<void(Control::Builder)> fill) {
  return { name, complaint, [fill](HostilePeer& peer) { peer.control(fill); } };
}

Misdeed late(const char* name, const char* complaint, std::function<void(Control::Builder)> fill) {
  return { name, complaint, [fill](HostilePeer& peer) {
    peer.upgrade();
    peer.control(fill);
  } };
}

INSTANTIATE_TEST_SUITE_P(OutOfOrder, HostileSetup, testing::Values(
    early("MappedFirst", "not offered to it", [](auto c) { c.setMapped(); }),
    early("SwitchFirst", "before that was agreed", [](auto c) { c.setSwitch(); }),
    early("EndFirst", "before shared memory was agreed", [](auto c) { c.setEnd(); }),
    early("RegionFirst", "before shared memory was agreed",
        [](auto c) { c.initRegion().setId(1); }),
    early("AnswerFirst", "before shared memory was agreed", [](auto c) { c.setRegionMapped(1); }),
    early("RefusalFirst", "before shared memory was agreed",
        [](auto c) { c.setRegionRefused(1); }),
    early("DescriptorsFirst", "before shared memory was agreed", [](auto c) { c.setFds(1); }),
    early("BellFirst", "at the wrong place", [](auto c) { c.setBell(); }),
    early("BellSocketFirst", "cannot take", [](auto c) { c.setBellSocket(); }),
    early("BellSocketAnswerFirst", "not offered to it", [](auto c) { c.setBellSocketTaken(true); }),
    Misdeed { "SwitchAgain", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.switchOver();
    } },
    Misdeed { "SwitchAgainPlain", "or twice", [](HostilePeer& peer) {
      // The victim declines, for want of a descriptor.
      peer.offer();
      for (uint i = 0; i < 2; i++) peer.control([](auto c) { c.setSwitch(); });
    }, false, true },
    Misdeed { "SwitchAfterDeclined", "before that was agreed", [](HostilePeer& peer) {
      peer.offer();
      peer.control([](auto c) { c.setDeclined("no"); });
      peer.switchOver();
    }, false, true },
    Misdeed { "MappedBeforeSwitch", "not offered to it", [](HostilePeer& peer) {
      peer.offer();
      peer.mapped();
    } },
    Misdeed { "PlainBehindSwitch", "plain message after", [](HostilePeer& peer) {
      peer.agree();
      capnp::MallocMessageBuilder message;
      message.initRoot<capnp::rpc::Message>().initFinish();
      peer.write(message);
    } },
    Misdeed { "EndBeforeMapped", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.control([](auto c) { c.setEnd(); });
    } },
    Misdeed { "BellBeforeMapped", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.control([](auto c) { c.setBell(); });
    } },
    Misdeed { "RegionBeforeMapped", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.announce(1, REGION_BYTES, peer.region.fd);
    } },
    Misdeed { "DescriptorsBeforeMapped", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.control([](auto c) { c.setFds(1); });
    } },
    Misdeed { "TakenBeforeMapped", "impossible order", [](HostilePeer& peer) {
      peer.agree();
      peer.control([](auto c) { c.setTaken(0); });
    } },
    early("TakenFirst", "was not asked", [](auto c) { c.setTaken(0); }),
    late("TakenLate", "was not asked", [](auto c) { c.setTaken(0); }),
    Misdeed { "MappedTwice", "not offered to it", [](HostilePeer& peer) {
      peer.agree();
      peer.mapped();
      peer.mapped();
    } },
    Misdeed { "MappedAfterDeclined", "has declined ours", [](HostilePeer& peer) {
      peer.agree();
      peer.control([](auto c) { c.setDeclined("no"); });
      peer.mapped();
    }, false, true },
    Misdeed { "DeclinedAfterMapped", "after it had mapped it", [](HostilePeer& peer) {
      peer.agree();
      peer.mapped();
      peer.control([](auto c) { c.setDeclined("no"); });
    } },
    Misdeed { "DeclinedTwice", "declined shared memory twice", [](HostilePeer& peer) {
      for (uint i = 0; i < 2; i++) peer.control([](auto c) { c.setDeclined("no"); });
    }, false, true },
    late("MappedLate", "not offered to it", [](auto c) { c.setMapped(); }),
    late("SwitchTwice", "before that was agreed", [](auto c) { c.setSwitch(); }),
    late("DeclinedLate", "after it had mapped it", [](auto c) { c.setDeclined("no"); }),
    late("OfferLate", "offered shared memory twice", [](auto c) { c.initOffer(); }),
    late("BellLate", "impossible order", [](auto c) { c.setBell(); }),
    late("BellSocketAnswerForNothing", "not offered to it",
        [](auto c) { c.setBellSocketTaken(false); }),
    Misdeed { "BellSocketTwice", "cannot take", [](HostilePeer& peer) {
      peer.upgrade();
      for (uint i = 0; i < 2; i++) {
        BellSocket bell;
        int fd = bell.takePeersEnd().release();
        kj::AutoCloseFd own(fd);
        peer.control([](auto c) { c.setBellSocket(); }, kj::arrayPtr(&fd, 1));
      }
    } },
    Misdeed { "BellSocketIsNone", "than a Unix stream socket", [](HostilePeer& peer) {
      peer.upgrade();
      auto fd = pipeEnd();
      int number = fd;
      peer.control([](auto c) { c.setBellSocket(); }, kj::arrayPtr(&number, 1));
    } },
    late("AnswerForFirstRegion", "that was not announced", [](auto c) { c.setRegionMapped(0); }),
    late("AnswerForNothing", "that was not announced", [](auto c) { c.setRegionMapped(1); }),
    late("RefusalOfNothing", "that was not announced", [](auto c) { c.setRegionRefused(9); })
), misdeedName);

Misdeed announced(const char* name, const char* complaint, uint id,
                  std::function<kj::AutoCloseFd()> make, uint64_t bytes = REGION_BYTES) {
  return { name, complaint, [=](HostilePeer& peer) {
    peer.upgrade();
    auto fd = make();
    peer.announce(id, bytes, fd);
  } };
}

INSTANTIATE_TEST_SUITE_P(Announcements, HostileSetup, testing::Values(
    announced("IdZero", "out of order", 0, []() { return memfd(ALL_SEALS); }),
    announced("IdSkipped", "out of order", 2, []() { return memfd(ALL_SEALS); }),
    Misdeed { "IdTwice", "out of order", [](HostilePeer& peer) {
      peer.upgrade();
      for (uint i = 0; i < 2; i++) peer.announce(1, REGION_BYTES, peer.region.fd);
    } },
    announced("NoBytes", "positive multiple of the page size", 1,
        []() { return memfd(ALL_SEALS); }, 0),
    announced("MayShrink", "without the seals", 1,
        []() { return memfd(F_SEAL_GROW | F_SEAL_FUTURE_WRITE); }),
    announced("Holes", "with holes", 1, []() { return memfd(ALL_SEALS, REGION_BYTES, false); }),
    announced("OtherSize", "another size than it announced", 1,
        []() { return memfd(ALL_SEALS, 2 * REGION_BYTES); }),
    announced("Pipe", "a file that cannot be sealed", 1, pipeEnd)
), misdeedName);

Misdeed garbage(const char* name, const char* complaint, std::vector<uint64_t> words) {
  // After the switch, where we alone read.
  return { name, complaint, [words](HostilePeer& peer) {
    peer.upgrade();
    peer.writeBytes(kj::arrayPtr(words.data(), words.size()).asBytes());
  } };
}

INSTANTIATE_TEST_SUITE_P(Garbage, HostileSetup, testing::Values(
    garbage("NoWords", "not a control message", { 0 }),
    garbage("TooManyWords", "not a control message", { uint64_t(65) << 32 }),
    garbage("TwoSegments", "not a control message", { uint64_t(1) << 32 | 1, 0, 0, 0 }),
    garbage("AlmostABell", "not a control message", { ~uint64_t(1) }),
    garbage("Noise", "not a control message", { 0x0123456789abcdef }),
    garbage("EmptyMessage", "plain message after", { uint64_t(1) << 32, 0 }),
    garbage("PointerBeyond", "", { uint64_t(1) << 32, 0x0001000000001000 }),
    garbage("FarPointer", "", { uint64_t(1) << 32, 0x0000000700000002 }),
    garbage("CapabilityPointer", "", { uint64_t(1) << 32, 3 }),
    Misdeed { "PlainMessage", "plain message after", [](HostilePeer& peer) {
      peer.upgrade();
      capnp::MallocMessageBuilder message;
      message.initRoot<capnp::rpc::Message>().initFinish();
      peer.write(message);
    } },
    Misdeed { "UnknownKind", "unknown kind", [](HostilePeer& peer) {
      peer.upgrade();
      ControlMessage message;
      message.get().setEnd();
      auto segment = message.getMessage().getSegmentsForOutput()[0];
      // The discriminant is the 16 bits that hold the number of `end`.
      auto bytes = kj::heapArray<kj::byte>(segment.asBytes());
      auto halves = kj::arrayPtr(
          reinterpret_cast<uint16_t*>(bytes.begin()), bytes.size() / sizeof(uint16_t));
      uint found = 0;
      for (auto& half: halves) {
        if (half == uint16_t(Control::END)) half = 99, ++found;
      }
      KJ_REQUIRE(found == 1);
      uint64_t header = uint64_t(segment.size()) << 32;
      peer.writeBytes(kj::arrayPtr(&header, 1).asBytes());
      peer.writeBytes(bytes);
    } },
    Misdeed { "PlainNoise", "egments", [](HostilePeer& peer) {
      peer.writeWords({ 0x0123456789abcdef, 0, 0, 0 });
    }, false, true },
    Misdeed { "BrokenOffWithinHeader", "disconnected", [](HostilePeer& peer) {
      peer.upgrade();
      kj::byte half[4] = {};
      peer.writeBytes(half);
      peer.hangUp();
    } },
    Misdeed { "BrokenOffWithinMessage", "disconnected", [](HostilePeer& peer) {
      peer.upgrade();
      peer.writeWords({ uint64_t(8) << 32, 0, 0 });
      peer.hangUp();
    } },
    Misdeed { "BrokenOffWithinOffer", "disconnected within a message", [](HostilePeer& peer) {
      peer.writeWords({ uint64_t(8) << 32, 0, 0 });
      peer.hangUp();
    }, false, true },
    Misdeed { "BrokenOffWithinParts", "disconnected within a message", [](HostilePeer& peer) {
      peer.upgrade();
      peer.word(HostilePeer::DATA) = 100;
      peer.publish({ DescriptorKind::BEGIN, 0, 1, 0, 0 },
          std::vector<uint64_t> { FREE_BY_CONSUMPTION } + entry(0, 1, HostilePeer::DATA));
      peer.hangUp();
    } },
    Misdeed { "BrokenOffBeforeDescriptors", "disconnected within a message",
        [](HostilePeer& peer) {
      peer.upgrade();
      peer.publish({ DescriptorKind::MESSAGE, 0, 1, 1, 1 }, { 0 });
      peer.hangUp();
    } }
), misdeedName);

TEST_F(HostileTest, ManyFileDescriptors) {
  CAPNP_SHM_NEEDS_EXCESS_FDS_CLOSED;
  // With every kind of message: those in excess are closed, and it all works.
  auto before = resourcesOf();
  for (bool trust: { false, true }) {
    conformance::ServerState state;
    HostilePeer peer(io);
    SharedMemoryContext context { &io.unixEventPort, SharedMemoryOptions() };
    context.options.trustPeer = trust;
    auto end = kj::mv(peer.victimsEnd);
    SharedMemoryVatNetwork network(context, *end, 2, conformance::Side::SERVER);
    auto connection = network.accept().wait(io.waitScope);
    auto received = connection->receiveIncomingMessage();
    auto kept = resourcesOf();
    std::vector<int> many(20, peer.region.fd.get());
    auto fds = kj::arrayPtr(many.data(), many.size());
    auto withMany = [&](auto&& fill) { peer.control(fill, fds); };

    peer.writeHeader();
    withMany([](auto c) {
      auto offer = c.initOffer();
      offer.setMinVersion(0);
      offer.setMaxVersion(7);
      offer.setRegionBytes(REGION_BYTES);
    });
    ASSERT_FALSE(received.poll(io.waitScope));
    ASSERT_EQ(Control::OFFER, peer.readControl());
    withMany([](auto c) { c.setSwitch(); });
    ASSERT_FALSE(received.poll(io.waitScope));
    ASSERT_EQ(Control::SWITCH, peer.readControl());
    ASSERT_EQ(Control::MAPPED, peer.readControl());
    withMany([](auto c) { c.setMapped(); });
    ASSERT_FALSE(received.poll(io.waitScope));
    withMany([](auto c) {
      c.initRegion().setId(1);
      c.getRegion().setBytes(REGION_BYTES);
    });
    ASSERT_FALSE(received.poll(io.waitScope));
    ASSERT_EQ(Control::REGION_MAPPED, peer.readControl());
    withMany([](auto c) { c.setFds(20); });
    auto number = peer.position;
    peer.publishMessage();
    auto& head = peer.line(number).words[0];
    head = head.load() | uint64_t(20) << 32;
    peer.bell();
    auto message = KJ_ASSERT_NONNULL(await(kj::mv(received)));
    EXPECT_EQ(2, message->getAttachedFds().size());
    message = nullptr;
    EXPECT_EQ(kept.fds, resourcesOf().fds);
    EXPECT_EQ(kept.regions + 4, resourcesOf().regions);  // Its first, mine twice, and the second.
  }
  EXPECT_EQ(before, resourcesOf());
}

TEST_F(HostileTest, VersionsThatDoNotMeetAreNoError) {
  for (auto versions: { std::make_pair(2u, 9u), std::make_pair(0u, 0u), std::make_pair(5u, 1u) }) {
    HostilePeer peer(io);
    auto end = kj::mv(peer.victimsEnd);
    SharedMemoryVatNetwork network(*end, 1, conformance::Side::SERVER);
    auto connection = network.accept().wait(io.waitScope);
    auto received = connection->receiveIncomingMessage();
    peer.offer(REGION_BYTES, versions.first, versions.second);
    ASSERT_FALSE(received.poll(io.waitScope));
    EXPECT_EQ(Control::DECLINED, peer.readControl());
    auto stats = network.getStats();
    EXPECT_EQ(Transport::PLAIN, stats.incoming.transport);
    EXPECT_NE(nullptr, strstr(stats.incoming.plainReason.cStr(), "no common version"));

    capnp::MallocMessageBuilder message;
    message.initRoot<capnp::rpc::Message>().initFinish().setQuestionId(3);
    peer.write(message);
    auto plain = KJ_ASSERT_NONNULL(await(kj::mv(received)));
    EXPECT_EQ(3, plain->getBody().getAs<capnp::rpc::Message>().getFinish().getQuestionId());
  }
}

TEST_F(HostileTest, HonestPeersMeetNoLimit) {
  // Whatever they do, and whether a limit is as tight as it may be, as usual, or none at all.
  auto tight = PeerLimits { 0, 0, 0, 64 };
  auto tightWithRegions = PeerLimits { 2, 1, 0, 64 };
  auto none = PeerLimits {
      uint(kj::maxValue), uint(kj::maxValue), size_t(kj::maxValue), uint(kj::maxValue) };
  for (bool trust: { false, true }) {
    for (auto& limits: { tight, tightWithRegions, PeerLimits(), none }) {
      SharedMemoryContext context;
      context.options.trustPeer = trust;
      context.options.maxBytes = 4 << 20;
      context.options.plainCalls = 1;
      context.options.spinMicroseconds = 0;  // So that each call needs its bells.
      context.options.peerLimits = limits;
      conformance::ServerState state;
      SharedMemoryServer server(context, kj::heap<conformance::RootImpl>(state));
      auto pipe = io.provider->newCapabilityPipe();
      server.accept(kj::mv(pipe.ends[0]), 4);
      SharedMemoryClient client(context, *pipe.ends[1], 4);
      auto root = client.bootstrap().castAs<conformance::Root>();
      process::runWorkload(root, io.waitScope);
      conformance::ServerState mine;
      std::vector<kj::Promise<void>> files;
      for (uint i = 0; i < 100; i++) {
        auto request = root.filesRequest();
        auto items = request.initItems(1 + i % 4);
        for (uint j = 0; j < items.size(); j++) {
          items.set(j, kj::heap<conformance::FileItem>(mine, pipeEnd()));
        }
        files.push_back(request.send().ignoreResult());
      }
      for (auto& promise: files) await(kj::mv(promise));
      for (uint i = 0; i < 500; i++) {
        auto request = root.echoRequest();
        auto data = request.initData(i % 50 == 0 ? 300000 : 10 * i);
        memset(data.begin(), i, data.size());
        auto response = await(request.send());
        ASSERT_EQ(data.size(), response.getData().size());
        // Until both sides sleep.
        io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope);
      }
      auto stats = client.getStats();
      ASSERT_EQ(Transport::SHARED_MEMORY, stats.outgoing.transport);
      EXPECT_GT(stats.bellsRung, 200);
      EXPECT_GT(stats.sleeps, 200);
    }
  }
}

}  // namespace
}  // namespace hostile
}  // namespace capnpshm
