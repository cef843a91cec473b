// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "peers.h"

#include "client.h"
#include <kj/debug.h>

namespace capnpshm {
namespace bench {

namespace {

struct Entry {
  kj::StringPtr name;
  kj::Own<Peer> (*client)(kj::StringPtr address);
  void (*server)(kj::StringPtr address);
};

// The first entry is none: there may be no others.
const Entry PEERS[] = {
  { "", nullptr, nullptr },
#if CAPNP_SHM_BENCH_GRPC
  { "grpc", &newGrpcPeer, &serveGrpc },
#endif
#if CAPNP_SHM_BENCH_ZEROMQ
  { "zeromq", &newZeroMqPeer, &serveZeroMq },
#endif
};

const Entry& find(kj::StringPtr name) {
  for (auto& peer: PEERS) {
    if (peer.name == name) return peer;
  }
  KJ_FAIL_REQUIRE("this was built without the library", name);
}

}  // namespace

bool hasPeer(kj::StringPtr name) {
  for (auto& peer: PEERS) {
    if (peer.name == name) return true;
  }
  return false;
}

kj::Own<Peer> newPeer(kj::StringPtr name, kj::StringPtr address) {
  return find(name).client(address);
}

void servePeer(kj::StringPtr name, kj::StringPtr address) { find(name).server(address); }

void peerCall(Session& session, Task::Reader task, Figures& figures) {
  auto& peer = session.peer();
  kj::StringPtr name = task.getCase();
  uint64_t bytes = task.getPayloadBytes();
  bool readAndWrite = name.endsWith("_rw");
  Slice slice(session, task);
  slice.run([&]() {
    if (name.startsWith("param")) {
      peer.put(bytes, readAndWrite);
    } else if (name.startsWith("result")) {
      peer.get(bytes, readAndWrite);
    } else {
      peer.echo();
    }
  });
  slice.report(figures);
  if (bytes > 0) slice.reportRate(figures, bytes);
}

}  // namespace bench
}  // namespace capnpshm
