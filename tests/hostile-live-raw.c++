// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-live-raw.h"

#include "handover.h"
#include <capnp/rpc.capnp.h>
#include <capnp/serialize.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace hostile {

RawPeer::RawPeer(LiveContext& context, Attack attack): peer(context.io), random(context.seed) {
  auto end = kj::mv(peer.victimsEnd);
  process::handOver(context.handover, uint(attack), KJ_ASSERT_NONNULL(end->getFd()));
}

void RawPeer::upgrade() {
  peer.upgrade();
  listen();
}

void RawPeer::listen() {
  victimsRing = kj::heap<DescriptorConsumer>(kj::arrayPtr(
      reinterpret_cast<const DescriptorLine*>(
          victimsMemory().begin() + victimsHeader().ringOffset.load()), FIRST_RING_LINES));
  answering = answer().eagerlyEvaluate([this](kj::Exception&&) { ended = true; });
}

bool RawPeer::goOn(bool consume) {
  if (consume) takeAll();
  peer.io.waitScope.poll();
  return !ended;
}

void RawPeer::pause(uint milliseconds) {
  peer.io.provider->getTimer().afterDelay(milliseconds * kj::MILLISECONDS)
      .wait(peer.io.waitScope);
}

bool RawPeer::hasRoom() {
  return peer.position + MAX_DESCRIPTOR_LINES <
      victimsHeader().consumed.load() + FIRST_RING_LINES;
}

void RawPeer::ring() {
  if ((victimsHeader().sleepWord.load() & WANT_DATA) != 0) trySend(~uint64_t(0));
}

bool RawPeer::trySend(uint64_t word) {
  return ::send(socket(), &word, sizeof(word), MSG_DONTWAIT | MSG_NOSIGNAL) == sizeof(word);
}

const RegionHeader& RawPeer::victimsHeader() {
  return *reinterpret_cast<const RegionHeader*>(victimsMemory().begin());
}

kj::ArrayPtr<byte> RawPeer::victimsMemory() {
  return KJ_ASSERT_NONNULL(peer.victimsRegion).bytes();
}

void RawPeer::takeAll() {
  Descriptor descriptor;
  while (victimsRing->tryTake(descriptor)) {}
  peer.header().consumed.store(victimsRing->getPosition());
}

kj::Promise<void> RawPeer::answer() {
  // Refuses each further region: so the victim has one ring, and goes on with what it has.
  return peer.stream->read(received, 8).then([this]() -> kj::Promise<void> {
    if (received[0] == ~uint64_t(0)) return answer();
    size_t words = received[0] >> 32;
    KJ_REQUIRE(words <= 64);
    return peer.stream->read(received, words * 8).then([this, words]() {
      auto segment = kj::arrayPtr(reinterpret_cast<const capnp::word*>(received), words);
      capnp::SegmentArrayMessageReader reader(kj::arrayPtr(&segment, 1));
      KJ_IF_MAYBE(control, asControl(reader.getRoot<capnp::AnyPointer>())) {
        if (control->isRegion()) refuse(control->getRegion().getId());
      }
      return answer();
    });
  });
}

void RawPeer::refuse(uint id) {
  ControlMessage message;
  message.get().setRegionRefused(id);
  auto flat = capnp::messageToFlatArray(message.getMessage());
  // Small, and if the victim does not read it, then it does not want it.
  ::send(socket(), flat.begin(), flat.asBytes().size(), MSG_DONTWAIT | MSG_NOSIGNAL);
}

// Files ------------------------------------------------------------------------

namespace {

bool tryToWrite(int fd, size_t bytes) {
  char word[8] = {};
  if (pwrite(fd, word, sizeof(word), 8) > 0) return true;
  void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map != MAP_FAILED) munmap(map, bytes);
  return map != MAP_FAILED;
}

}  // namespace

bool tryToChange(int fd, std::mt19937_64& random) {
  struct stat stats;
  KJ_SYSCALL(fstat(fd, &stats));
  size_t bytes = stats.st_size;
  switch (random() % 6) {
    case 0: return tryToWrite(fd, bytes);
    case 1: return ftruncate(fd, bytes / 2) == 0 || ftruncate(fd, 0) == 0;
    case 2: return ftruncate(fd, 2 * bytes) == 0;
    case 3: return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, bytes) == 0;
    case 4: return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, bytes) == 0;
    default: {
      // By another descriptor of the same file.
      int again = open(kj::str("/proc/self/fd/", fd).cStr(), O_RDWR | O_CLOEXEC);
      if (again < 0) return false;
      kj::AutoCloseFd own(again);
      return tryToWrite(own, bytes);
    }
  }
}

// Payload ----------------------------------------------------------------------

namespace {

void fillDish(capnp::AnyPointer::Builder pointer, uint depth) {
  auto root = pointer.initAsAnyStruct(1, 5);
  auto pointers = root.getPointerSection();
  pointers[0].setAs<capnp::Text>("a text");
  auto list = pointers[1].initAsListOfAnyStruct(2, 1, 3);
  for (uint i = 0; i < list.size(); i++) {
    auto section = capnp::AnyStruct::Builder(list[i]).getPointerSection();
    section[0].initAs<capnp::Data>(20);
  }
  auto numbers = pointers[2].initAs<capnp::List<uint32_t>>(5);
  numbers.set(1, 7);
  auto texts = pointers[3].initAs<capnp::List<capnp::Text>>(2);
  texts.set(0, "one");
  if (depth > 0) fillDish(pointers[4], depth - 1);
}

}  // namespace

void fillMessage(capnp::MessageBuilder& message, uint depth, bool quiet) {
  auto root = message.initRoot<capnp::rpc::Message>();
  if (quiet) {
    auto resolve = root.initUnimplemented().initResolve();
    resolve.initException();
    // In place of the exception.
    auto any = capnp::toAny(resolve);
    fillDish(any.getPointerSection()[0], depth);
  } else {
    fillDish(root.initObsoleteSave(), depth);
  }
}

Dish serve(HostilePeer& peer, capnp::AllocationStrategy strategy, uint firstWords, size_t end,
           bool quiet) {
  capnp::MallocMessageBuilder message(firstWords, strategy);
  fillMessage(message, 1, quiet);
  auto segments = message.getSegmentsForOutput();
  Dish result;
  size_t words = 0;
  for (auto& segment: segments) words += segment.size();
  size_t offset = end - words * 8;
  for (auto& segment: segments) {
    memcpy(peer.memory().begin() + offset, segment.begin(), segment.asBytes().size());
    result.entries = result.entries + entry(0, segment.size(), offset);
    // The first words of a quiet one are what keeps it quiet.
    for (size_t i = quiet ? QUIET_WORDS : 0; i < segment.size(); i++) {
      if (peer.word(offset + i * 8) != 0) result.pointers.push_back(offset + i * 8);
    }
    offset += segment.size() * 8;
    ++result.segments;
  }
  return result;
}

}  // namespace hostile
}  // namespace capnpshm
