// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-peer.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <capnp/rpc.capnp.h>

// Bad sealed segments: files, records on the socket, and what descriptors say of them.

namespace capnpshm {
namespace hostile {
namespace {

using process::resourcesOf;
using protocol::Control;
using Words = std::vector<uint64_t>;

constexpr int ALL_SEALS = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
constexpr size_t SEGMENT_BYTES = 16 * 1024;
constexpr uint32_t SEGMENT_WORDS = SEGMENT_BYTES / 8;
constexpr size_t HUGE_BYTES = 2 << 20;
const Words BY_CONSUMPTION { FREE_BY_CONSUMPTION };

kj::AutoCloseFd memfd(int seals = ALL_SEALS, size_t bytes = SEGMENT_BYTES, bool allocated = true,
                      unsigned flags = 0) {
  return makeMemfd(seals, bytes, allocated, flags);
}

kj::AutoCloseFd ordinaryFile() { return makeOrdinaryFile(SEGMENT_BYTES); }

void sendFiles(HostilePeer& peer, std::vector<uint64_t> bytes, std::vector<int> fds) {
  peer.sealed(kj::arrayPtr(bytes.data(), bytes.size()), kj::arrayPtr(fds.data(), fds.size()));
}

Words sealedEntry(uint32_t number, uint32_t words = SEGMENT_WORDS, uint64_t offset = 0) {
  return entry(SEALED_SEGMENT | number, words, offset);
}

DescriptorHead headFor(uint16_t segments, uint16_t fds = 1) {
  return { DescriptorKind::MESSAGE, 0, segments, fds, 0 };
}

Misdeed sealed(const char* name, const char* complaint, std::function<void(HostilePeer&)> commit,
               bool bareNetworkOnly = false) {
  // After an honest message. Its victim accepts sealed segments.
  Misdeed result { name, complaint, [commit](HostilePeer& peer) {
    peer.upgrade();
    peer.publishMessage();
    commit(peer);
    if (peer.stream.get() != nullptr) peer.bell();
  }, bareNetworkOnly };
  result.acceptSealed = true;
  return result;
}

Misdeed sentFile(const char* name, const char* complaint, std::function<kj::AutoCloseFd()> make,
                 uint64_t bytes = SEGMENT_BYTES) {
  return sealed(name, complaint, [make, bytes](HostilePeer& peer) {
    auto fd = make();
    sendFiles(peer, { bytes }, { fd });
    peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0, 16));
  });
}

Misdeed published(const char* name, const char* complaint, DescriptorHead head, Words body,
                  bool bareNetworkOnly = false) {
  // With two files that are as they should be.
  return sealed(name, complaint, [head, body](HostilePeer& peer) {
    auto first = memfd(), second = memfd();
    sendFiles(peer, { SEGMENT_BYTES, SEGMENT_BYTES }, { first, second });
    peer.publish(head, body);
  }, bareNetworkOnly);
}

class HostileSealed: public HostileTest {};
TEST_P(HostileSealed, IsRefused) { run(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Files, HostileSealed, testing::Values(
    sentFile("NoSeals", "without the seals", []() { return memfd(0); }),
    sentFile("MayBeWritten", "without the seals",
        []() { return memfd(F_SEAL_SHRINK | F_SEAL_GROW); }),
    sentFile("MayBeWrittenByItsOwner", "without the seals",
        []() { return memfd(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE); }),
    sentFile("MayShrink", "without the seals", []() { return memfd(F_SEAL_WRITE | F_SEAL_GROW); }),
    sentFile("MayGrow", "without the seals", []() { return memfd(F_SEAL_WRITE | F_SEAL_SHRINK); }),
    sentFile("LargerThanAnnounced", "another size than it announced",
        []() { return memfd(ALL_SEALS, 2 * SEGMENT_BYTES); }),
    sentFile("SmallerThanAnnounced", "another size than it announced",
        []() { return memfd(ALL_SEALS, SEGMENT_BYTES / 2); }),
    sentFile("NoWholePages", "not a multiple of the page size",
        []() { return memfd(ALL_SEALS, SEGMENT_BYTES + 8); }, SEGMENT_BYTES + 8),
    sentFile("SizeMax", "not a multiple of the page size", []() { return memfd(); },
        ~uint64_t(0)),
    sentFile("Holes", "with holes", []() { return memfd(ALL_SEALS, SEGMENT_BYTES, false); }),
    sentFile("OrdinaryFile", "a file that cannot be sealed", ordinaryFile),
    sentFile("Socket", "a file that cannot be sealed",
        []() { return file(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }),
    sentFile("Device", "a file that cannot be sealed",
        []() { return file(open("/dev/zero", O_RDWR | O_CLOEXEC)); }),
    sentFile("Directory", "a file that cannot be sealed",
        []() { return file(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)); })
), misdeedName);

TEST_F(HostileTest, SealedHugePages) {
  int probe = memfd_create("hostile", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
  if (probe < 0) GTEST_SKIP() << "memfd_create() with MFD_HUGETLB: " << strerror(errno);
  close(probe);
  run(sentFile("HugePages", "not an ordinary memfd",
      []() { return memfd(ALL_SEALS, HUGE_BYTES, false, MFD_HUGETLB); }, HUGE_BYTES));
}

INSTANTIATE_TEST_SUITE_P(Descriptors, HostileSealed, testing::Values(
    published("NumberBeyond", "does not belong to it", headFor(1),
        BY_CONSUMPTION + sealedEntry(2)),
    published("NumberMax", "does not belong to it", headFor(1),
        BY_CONSUMPTION + sealedEntry(0x7fffffff)),
    published("OfNoRecord", "does not belong to it", headFor(1, 0),
        BY_CONSUMPTION + sealedEntry(0)),
    published("Twice", "twice", headFor(2), BY_CONSUMPTION + sealedEntry(0) + sealedEntry(0)),
    published("TwiceWithoutOverlap", "twice", headFor(3),
        BY_CONSUMPTION + sealedEntry(0, 8) + sealedEntry(1) + sealedEntry(0, 8)),
    published("Offset", "outside its sealed segment", headFor(1),
        BY_CONSUMPTION + sealedEntry(0, 8, 4096)),
    published("OffsetBackward", "outside its sealed segment", headFor(1),
        BY_CONSUMPTION + sealedEntry(0, 8, ~uint64_t(7))),
    published("OneWordBeyond", "outside its sealed segment", headFor(1),
        BY_CONSUMPTION + sealedEntry(0, SEGMENT_WORDS + 1)),
    published("WordsMax", "outside its sealed segment", headFor(1),
        BY_CONSUMPTION + sealedEntry(0, 0xffffffff)),
    published("NoWords", "outside its sealed segment", headFor(1),
        BY_CONSUMPTION + sealedEntry(0, 0)),
    published("TooManyWords", "exceeds size limit", headFor(2),
        BY_CONSUMPTION + sealedEntry(0) + sealedEntry(1), true),
    published("TooManyWordsElsewhere", "exceeds size limit", headFor(2),
        BY_CONSUMPTION + sealedEntry(0) +
            entry(0, LIMIT_WORDS - SEGMENT_WORDS + 1, HostilePeer::DATA), true),
    published("OthersOverlap", "segments overlap", headFor(3),
        BY_CONSUMPTION + sealedEntry(0, 8) + entry(0, 8, HostilePeer::DATA) +
            entry(0, 8, HostilePeer::DATA + 8)),
    published("OtherBeyond", "outside its region", headFor(2),
        BY_CONSUMPTION + sealedEntry(0, 8) + entry(0, 8, REGION_BYTES)),
    published("Table", "not mapped", { DescriptorKind::MESSAGE_TABLE, 0, 30, 1, 0 },
        BY_CONSUMPTION + sealedEntry(0, 60)),
    published("Begin", "not mapped", { DescriptorKind::BEGIN, 0, 2, 1, 0 },
        BY_CONSUMPTION + sealedEntry(0, 2)),
    published("Jump", "not mapped", { DescriptorKind::JUMP, 0, 0, 0, 0 }, sealedEntry(0, 1024)),
    published("Retire", "retired a region that is not mapped",
        { DescriptorKind::RETIRE, 0, 0, 0, 0 }, { SEALED_SEGMENT }),
    sealed("Part", "not mapped", [](HostilePeer& peer) {
      auto fd = memfd();
      sendFiles(peer, { SEGMENT_BYTES }, { fd });
      peer.word(HostilePeer::DATA) = 10;
      peer.publish({ DescriptorKind::BEGIN, 0, 1, 1, 0 },
          BY_CONSUMPTION + entry(0, 1, HostilePeer::DATA));
      peer.publish({ DescriptorKind::PART, 0, 0, 0, 0 }, BY_CONSUMPTION + sealedEntry(0, 10));
    }),
    sealed("OfTheMessageBefore", "does not belong to it", [](HostilePeer& peer) {
      auto fd = memfd();
      sendFiles(peer, { SEGMENT_BYTES }, { fd });
      peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
      peer.control([](Control::Builder c) { c.setFds(0); });
      peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
    })
), misdeedName);

INSTANTIATE_TEST_SUITE_P(Records, HostileSealed, testing::Values(
    Misdeed { "NotAccepted", "does not accept", [](HostilePeer& peer) {
      peer.upgrade();
      auto fd = memfd();
      sendFiles(peer, { SEGMENT_BYTES }, { fd });
    } },
    Misdeed { "First", "does not accept", [](HostilePeer& peer) {
      sendFiles(peer, { SEGMENT_BYTES }, {});
    } },
    [] {
      Misdeed result { "BeforeMapped", "impossible order", [](HostilePeer& peer) {
        peer.agree();
        sendFiles(peer, { SEGMENT_BYTES }, {});
      } };
      result.acceptSealed = true;
      return result;
    }(),
    sealed("NoFiles", "impossible number", [](HostilePeer& peer) { sendFiles(peer, {}, {}); }),
    sealed("SeventeenFiles", "impossible number", [](HostilePeer& peer) {
      sendFiles(peer, Words(17, SEGMENT_BYTES), {});
    }),
    sealed("FileMissing", "did not arrive", [](HostilePeer& peer) {
      auto fd = memfd();
      sendFiles(peer, { SEGMENT_BYTES, SEGMENT_BYTES }, { fd });
      peer.publish(headFor(2), BY_CONSUMPTION + sealedEntry(0, 8) + sealedEntry(1, 8));
    }),
    sealed("AllFilesMissing", "did not arrive", [](HostilePeer& peer) {
      sendFiles(peer, { SEGMENT_BYTES }, {});
      peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
    }),
    sealed("TooFarAhead", "too far ahead", [](HostilePeer& peer) {
      auto fd = memfd();
      for (uint i = 0; i < 5; i++) {
        sendFiles(peer, Words(16, SEGMENT_BYTES), std::vector<int>(16, fd.get()));
      }
    }),
    sealed("SingleRecordsTooFarAhead", "too far ahead", [](HostilePeer& peer) {
      auto fd = memfd();
      for (uint i = 0; i < 65; i++) sendFiles(peer, { SEGMENT_BYTES }, { fd });
    }),
    sealed("RecordNeverComes", "disconnected within a message", [](HostilePeer& peer) {
      peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
      peer.hangUp();
    }),
    sealed("OtherRecordComes", "does not belong to it", [](HostilePeer& peer) {
      peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
      peer.control([](Control::Builder c) { c.setFds(1); });
    })
), misdeedName);

TEST_F(HostileTest, WhatIsRightIsDeliveredAndTheRestClosed) {
  // So that the others are known to fail for what they say; and what came before is delivered.
  auto before = resourcesOf();
  {
    HostilePeer peer(io);
    auto end = kj::mv(peer.victimsEnd);
    SharedMemoryContext context { &io.unixEventPort, SharedMemoryOptions() };
    context.options.sealedThresholdBytes = SEGMENT_BYTES;
    SharedMemoryVatNetwork network(context, *end, 1, conformance::Side::SERVER);
    auto connection = network.accept().wait(io.waitScope);
    auto received = connection->receiveIncomingMessage();
    peer.upgrade();

    capnp::MallocMessageBuilder builder(SEGMENT_WORDS);
    builder.initRoot<capnp::rpc::Message>().initResolve().initException()
        .initReason(SEGMENT_BYTES / 2);
    auto words = builder.getSegmentsForOutput()[0].asBytes();
    auto unsealed = memfd(0);
    KJ_REQUIRE(pwrite(unsealed, words.begin(), words.size(), 0) == ssize_t(words.size()));
    KJ_SYSCALL(fcntl(unsealed, F_ADD_SEALS, ALL_SEALS));
    auto other = memfd(0);
    // The second file is not referred to, and the last two fds are more than there should be.
    sendFiles(peer, { SEGMENT_BYTES, 77 }, { unsealed, other, other, other });
    peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0, words.size() / 8));
    sendFiles(peer, { SEGMENT_BYTES }, { other });
    peer.publish(headFor(1), BY_CONSUMPTION + sealedEntry(0));
    peer.bell();

    auto message = KJ_ASSERT_NONNULL(await(kj::mv(received)));
    EXPECT_EQ(SEGMENT_BYTES / 2,
        message->getBody().getAs<capnp::rpc::Message>().getResolve().getException()
            .getReason().size());
    EXPECT_EQ(1, message->getAttachedFds().size());
    EXPECT_GE(network.getStats().incoming.sealedBytes, words.size());
    EXPECT_FAILS(FAILED, "without the seals", connection->receiveIncomingMessage());
  }
  EXPECT_EQ(before, resourcesOf());
}

}  // namespace
}  // namespace hostile
}  // namespace capnpshm
