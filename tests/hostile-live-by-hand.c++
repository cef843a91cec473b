// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "handover.h"
#include "hostile-live-raw.h"
#include "tamper.h"

#include <capnp/rpc.capnp.h>
#include <capnp/serialize-async.h>
#include <capnp/serialize.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <kj/debug.h>

// Attacks by a peer that makes its own frames and lines.

namespace capnpshm {
namespace hostile {

namespace {

constexpr size_t TABLE = HostilePeer::DATA;
constexpr size_t END = REGION_BYTES;

void race(RawPeer& raw, uint milliseconds) {
  raw.upgrade();
  auto& peer = raw.peer;
  std::vector<Dish> dishes;
  bool quiet = raw.random() % 2 == 0;
  if (quiet) {
    dishes.push_back(serve(peer, capnp::AllocationStrategy::GROW_HEURISTICALLY, 1024, END, true));
  } else {
    // One segment, at the very end of the region; and several, with far pointers between them.
    dishes.push_back(serve(peer, capnp::AllocationStrategy::GROW_HEURISTICALLY, 1024, END));
    dishes.push_back(serve(peer, capnp::AllocationStrategy::FIXED_SIZE, 12, END - 4096));
    dishes.push_back(serve(peer, capnp::AllocationStrategy::FIXED_SIZE, 1, END - 8192));
  }

  Tamperer tamperer([&](Tamperer& t) {
    auto& dish = dishes[t.random() % dishes.size()];
    // The first few are looked at most often.
    size_t limit = t.random() % 2 == 0 ? std::min<size_t>(dish.pointers.size(), 4)
                                       : dish.pointers.size();
    auto& word = shared(peer, dish.pointers[t.random() % limit]);
    uint64_t before = word.load();
    uint64_t large = before | uint64_t(0xffff) << (t.random() % 2 == 0 ? 32 : 48);
    t.flip(word, t.random() % 2 == 0 ? large : damagedPointer(before, t.random), 200);
  }, raw.random());

  auto& timer = peer.io.provider->getTimer();
  for (auto end = timer.now() + milliseconds * kj::MILLISECONDS;
       raw.goOn() && timer.now() < end;) {
    for (uint i = 0; i < 8 && raw.hasRoom(); i++) {
      auto& dish = dishes[raw.random() % 4 % dishes.size()];
      std::vector<uint64_t> body { FREE_BY_CONSUMPTION };
      if (dish.segments <= 20) {
        peer.publish({ DescriptorKind::MESSAGE, 0, uint16_t(dish.segments), 0, 0 },
            body + dish.entries);
      } else {
        memcpy(&peer.word(TABLE), dish.entries.data(), dish.entries.size() * 8);
        peer.publish({ DescriptorKind::MESSAGE_TABLE, 0, uint16_t(dish.segments), 0, 0 },
            body + entry(0, dish.entries.size(), TABLE));
      }
    }
    raw.ring();
    raw.pause(0);
  }
  raw.deeds += tamperer.getDeeds();
}

void tables(RawPeer& raw, uint milliseconds) {
  raw.upgrade();
  auto& peer = raw.peer;
  auto dish = serve(peer, capnp::AllocationStrategy::FIXED_SIZE, 24, END);
  memcpy(&peer.word(TABLE), dish.entries.data(), dish.entries.size() * 8);
  // And one that comes in parts.
  auto whole = serve(peer, capnp::AllocationStrategy::GROW_HEURISTICALLY, 1024, END - 4096);
  size_t sizes = TABLE + 2048;
  uint32_t words = whole.entries[0] >> 32;
  peer.word(sizes) = words;
  peer.word(sizes + 8) = 0;

  Tamperer tamperer([&](Tamperer& t) {
    if (t.random() % 3 == 0) {
      t.flip(shared(peer, sizes + t.random() % 2 * 8), t.random() % 2 == 0
          ? uint64_t(1) << t.random() % 64 : words - t.random() % 4, 50);
    } else {
      size_t index = t.random() % dish.entries.size();
      uint64_t value;
      switch (t.random() % 5) {
        case 0: value = dish.entries[t.random() % dish.entries.size()]; break;
        case 1: value = ~uint64_t(0) - t.random() % 64; break;
        case 2: value = dish.entries[index] ^ uint64_t(1) << t.random() % 64; break;
        case 3: value = END - t.random() % 64; break;
        default: value = t.random(); break;
      }
      t.flip(shared(peer, TABLE + index * 8), value, 50);
    }
    // Now and then it is all right for a while.
    if (t.random() % 2 == 0) usleep(t.random() % 2000);
  }, raw.random());

  auto& timer = peer.io.provider->getTimer();
  for (auto end = timer.now() + milliseconds * kj::MILLISECONDS;
       raw.goOn() && timer.now() < end;) {
    if (raw.hasRoom()) {
      std::vector<uint64_t> body { FREE_BY_CONSUMPTION };
      if (raw.random() % 2 == 0) {
        peer.publish({ DescriptorKind::MESSAGE_TABLE, 0, uint16_t(dish.segments), 0, 0 },
            body + entry(0, dish.entries.size(), TABLE));
      } else {
        uint32_t first = 1 + raw.random() % (words - 1);
        size_t offset = whole.entries[1];
        peer.publish({ DescriptorKind::BEGIN, 0, 2, 0, 0 }, body + entry(0, 2, sizes));
        peer.publish({ DescriptorKind::PART, 0, 0, 0, 0 }, body + entry(0, first, offset));
        peer.publish({ DescriptorKind::PART, 0, 0, 0, 0 },
            body + entry(0, words - first, offset + first * 8));
      }
    }
    raw.ring();
    raw.pause(0);
  }
  raw.deeds += tamperer.getDeeds();
}

// Bells, file descriptors, silence -----------------------------------------------

void floodWithBells(RawPeer& raw, uint milliseconds) {
  raw.upgrade();
  std::vector<uint64_t> bells(8192, ~uint64_t(0));
  auto& timer = raw.peer.io.provider->getTimer();
  for (auto end = timer.now() + milliseconds * kj::MILLISECONDS;
       raw.goOn() && timer.now() < end;) {
    if (raw.hasRoom()) raw.peer.publishMessage();
    for (uint i = 0; i < 16; i++) {
      // As much as goes in, in whole words, or the next is no bell.
      ssize_t n = ::send(raw.socket(), bells.data(), bells.size() * 8,
          MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0) break;
      raw.deeds += n / 8;
      if (n % 8 != 0) {
        raw.peer.writeBytes(kj::arrayPtr(
            reinterpret_cast<kj::byte*>(bells.data()), 8 - n % 8));
      }
    }
    raw.pause(0);
  }
}

void ringNoBells(RawPeer& raw, uint milliseconds) {
  // The victim may not notice; then it sleeps.
  raw.upgrade();
  for (uint i = 0; i < milliseconds && raw.goOn(); i += 10) {
    if (raw.hasRoom()) {
      raw.peer.publishMessage();
      ++raw.deeds;
    }
    raw.pause(10);
  }
  if (raw.random() % 2 == 0) {
    raw.ring();
    raw.pause(20);
    raw.goOn();
  }
}

void floodWithFds(RawPeer& raw, uint) {
  raw.upgrade();
  // With as many as one frame can carry; and of kinds with which one could do harm.
  uint each = raw.random() % 2 == 0 ? 1 : 1 + raw.random() % 250;
  int number;
  KJ_SYSCALL(number = eventfd(0, EFD_CLOEXEC));
  kj::AutoCloseFd event(number);
  auto pipe = conformance::pipeWith("text");
  std::vector<int> fds;
  for (uint i = 0; i < each; i++) fds.push_back(i % 3 == 0 ? event.get() : pipe.get());
  uint records = 20 + raw.random() % 100;
  for (uint i = 0; i < records && raw.goOn(); i++) {
    raw.control([&](auto c) { c.setFds(raw.random() % 4 == 0 ? raw.random() : each); },
        kj::arrayPtr(fds.data(), fds.size()));
    raw.deeds += each;
    if (raw.random() % 2 == 0 && raw.hasRoom()) {
      capnp::MallocMessageBuilder message;
      message.initRoot<capnp::rpc::Message>().initObsoleteSave();
      auto segment = message.getSegmentsForOutput()[0];
      std::vector<uint64_t> body(segment.size());
      memcpy(body.data(), segment.begin(), segment.asBytes().size());
      raw.peer.publish({ DescriptorKind::MESSAGE, 0, 1, uint16_t(raw.random() % 4),
          uint16_t(body.size()) }, body);
      raw.ring();
    }
  }
  raw.pause(20);
}

void swallow(RawPeer& raw, uint milliseconds, bool read) {
  // Sends as long as there is room, and does not take what comes back, or does not free it.
  raw.upgrade();
  auto dish = serve(raw.peer, capnp::AllocationStrategy::GROW_HEURISTICALLY, 1024, END);
  for (uint i = 0; i < milliseconds && raw.goOn(read); i += 5) {
    for (uint j = 0; j < 8 && raw.hasRoom() && raw.deeds < 2000; j++) {
      std::vector<uint64_t> body { FREE_BY_CONSUMPTION };
      raw.peer.publish({ DescriptorKind::MESSAGE, 0, uint16_t(dish.segments), 0, 0 },
          body + dish.entries);
      ++raw.deeds;
    }
    raw.ring();
    raw.pause(5);
  }
}

void stopMidFrame(RawPeer& raw, uint milliseconds) {
  capnp::MallocMessageBuilder message;
  fillMessage(message, 1, false);
  auto flat = capnp::messageToFlatArray(message);
  auto bytes = flat.asBytes();
  switch (raw.random() % 4) {
    case 0: break;                       // Before anything else.
    case 1: raw.peer.offer(); break;     // Between offer and switch.
    case 2: raw.peer.agree(); break;     // Before `mapped`.
    case 3: raw.upgrade(); break;
  }
  raw.peer.writeBytes(bytes.slice(0, 1 + raw.random() % (bytes.size() - 1)));
  ++raw.deeds;
  raw.pause(milliseconds / 2);
}

void sendControls(RawPeer& raw, uint) {
  // Any control message, in any order, with fitting descriptors or others.
  if (raw.random() % 3 != 0) raw.upgrade();
  auto region = createRegion(REGION_BYTES);
  auto pipe = conformance::pipeWith("text");
  uint id = 1;
  for (uint i = 1 + raw.random() % 40; i > 0 && !raw.ended; i--) {
    bool right = raw.random() % 4 != 0;
    int fd = right ? region.fd.get() : pipe.get();
    raw.control([&](protocol::Control::Builder c) {
      switch (raw.random() % (right ? 24 : 11)) {
        case 0: {
          auto offer = c.initOffer();
          offer.setMinVersion(1);
          offer.setMaxVersion(raw.random() % 3);
          offer.setRegionBytes(REGION_BYTES);
          offer.setTrustsPeer(raw.random() % 2);
          break;
        }
        case 1: c.setMapped(); break;
        case 2: c.setDeclined("no"); break;
        case 3: c.setSwitch(); break;
        case 4: c.setRegionMapped(raw.random() % 3); break;
        case 5: c.setRegionRefused(raw.random() % 3); break;
        case 6: c.setFds(raw.random()); break;
        case 7: c.setBell(); break;
        case 8: c.setEnd(); break;
        case 9: c.setTaken(raw.random() % 3); break;
        default: {
          auto announced = c.initRegion();
          announced.setId(right ? id++ : raw.random());
          announced.setBytes(right ? REGION_BYTES : raw.random());
        }
      }
    }, kj::arrayPtr(&fd, 1));
    if (raw.victimsHeaderIsKnown()) raw.goOn();
  }
  raw.pause(10);
}

void abuseDescriptors(RawPeer& raw, uint milliseconds) {
  // As upgrade(), but we keep the victim's descriptor.
  auto& peer = raw.peer;
  peer.writeHeader();
  peer.offer();
  KJ_REQUIRE(peer.readControl() == protocol::Control::OFFER);
  peer.switchOver();
  kj::AutoCloseFd fds[1];
  auto message = capnp::readMessage(*peer.stream, fds).wait(peer.io.waitScope);
  KJ_REQUIRE(KJ_ASSERT_NONNULL(asControl(message.reader->getRoot<capnp::AnyPointer>())).isSwitch());
  size_t bytes = peer.victimsRegionBytes;
  peer.victimsRegion = mapPeerRegion(fds[0], bytes, bytes);
  KJ_REQUIRE(peer.readControl() == protocol::Control::MAPPED);
  peer.mapped();
  raw.listen();

  int victims = fds[0], own = peer.region.fd, socket = raw.socket();
  Tamperer tamperer([&](Tamperer& t) {
    auto& random = t.random;
    int fd = random() % 2 == 0 ? victims : own;
    int flags = fcntl(fd, F_GETFL);
    struct flock lock {};
    lock.l_type = F_WRLCK;
    bool changed = false;
    switch (random() % 16) {
      case 0: fcntl(fd, F_SETFL, flags ^ O_NONBLOCK); break;
      case 1: fcntl(fd, F_SETFL, flags ^ O_ASYNC); break;
      case 2: fcntl(fd, F_SETFL, flags ^ O_APPEND); break;
      case 3: fcntl(fd, F_SETFL, random()); break;
      case 4: fcntl(fd, F_SETOWN, getpid()); break;
      case 5: flock(fd, LOCK_EX | LOCK_NB); break;
      case 6: fcntl(fd, F_OFD_SETLK, &lock); break;
      case 7: fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE); break;
      case 8: lseek(fd, random() % bytes, SEEK_SET); break;
      case 9: fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) ^ O_ASYNC); break;
      // What must be impossible:
      case 10: case 11: case 12: case 13: case 14: changed = tryToChange(fd, random); break;
      case 15: {
        auto memory = raw.victimsMemory();
        changed = mprotect(memory.begin(), memory.size(), PROT_READ | PROT_WRITE) == 0;
        break;
      }
    }
    if (changed) raw.changed.store(true);
    t.rewrite(shared(peer, TABLE), 0);
  }, raw.random());
  auto& timer = peer.io.provider->getTimer();
  for (auto end = timer.now() + milliseconds * kj::MILLISECONDS;
       raw.goOn() && timer.now() < end;) {
    if (raw.hasRoom()) peer.publishMessage();
    raw.ring();
    raw.pause(1);
  }
  raw.deeds += tamperer.getDeeds();
}

}  // namespace

