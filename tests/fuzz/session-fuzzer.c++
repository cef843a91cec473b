// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-connection.h"
#include "session-peer.h"

// Whole sessions: a correct peer, played here, which does what the fuzzer says, and now and then
// changes one word of what it has written. As long as it has not, everything must arrive, in order,
// both ways, and the end must be a clean one.

namespace capnpshm {
namespace fuzz {
namespace {

class CheckingVictim final: public Victim {
public:
  CheckingVictim(Socket& socket, const SharedMemoryContext& context, SessionPeer& peer)
      : Victim(socket, context, Side::SERVER, 2), peer(peer) {}

private:
  SessionPeer& peer;

  void received(capnp::IncomingRpcMessage& message) override { peer.wasReceived(message); }
};

void step(Socket& socket, SessionPeer& peer, Victim& victim, Input& input, uint64_t& sent) {
  switch (input.below(32)) {
    case 0: case 1: case 2: case 3: case 4: peer.sendInline(input); break;
    case 5: case 6: case 7: case 8: peer.sendByReference(input, false); break;
    case 9: peer.sendByReference(input, true); break;
    case 10: case 11: peer.sendInParts(input); break;
    case 12: peer.announce(input); break;
    case 13: peer.jump(input); break;
    case 14: peer.retire(input); break;
    case 15: peer.readSocket(input.below(8) != 0); break;
    case 16: case 17: peer.take(1 + input.below(8)); break;
    case 18: peer.giveBack(input); break;
    case 19: peer.bell(); break;
    case 20: peer.sleep(input); break;
    case 21: case 22: case 23:
      if (victim.isShutDown()) break;
      victim.send(sent++, input.below(4) == 0 ? input.below(12000) : input.below(300),
          input.below(4) == 0 ? input.below(600) : 0, input.below(8) == 0);
      break;
    case 24: victim.hold(input.below(2 * Victim::MAX_HELD)); break;
    case 25: victim.drop(input.below(Victim::MAX_HELD)); break;
    case 26: case 27: socket.turn(); break;
    case 28: case 29: case 30: peer.lie(input); break;
    case 31: {
      // Rarely, as it costs a new pair of sockets.
      uint kind = input.takeByte();
      if (kind < 8) peer.end();
      if (kind == 8) victim.shutdown();
      if (kind == 9) peer.hangUp();
      break;
    }
  }
}

void run(Socket& socket, Input& input) {
  SharedMemoryContext context;
  uint flags = input.takeByte();
  if (flags & 1) context.port = &socket.io.unixEventPort;
  context.options.trustPeer = flags & 2;
  context.options.firstRegionBytes = SessionPeer::REGION_BYTES;
  context.options.maxBytes = flags & 4 ? 3 * SessionPeer::REGION_BYTES : 256 << 10;
  context.options.spinMicroseconds = 0;
  context.options.plainCalls = 1;

  SessionPeer peer(socket);
  CheckingVictim victim(socket, context, peer);
  peer.setUp(context.options.trustPeer, flags & 8, (flags >> 4) % 4, input);
  uint64_t sent = 0;
  while (!input.isEmpty()) step(socket, peer, victim, input, sent);
  socket.turn();
  if (!peer.hasLied()) {
    FUZZ_CHECK(!victim.hasFailed(), "a correct peer was refused: ", victim.getFailure());
    peer.finish(sent, [&](uint place) { victim.drop(place); });
    FUZZ_CHECK(victim.hasEnded() && !victim.hasFailed(), "the end is not a clean one; ",
        victim.getFailure());
  }
  victim.getStats();
}

}  // namespace
}  // namespace fuzz
}  // namespace capnpshm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capnpshm::fuzz;
  static Socket socket;
  Watch watch;
  Input input(data, size);
  socket.prepare();
  run(socket, input);
  checkConnections();
  return 0;
}
