// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "session-peer.h"

#include <sys/eventfd.h>
#include <capnp/any.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize.h>

namespace capnpshm {
namespace fuzz {

using capnp::word;

namespace {

constexpr size_t FREE_RING = sizeof(RegionHeader);
constexpr size_t RING = FREE_RING + SessionPeer::FREE_ENTRIES * sizeof(SharedWord);
constexpr size_t DATA = RING + FIRST_RING_LINES * sizeof(DescriptorLine);
constexpr uint MAX_REGIONS = 6;

uint64_t contents(uint64_t number, size_t index) { return number * 0x10001 + index; }

void fillSegment(uint64_t number, uint64_t* words, size_t count) {
  // A struct of data only, or nothing if there is no room for one.
  if (count == 0) return;
  words[0] = uint64_t(count - 1) << 32;
  for (size_t i = 1; i < count; i++) words[i] = contents(number, i);
}

}  // namespace

SessionPeer::SessionPeer(Socket& socket): socket(socket) {
  auto first = kj::heap<Region>(0, REGION_BYTES);
  first->mapped = first->answered = first->holdsRing = true;
  first->zeroed = false;
  first->top = DATA;
  ring = first->memory.mapping.bytes().slice(RING, DATA);
  regions.add(kj::mv(first));
}

RegionHeader& SessionPeer::header() {
  return *reinterpret_cast<RegionHeader*>(regions[0]->memory.mapping.bytes().begin());
}

RegionHeader& SessionPeer::victimsHeader() {
  return *reinterpret_cast<RegionHeader*>(victims[0].bytes.begin());
}

// =======================================================================================
// Setting up

void SessionPeer::sendPlain() {
  uint64_t words[6] = { uint64_t(5) << 32 };
  fillSegment(nextNumber, words + 1, 5);
  expect(5, 5);
  socket.send(kj::arrayPtr(words, kj::size(words)).asBytes());
}

void SessionPeer::setUp(bool victimTrusts, bool trust, uint plainMessages, Input& input) {
  auto& h = header();
  h.version = PROTOCOL_VERSION;
  h.regionBytes = REGION_BYTES;
  h.freeOffset = FREE_RING;
  h.freeEntries = trust ? FREE_ENTRIES : 0;
  h.ringOffset = RING;
  h.ringLines = FIRST_RING_LINES;
  h.consumed = FIRST_RING_LINES;
  h.magic = REGION_MAGIC;

  ControlFrame offer([&](protocol::Control::Builder control) {
    auto offer = control.initOffer();
    offer.setMinVersion(1);
    offer.setMaxVersion(1);
    offer.setNonce(1234);
    offer.setRegionBytes(REGION_BYTES);
    offer.setTrustsPeer(trust);
    offer.setMaxFdsPerMessage(2);
  });
  sendControl(offer);
  socket.turn();
  readSocket(true);
  for (; plainMessages > 0; plainMessages--) sendPlain();
  int fd = regions[0]->memory.fd;
  ControlFrame switchOver([](auto control) { control.setSwitch(); });
  sendControl(switchOver, kj::arrayPtr(&fd, 1));
  socket.turn();
  readSocket(true);
  ControlFrame mapped([](auto control) { control.setMapped(); });
  sendControl(mapped);
  if (victimTrusts && trust) {
    // To be rung on the socket, or by the eventfd.
    ControlFrame bell([](auto control) { control.setBell(); });
    if (input.takeFlag()) {
      kj::AutoCloseFd event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      int number = event;
      sendControl(bell, kj::arrayPtr(&number, 1));
    } else {
      sendControl(bell);
    }
  }
  socket.turn();
  readSocket(true);
  agreed = victimSwitched;
  if (!agreed) return;
  victimFrees = victimTrusts;
  auto& v = victimsHeader();
  victimsRing = DescriptorConsumer(kj::arrayPtr(
      reinterpret_cast<const DescriptorLine*>(victims[0].bytes.begin() + v.ringOffset),
      FIRST_RING_LINES));
}

// =======================================================================================
// Sending

DescriptorLine& SessionPeer::line(uint64_t position) {
  return reinterpret_cast<DescriptorLine*>(ring.begin())
      [position % (ring.size() / sizeof(DescriptorLine))];
}

bool SessionPeer::canSend(uint lines) {
  if (!agreed || ended) return false;
  return position + lines + 1 <=
      victimsHeader().consumed.load() + ring.size() / sizeof(DescriptorLine);
}

void SessionPeer::publish(DescriptorHead head, kj::ArrayPtr<const uint64_t> body) {
  uint lines = head.lines = linesForBody(body.size());
  for (uint i = 1; i < lines; i++) {
    auto& l = line(position + i);
    uint start = bodyCapacity(i);
    for (uint j = start; j < kj::min(start + CONTINUATION_BODY_WORDS, uint(body.size())); j++) {
      l.words[j - start] = body[j];
    }
    l.stamp = continuationStamp(position + i);
  }
  auto& first = line(position);
  first.words[0] = head.pack();
  for (uint j = 0; j < kj::min(HEAD_BODY_WORDS, uint(body.size())); j++) {
    first.words[1 + j] = body[j];
  }
  first.stamp = headStamp(position);
  position += lines;
}

void SessionPeer::expect(uint32_t firstWords, uint32_t words) {
  expected.push_back({ nextNumber++, firstWords, words });
}

uint SessionPeer::sendFds(Input& input) {
  if (input.below(8) > 0 || fdsAhead >= MAX_FDS_AHEAD) return 0;
  ++fdsAhead;
  uint count = 1 + input.below(2);
  int fds[2] = { socket.nothing, socket.nothing };
  ControlFrame frame([&](auto control) { control.setFds(count); });
  sendControl(frame, kj::arrayPtr(fds, count));
  return count;
}

void SessionPeer::sendInline(Input& input) {
  if (partsMissing > 0) return sendInParts(input);
  uint words = input.below(4) == 0 ? input.below(MAX_BODY_WORDS + 1) : input.below(21);
  if (!canSend(linesForBody(words))) return;
  uint64_t body[MAX_BODY_WORDS];
  fillSegment(nextNumber, body, words);
  uint fds = sendFds(input);
  publish({ DescriptorKind::MESSAGE, 0, uint16_t(words > 0), uint16_t(fds), uint16_t(words) },
      kj::arrayPtr(body, words));
  expect(words, words);
}

kj::Maybe<SessionPeer::Place> SessionPeer::allocate(Input& input, size_t words) {
  // From the bottom to the top, and again from the bottom when the victim has all behind it.
  auto& region = *regions[input.below(regions.size())];
  bool ringMayBeRead =
      region.holdsRing || victimsHeader().consumed.load() < region.ringUntil;
  // (The first region's data lies beyond its ring.)
  if (!region.mapped || region.retired || (ringMayBeRead && region.id > 0)) return nullptr;
  size_t bytes = (words * sizeof(word) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
  auto memory = region.memory.mapping.bytes();
  if (bytes > memory.size() - region.top) {
    if (region.lastAttempt == attempts || victimsHeader().consumed.load() < region.lastUse ||
        victimsHeader().freed.load() < handles) {
      return nullptr;
    }
    region.top = region.id == 0 ? DATA : 0;
    if (bytes > memory.size() - region.top) return nullptr;
  }
  size_t offset = region.top;
  region.top += bytes;
  region.zeroed = false;
  region.lastAttempt = attempts;
  lastData = reinterpret_cast<uint64_t*>(memory.begin() + offset);
  lastDataWords = words;
  return Place { &region, lastData, offset };
}

uint64_t SessionPeer::newHandle(Input& input) {
  if (!victimFrees || handles - victimsHeader().freed.load() >= 512 || input.takeFlag()) {
    return FREE_BY_CONSUMPTION;
  }
  return handles++;
}

void SessionPeer::sendByReference(Input& input, bool table) {
  if (partsMissing > 0) return sendInParts(input);
  if (!canSend(MAX_DESCRIPTOR_LINES)) return;
  ++attempts;
  uint inlineWords = input.takeFlag() ? 1 + input.below(12) : 0;
  uint count = 1 + (table ? input.below(60) : input.below(4));
  uint64_t body[MAX_BODY_WORDS];
  fillSegment(nextNumber, body, inlineWords);
  uint length = inlineWords;
  uint handleAt = length++;

  kj::Vector<Region*> used;
  uint64_t entries[64 * 2];
  uint total = 0, first = inlineWords;
  for (uint i = 0; i < count; i++) {
    uint words = input.below(8) == 0 ? input.below(400) : input.below(40);
    KJ_IF_MAYBE(place, allocate(input, kj::max(words, 1u))) {
      if (i == 0 && inlineWords == 0) {
        fillSegment(nextNumber, place->words, words);
        first = words;
      } else {
        for (uint j = 0; j < words; j++) place->words[j] = contents(nextNumber, j);
      }
      entries[2 * i] = SegmentEntry { place->region->id, words, 0 }.packFirst();
      entries[2 * i + 1] = place->offset;
      used.add(place->region);
      total += words;
    } else {
      return;
    }
  }
  if (total + inlineWords > LIMIT_WORDS) return;
  DescriptorHead head { table ? DescriptorKind::MESSAGE_TABLE : DescriptorKind::MESSAGE, 0,
      uint16_t(count + (inlineWords > 0)), 0, uint16_t(inlineWords) };
  if (table) {
    KJ_IF_MAYBE(place, allocate(input, count * 2)) {
      memcpy(place->words, entries, count * 2 * sizeof(uint64_t));
      body[length++] = SegmentEntry { place->region->id, count * 2, 0 }.packFirst();
      body[length++] = place->offset;
      used.add(place->region);
    } else {
      return;
    }
  } else {
    for (uint i = 0; i < 2 * count; i++) body[length++] = entries[i];
  }
  body[handleAt] = newHandle(input);
  head.fds = sendFds(input);
  publish(head, kj::arrayPtr(body, length));
  for (auto region: used) region->lastUse = position;
  expect(first, inlineWords + total);
}

void SessionPeer::sendInParts(Input& input) {
  if (!canSend(2)) return;
  ++attempts;
  uint64_t body[3] = { FREE_BY_CONSUMPTION };
  if (partsMissing == 0) {
    uint count = 1 + input.below(3);
    uint sizes[3];
    uint total = 0;
    for (uint i = 0; i < count; i++) total += sizes[i] = 1 + input.below(i == 0 ? 700 : 300);
    KJ_IF_MAYBE(place, allocate(input, count)) {
      for (uint i = 0; i < count; i++) place->words[i] = sizes[i];
      body[1] = SegmentEntry { place->region->id, count, 0 }.packFirst();
      body[2] = place->offset;
      uint fds = sendFds(input);
      publish({ DescriptorKind::BEGIN, 0, uint16_t(count), uint16_t(fds), 0 }, body);
      place->region->lastUse = position;
      expect(sizes[0], total);
      partsMissing = total;
      partsDone = 0;
    }
    return;
  }
  uint words = kj::min(partsMissing, 1 + input.below(512));
  KJ_IF_MAYBE(place, allocate(input, words)) {
    auto& message = expected.back();
    for (uint i = 0; i < words; i++) {
      uint64_t index = partsDone + i;
      place->words[i] = index == 0 ? uint64_t(message.firstWords - 1) << 32
                                   : contents(message.number, index);
    }
    body[1] = SegmentEntry { place->region->id, words, 0 }.packFirst();
    body[2] = place->offset;
    publish({ DescriptorKind::PART, 0, 0, 0, 0 }, body);
    place->region->lastUse = position;
    partsDone += words;
    partsMissing -= words;
  }
}

void SessionPeer::announce(Input& input) {
  if (!agreed || unanswered == MAX_UNANSWERED_REGIONS || regions.size() == MAX_REGIONS) return;
  auto region = kj::heap<Region>(regions.size(), REGION_BYTES << input.below(2));
  int fd = region->memory.fd;
  size_t bytes = region->memory.mapping.bytes().size();
  ControlFrame frame([&](protocol::Control::Builder control) {
    control.initRegion().setId(region->id);
    control.getRegion().setBytes(bytes);
  });
  ++unanswered;
  regions.add(kj::mv(region));
  sendControl(frame, kj::arrayPtr(&fd, 1));
}

void SessionPeer::jump(Input& input) {
  // The line in reserve serves for it.
  if (!agreed || ended || position + 1 > victimsHeader().consumed.load() +
      ring.size() / sizeof(DescriptorLine)) {
    return;
  }
  auto& region = *regions[input.below(regions.size())];
  size_t bytes = ring.size() * 2;
  auto memory = region.memory.mapping.bytes();
  if (!region.mapped || region.retired || !region.zeroed || bytes > memory.size()) return;
  size_t offset = memory.size() - bytes;
  uint64_t body[] = { SegmentEntry { region.id, uint32_t(bytes / sizeof(word)), 0 }.packFirst(),
                      offset };
  publish({ DescriptorKind::JUMP, 0, 0, 0, 0 }, body);
  for (auto& r: regions) {
    if (r->holdsRing) {
      r->lastUse = r->ringUntil = position;
      r->holdsRing = false;
    }
  }
  region.holdsRing = true;
  region.zeroed = false;
  ring = memory.slice(offset, memory.size());
}

void SessionPeer::retire(Input& input) {
  if (partsMissing > 0 || !canSend(1)) return;
  auto& region = *regions[input.below(regions.size())];
  if (region.id == 0 || !region.mapped || region.retired || region.holdsRing ||
      victimsHeader().consumed.load() < region.lastUse ||
      victimsHeader().freed.load() < handles) {
    return;
  }
  region.retired = true;
  uint64_t body[] = { region.id };
  publish({ DescriptorKind::RETIRE, 0, 0, 0, 0 }, body);
}

void SessionPeer::bell() {
  if (!agreed) return;
  uint64_t bell = ~uint64_t(0);
  if (!socket.send(kj::arrayPtr(&bell, 1).asBytes())) lied = true;
}

void SessionPeer::end() {
  if (!agreed || ended || partsMissing > 0) return;
  ended = true;
  ControlFrame frame([](auto control) { control.setEnd(); });
  sendControl(frame);
}

void SessionPeer::hangUp() {
  // Not what a correct peer does in the middle of a session, but it may die.
  lied = true;
  socket.endWriting();
}

void SessionPeer::sendControl(ControlFrame& frame, kj::ArrayPtr<const int> fds) {
  if (!socket.send(frame.bytes(), fds)) lied = true;
}

}  // namespace fuzz
}  // namespace capnpshm
