// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-connection.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <capnp/rpc.capnp.h>
#include <capnp/serialize.h>

// What comes on the socket, as any bytes, as control messages in any order with any contents and
// any file descriptors, and both mixed: before, during and after the switch, against a connection
// of either side.

namespace capnpshm {
namespace fuzz {
namespace {

constexpr size_t REGION_BYTES = 16 << 10;
constexpr size_t RING = 1024;

struct Descriptors {
  // What may be sent, right and wrong.

  Descriptors() {
    int number;
    KJ_SYSCALL(number = memfd_create("unsealed", MFD_CLOEXEC));
    unsealed = kj::AutoCloseFd(number);
    KJ_SYSCALL(ftruncate(unsealed, REGION_BYTES));
    KJ_SYSCALL(number = memfd_create("holes", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    holes = kj::AutoCloseFd(number);
    KJ_SYSCALL(ftruncate(holes, REGION_BYTES));
    KJ_SYSCALL(fcntl(holes, F_ADD_SEALS,
        F_SEAL_SHRINK | F_SEAL_GROW | 0x10 /* F_SEAL_FUTURE_WRITE */ | F_SEAL_SEAL));
  }
  kj::AutoCloseFd unsealed, holes;
};

class ControlFuzzer {
public:
  ControlFuzzer(Socket& socket, Descriptors& descriptors, Input& input)
      : socket(socket), descriptors(descriptors), input(input), first(createRegion(REGION_BYTES)) {}

  void run() {
    uint flags = input.takeByte();
    SharedMemoryContext context;
    if (flags & 1) context.port = &socket.io.unixEventPort;
    context.options.trustPeer = flags & 2;
    context.options.firstRegionBytes = REGION_BYTES;
    context.options.maxBytes = 4 * REGION_BYTES;
    context.options.spinMicroseconds = 0;
    context.options.plainCalls = 1;
    context.options.requireSharedMemory = (flags & 12) == 12;
    Side side = flags & 16 ? Side::SERVER : Side::CLIENT;
    Victim victim(socket, context, side, flags & 32 ? 0 : 2);

    if (flags & 64) {
      // Begin after the switch.
      writeHeader();
      bool trust = flags & 128;
      socket.send(ControlFrame([&](auto c) { fillOffer(c, trust); }).bytes());
      socket.turn();  // A client switches now.
      int fd = first.fd;
      socket.send(ControlFrame([](auto c) { c.setSwitch(); }).bytes(), kj::arrayPtr(&fd, 1));
      socket.turn();  // And a server.
      send(ControlFrame([](auto c) { c.setMapped(); }));
      if (trust && context.options.trustPeer) send(ControlFrame([](auto c) { c.setBell(); }));
      socket.turn();
    }
    while (!input.isEmpty()) step(victim);
    socket.turn();
    victim.getStats();
  }

private:
  Socket& socket;
  Descriptors& descriptors;
  Input& input;
  OwnRegion first;
  uint64_t sent = 0;

  void writeHeader() {
    auto& h = *reinterpret_cast<RegionHeader*>(first.mapping.bytes().begin());
    h.version = PROTOCOL_VERSION;
    h.regionBytes = REGION_BYTES;
    h.freeOffset = sizeof(RegionHeader);
    h.freeEntries = 64;
    h.ringOffset = RING;
    h.ringLines = FIRST_RING_LINES;
    h.consumed = FIRST_RING_LINES;
    h.magic = REGION_MAGIC;
  }

  static void fillOffer(protocol::Control::Builder control, bool trust) {
    auto offer = control.initOffer();
    offer.setMinVersion(1);
    offer.setMaxVersion(1);
    offer.setNonce(1234);
    offer.setRegionBytes(REGION_BYTES);
    offer.setTrustsPeer(trust);
    offer.setMaxFdsPerMessage(2);
  }

  void send(ControlFrame&& frame) { socket.send(frame.bytes()); }

  void step(Victim& victim) {
    switch (input.below(16)) {
      case 0: {
        auto bytes = input.takeBytes(input.takeByte());
        sendWithFds(bytes);
        break;
      }
      case 1: {
        uint64_t bell = input.below(8) == 0 ? input.takeWord() : ~uint64_t(0);
        socket.send(kj::arrayPtr(&bell, 1).asBytes());
        break;
      }
      case 2: sendPlain(); break;
      case 3: victim.send(sent++, input.below(4096), input.below(256), input.takeFlag()); break;
      case 4: victim.hold(input.below(2 * Victim::MAX_HELD)); break;
      case 5: {
        // Rarely, as it costs a new pair of sockets.
        uint kind = input.takeByte();
        if (kind < 4) victim.shutdown();
        if (kind >= 252) socket.endWriting();
        if (kind == 251) socket.close();
        break;
      }
      case 6: writeHeader(); break;
      case 7: case 8: socket.turn(); break;
      case 9: {
        auto words = reinterpret_cast<SharedWord*>(first.mapping.bytes().begin());
        auto& word = words[input.below(RING / 8 + 16)];
        word = input.takeValue(word);
        break;
      }
      case 10: {
        // So that the victim's answers are not all in the buffer.
        byte space[4096];
        kj::Vector<kj::AutoCloseFd> fds;
        socket.receive(space, fds);
        break;
      }
      default: sendControl(); break;
    }
  }

  void sendControl() {
    uint kind = input.takeByte();
    ControlFrame frame([&](protocol::Control::Builder c) {
      switch (kind % 12) {
        case 0: fillOffer(c, kind & 128); break;
        case 1: c.setMapped(); break;
        case 2: {
          auto bytes = input.takeBytes(input.below(32));
          auto text = c.initDeclined(bytes.size());
          memcpy(text.begin(), bytes.begin(), bytes.size());
          break;
        }
        case 3: c.setSwitch(); break;
        case 4:
          c.initRegion().setId(input.below(8));
          c.getRegion().setBytes(kind & 64 ? input.takeValue(REGION_BYTES) : REGION_BYTES);
          break;
        case 5: c.setRegionMapped(input.below(8)); break;
        case 6: c.setRegionRefused(input.below(8)); break;
        case 7: c.setFds(input.below(4)); break;
        case 8: c.setBell(); break;
        case 9: c.setEnd(); break;
        case 10: c.getOffer(); break;
        case 11: c.setTaken(input.below(4)); break;
      }
    });
    if (input.below(4) == 0) frame.lie(input);
    auto bytes = frame.bytes();
    if (input.below(16) == 0) bytes = bytes.slice(0, input.below(bytes.size()));
    sendWithFds(bytes);
  }

  void sendPlain() {
    capnp::MallocMessageBuilder message(64);
    auto root = message.initRoot<capnp::rpc::Message>();
    switch (input.below(4)) {
      case 0: root.initBootstrap().setQuestionId(input.takeByte()); break;
      case 1: root.initAbort().setReason("abort"); break;
      case 2: root.initUnimplemented().initObsoleteSave(); break;
      case 3: {
        // As of a peer that does not know what we are.
        auto inner = root.initUnimplemented().initObsoleteSave().initAs<protocol::Control>();
        inner.setMagic(protocol::Control::MAGIC_VALUE);
        fillOffer(inner, false);
        break;
      }
    }
    auto words = capnp::messageToFlatArray(message);
    if (input.below(4) == 0) {
      auto& word = words[input.below(words.size())];
      uint64_t value = input.takeValue(0);
      memcpy(&word, &value, sizeof(value));
    }
    sendWithFds(words.asBytes());
  }

  void sendWithFds(kj::ArrayPtr<const byte> bytes) {
    int fds[4];
    uint count = 0;
    kj::Maybe<OwnRegion> fresh;
    kj::AutoCloseFd event;
    switch (input.below(12)) {
      case 0: case 1: fds[count++] = first.fd; break;
      case 2: fds[count++] = fresh.emplace(createRegion(REGION_BYTES)).fd; break;
      case 3: fds[count++] = fresh.emplace(createRegion(2 * REGION_BYTES)).fd; break;
      case 4: fds[count++] = descriptors.unsealed; break;
      case 5: fds[count++] = descriptors.holes; break;
      case 6:
        event = kj::AutoCloseFd(eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK));
        fds[count++] = event;
        break;
      case 7: for (; count < 4; count++) fds[count] = socket.nothing; break;
      case 8: fds[count++] = socket.nothing; break;
      default: break;
    }
    socket.send(bytes, kj::arrayPtr(fds, count));
  }
};

}  // namespace
}  // namespace fuzz
}  // namespace capnpshm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capnpshm::fuzz;
  static Socket socket;
  static Descriptors descriptors;
  Watch watch;
  Input input(data, size);
  socket.prepare();
  ControlFuzzer(socket, descriptors, input).run();
  checkConnections();
  return 0;
}
