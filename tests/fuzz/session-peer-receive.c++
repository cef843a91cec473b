// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "session-peer.h"

#include <capnp/any.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize.h>

// How a SessionPeer reads what its victim writes, what it checks, and how it lies. Sending is in
// session-peer.c++.

namespace capnpshm {
namespace fuzz {

using capnp::word;

namespace {

constexpr uint64_t BELL = ~uint64_t(0);
constexpr byte MANY[] = { 15 };  // As many as giveBack() takes at once.
constexpr byte LONG_PART[] = { 255, 1, 0 };  // As long as sendInParts() makes it, in region 0.

}  // namespace

void SessionPeer::readSocket(bool accept) {
  kj::Vector<kj::AutoCloseFd> fds;
  for (;;) {
    size_t n = socket.receive(kj::arrayPtr(unread + unreadSize, sizeof(unread) - unreadSize), fds);
    for (auto& fd: fds) unreadFds.push_back(kj::mv(fd));
    fds.resize(0);
    if (n == 0) return;
    unreadSize += n;

    size_t done = 0;
    while (unreadSize - done >= sizeof(word)) {
      uint64_t header;
      memcpy(&header, unread + done, sizeof(header));
      size_t bytes = sizeof(header);
      if (header != BELL) {
        FUZZ_CHECK(uint32_t(header) == 0, "a frame of several segments");
        bytes += (header >> 32) * sizeof(word);
        if (bytes > unreadSize - done) break;
        handleFrame(kj::arrayPtr(reinterpret_cast<const word*>(unread + done) + 1,
            (header >> 32)), accept);
      }
      done += bytes;
    }
    memmove(unread, unread + done, unreadSize - done);
    unreadSize -= done;
    FUZZ_CHECK(unreadSize < sizeof(unread), "a frame that is too long");
  }
}

void SessionPeer::handleFrame(kj::ArrayPtr<const word> frame, bool accept) {
  capnp::SegmentArrayMessageReader message(kj::arrayPtr(&frame, 1));
  auto nextFd = [this]() {
    FUZZ_CHECK(!unreadFds.empty(), "a control message without its descriptor");
    auto result = kj::mv(unreadFds.front());
    unreadFds.pop_front();
    return result;
  };
  auto control = KJ_ASSERT_NONNULL(asControl(message.getRoot<capnp::AnyPointer>()));
  switch (control.which()) {
    case protocol::Control::SWITCH:
      victims.add(VictimsRegion { 0, KJ_ASSERT_NONNULL(findRegion(nextFd())) });
      victimSwitched = true;
      break;
    case protocol::Control::BELL: nextFd(); break;
    case protocol::Control::END: victimEnded = true; break;
    case protocol::Control::FDS:
      for (uint i = control.getFds(); i > 0; i--) nextFd();
      ++victimsFds;
      break;
    case protocol::Control::REGION: {
      auto fd = nextFd();
      uint32_t id = control.getRegion().getId();
      FUZZ_CHECK(id == victims.size(), "regions out of order");
      auto bytes = KJ_ASSERT_NONNULL(findRegion(fd));
      FUZZ_CHECK(bytes.size() == control.getRegion().getBytes());
      victims.add(VictimsRegion { id, accept ? bytes : nullptr });
      ControlFrame answer([&](auto c) {
        if (accept) c.setRegionMapped(id); else c.setRegionRefused(id);
      });
      sendControl(answer);
      break;
    }
    case protocol::Control::REGION_MAPPED:
    case protocol::Control::REGION_REFUSED: {
      uint32_t id = control.isRegionMapped() ? control.getRegionMapped()
                                             : control.getRegionRefused();
      FUZZ_CHECK(lied || (id < regions.size() && !regions[id]->answered), "an answer to nothing");
      if (id >= regions.size()) break;
      regions[id]->answered = true;
      regions[id]->mapped = control.isRegionMapped();
      --unanswered;
      break;
    }
    default: break;
  }
}

// =======================================================================================
// The victim's ring

kj::ArrayPtr<byte> SessionPeer::victimsBytes(SegmentEntry entry) {
  if (lied && (entry.region >= victims.size() || victims[entry.region].bytes == nullptr)) {
    // It may have been told that this region is mapped.
    lost = true;
    return nullptr;
  }
  FUZZ_CHECK(entry.region < victims.size(), "region ", entry.region);
  auto bytes = victims[entry.region].bytes;
  size_t size = entry.words * sizeof(word);
  FUZZ_CHECK(entry.offset <= bytes.size() && size <= bytes.size() - entry.offset,
      "outside of region ", entry.region);
  return bytes.slice(entry.offset, entry.offset + size);
}

void SessionPeer::take(uint count) {
  KJ_IF_MAYBE(r, victimsRing) {
    Descriptor descriptor;
    while (count-- > 0 && !lost && r->tryTake(descriptor)) takeOne(descriptor);
  }
}

void SessionPeer::takeOne(const Descriptor& descriptor) {
  auto& head = descriptor.head;
  auto body = descriptor.body;
  uint length = 0;
  switch (head.kind) {
    case DescriptorKind::MESSAGE:
    case DescriptorKind::MESSAGE_TABLE: {
      FUZZ_CHECK(victimsPartsMissing == 0, "a message within another");
      ++taken;
      length += head.inlineWords;
      uint rest = head.segments - (head.inlineWords > 0);
      if (rest == 0) break;
      uint64_t handle = body[length++];
      auto entries = body + length;
      if (head.kind == DescriptorKind::MESSAGE_TABLE) {
        auto table = victimsBytes(SegmentEntry::unpack(body[length], body[length + 1]));
        if (lost) return;
        FUZZ_CHECK(table.size() == rest * 16);
        entries = reinterpret_cast<uint64_t*>(table.begin());
      }
      for (uint i = 0; i < rest; i++) {
        victimsBytes(SegmentEntry::unpack(entries[2 * i], entries[2 * i + 1]));
      }
      if (handle != FREE_BY_CONSUMPTION) toFree.push_back(handle);
      break;
    }
    case DescriptorKind::BEGIN: {
      auto sizes = victimsBytes(SegmentEntry::unpack(body[1], body[2]));
      for (size_t i = 0; i < sizes.size() / 8; i++) {
        victimsPartsMissing += reinterpret_cast<uint64_t*>(sizes.begin())[i];
      }
      break;
    }
    case DescriptorKind::PART: {
      uint64_t words = victimsBytes(SegmentEntry::unpack(body[1], body[2])).size() / sizeof(word);
      if (lost) return;
      FUZZ_CHECK(words > 0 && words <= victimsPartsMissing, words, " words in a part");
      victimsPartsMissing -= words;
      if (victimsPartsMissing == 0) ++taken;
      break;
    }
    case DescriptorKind::JUMP: {
      auto bytes = victimsBytes(SegmentEntry::unpack(body[0], body[1]));
      if (lost) return;
      KJ_ASSERT_NONNULL(victimsRing).jump(kj::arrayPtr(
          reinterpret_cast<const DescriptorLine*>(bytes.begin()),
          bytes.size() / sizeof(DescriptorLine)));
      break;
    }
    case DescriptorKind::RETIRE: break;
    default: FUZZ_CHECK(!"a descriptor of no kind"); break;
  }
}

void SessionPeer::giveBack(Input& input) {
  uint count = input.below(16);
  while (count-- > 0 && !toFree.empty()) {
    uint index = input.below(toFree.size());
    auto ring = reinterpret_cast<SharedWord*>(&header() + 1);
    ring[freed % FREE_ENTRIES] = toFree[index];
    toFree.erase(toFree.begin() + index);
    header().freed = ++freed;
  }
  KJ_IF_MAYBE(r, victimsRing) header().consumed = r->getPosition();
}

void SessionPeer::sleep(Input& input) {
  header().sleepWord = ++epoch << SLEEP_EPOCH_SHIFT | input.below(4);
}

// =======================================================================================
// Checking, and lying

void SessionPeer::wasReceived(capnp::IncomingRpcMessage& message) {
  if (lied) return;
  FUZZ_CHECK(!expected.empty(), "a message that was not sent");
  auto e = expected.front();
  expected.pop_front();
  FUZZ_CHECK(message.sizeInWords() == e.words, message.sizeInWords(), " instead of ", e.words);
  if (e.firstWords == 0) return;
  auto data = message.getBody().getAs<capnp::AnyStruct>().getDataSection();
  FUZZ_CHECK(data.size() == (e.firstWords - 1) * sizeof(word), data.size());
  for (size_t i = 1; i < e.firstWords; i++) {
    uint64_t value;
    memcpy(&value, data.begin() + (i - 1) * sizeof(value), sizeof(value));
    FUZZ_CHECK(value == e.number * 0x10001 + i, "word ", i, " of message ", e.number);
  }
}

void SessionPeer::lie(Input& input) {
  lied = true;
  auto change = [&](uint64_t* word) { *word = input.takeValue(*word); };
  auto words = reinterpret_cast<uint64_t*>(&header());
  switch (input.below(8)) {
    case 0: {
      constexpr uint FIELDS[] = { 0, 1, 2, 3, 4, 5, 6, 16, 32, 32, 32, 48, 48, 48, 32, 16 };
      change(words + FIELDS[input.below(kj::size(FIELDS))]);
      break;
    }
    case 1: case 2:
      change(reinterpret_cast<uint64_t*>(&line(position - 1 - input.below(8))) + input.below(8));
      break;
    case 3:
      if (lastData != nullptr) change(lastData + input.below(kj::max(lastDataWords, size_t(1))));
      break;
    case 4: change(words + sizeof(RegionHeader) / 8 + input.below(64)); break;
    case 5: change(words + input.below(REGION_BYTES / 8)); break;
    case 6: {
      uint64_t word = input.takeValue(BELL);
      socket.send(kj::arrayPtr(&word, 1).asBytes());
      break;
    }
    case 7: {
      uint kind = input.takeByte();
      ControlFrame frame([&](protocol::Control::Builder c) {
        switch (kind % 9) {
          case 0: c.initRegion().setId(input.below(8)); c.getRegion().setBytes(REGION_BYTES); break;
          case 1: c.setRegionMapped(input.below(8)); break;
          case 2: c.setRegionRefused(input.below(8)); break;
          case 3: c.setFds(input.below(4)); break;
          case 4: c.setEnd(); break;
          case 5: c.setSwitch(); break;
          case 6: c.setBell(); break;
          case 7: c.initOffer(); break;
          case 8: c.setTaken(input.below(4)); break;
        }
      });
      if (kind & 128) frame.lie(input);
      int fd = regions[input.below(regions.size())]->memory.fd;
      socket.send(frame.bytes(), kj::arrayPtr(&fd, kind & 64 ? 1 : 0));
      break;
    }
  }
}

void SessionPeer::finish(uint64_t sentByVictim, kj::Function<void(uint)> drop) {
  FUZZ_CHECK(agreed, "shared memory was not agreed on");
  for (uint round = 0; ; round++) {
    // One that was to be held may come only now.
    for (uint i = 0; i < Victim::MAX_HELD; i++) drop(i);
    FUZZ_CHECK(round < 500, expected.size(), " messages of the peer's, of one ", partsMissing,
        " words, and ", sentByVictim - taken, " of the victim's are under way");
    readSocket(true);
    take(1000);
    do {
      Input many(MANY, sizeof(MANY));
      giveBack(many);
    } while (!toFree.empty());
    if (partsMissing > 0) {
      Input part(LONG_PART, sizeof(LONG_PART));
      sendInParts(part);
    }
    bell();
    socket.turn();
    if (taken == sentByVictim && partsMissing == 0 && expected.empty()) break;
  }
  end();
  socket.turn();
}

}  // namespace fuzz
}  // namespace capnpshm