uint64_t attackByHand(LiveContext& context, Attack attack) {
  RawPeer raw(context, attack);
  uint milliseconds = 100 + raw.random() % 400;
  // That the victim ends it is as good an end as any.
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    switch (attack) {
      case Attack::RACE: race(raw, milliseconds); break;
      case Attack::TABLES: tables(raw, milliseconds); break;
      case Attack::BELL_FLOOD: floodWithBells(raw, milliseconds); break;
      case Attack::NO_BELLS: ringNoBells(raw, milliseconds); break;
      case Attack::FD_FLOOD: floodWithFds(raw, milliseconds); break;
      case Attack::NEVER_READS: swallow(raw, milliseconds, false); break;
      case Attack::NEVER_FREES: swallow(raw, milliseconds, true); break;
      case Attack::MID_FRAME: stopMidFrame(raw, milliseconds); break;
      case Attack::CONTROLS: sendControls(raw, milliseconds); break;
      case Attack::SEALED: attackWithSealed(raw, milliseconds); break;
      case Attack::FCNTL: abuseDescriptors(raw, milliseconds); break;
      default: KJ_FAIL_REQUIRE("not an attack by hand", uint(attack));
    }
  })) {
    if (exception->getType() != kj::Exception::Type::DISCONNECTED) {
      context.complaint = kj::str(attackName(attack), ": ", *exception);
    }
  }
  if (raw.changed.load()) {
    context.complaint = kj::str("a sealed region was changed by its receiver, or lost a seal");
  }
  return raw.deeds;
}

}  // namespace hostile
}  // namespace capnpshm
