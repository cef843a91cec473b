// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The other process of the tests between processes.

#include "peer-program.h"
#include "process-limits.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

namespace capnpshm {
namespace process {
namespace {

using conformance::End;
using conformance::LinkOptions;
using conformance::Root;
using conformance::RootImpl;
using conformance::ServerState;
using kj::uint;

class Peer {
  // One end of a connection, as the command line wants it.

public:
  explicit Peer(Side side): io(kj::setupAsyncIo()) {
    EndMode mode { isSet("twoParty") ? EndMode::TWO_PARTY : EndMode::CONTEXT,
                   side, isSet("trust"), isSet("port"), isSet("small"), false,
                   !isSet("noSpin") };
    LinkOptions options;
    options.maxFds = numberOf("maxFds");
    end = kj::heap<End>(mode, io.unixEventPort,
        wrapSocket(io, kj::AutoCloseFd(SOCKET_FD)), options);
    deny("deny");
  }

  void deny(const char* key) {
    auto what = argument(key);
    if (!what.empty()) process::deny(what.c_str());
  }

  void pause() { io.provider->getTimer().afterDelay(1 * kj::MILLISECONDS).wait(io.waitScope); }

  void awaitTransport() {
    // Until what we send goes the way that it will go for good.
    if (isSet("twoParty")) return;
    while (KJ_ASSERT_NONNULL(end->network.getStats()).outgoing.transport == Transport::STARTING) {
      pause();
    }
  }

  void flush() {
    while (end->network.getCurrentQueueCount() > 0) pause();
  }

  kj::String transport() {
    KJ_IF_MAYBE(stats, end->network.getStats()) {
      return kj::str(int(stats->outgoing.transport), ' ', int(stats->incoming.transport), ' ',
          stats->outgoing.plainReason);
    }
    return kj::str("TwoParty");
  }

  void awaitProceed() {
    // With the event loop running.
    for (;;) {
      pollfd waiting { REPORT_FD, POLLIN, 0 };
      if (poll(&waiting, 1, 0) == 1) break;
      pause();
    }
    process::awaitProceed();
  }

  kj::AsyncIoContext io;
  kj::Own<End> end;
  kj::Own<Connection> connection;
};

int serve() {
  // A server of the conformance suite, for one client.
  Peer peer(Side::SERVER);
  ServerState state;
  peer.end->start(capnp::Capability::Client(kj::heap<RootImpl>(state)));
  report("ready");
  peer.end->network.onDisconnect().wait(peer.io.waitScope);
  report(peer.transport());
  return 0;
}

int call() {
  // A client that makes calls of all kinds, once.
  Peer peer(Side::CLIENT);
  peer.end->start(nullptr);
  runWorkload(peer.end->root(), peer.io.waitScope);
  report(peer.transport());
  return 0;
}

int load() {
  // A client that makes calls as fast as it can, until it is killed.
  Peer peer(Side::CLIENT);
  peer.end->start(nullptr);
  auto root = peer.end->root();
  ServerState mine;
  auto slow = root.slowRequest();
  slow.setItem(kj::heap<conformance::ItemImpl>(mine, "held"));
  auto pending = slow.send();
  for (uint round = 0;; round++) {
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = 0; i < 20; i++) {
      auto request = root.echoRequest();
      request.setData(conformance::pattern(i % 5 == 4 ? 40000 : i * 20, i));
      calls.add(request.send().ignoreResult());
    }
    kj::joinPromises(calls.releaseAsArray()).wait(peer.io.waitScope);
    if (round == 0) report("started");
  }
}

kj::Promise<void> askAgainAndAgain(Root::Client& root) {
  auto request = root.fillRequest();
  request.setBytes(65536);
  return request.send().ignoreResult().then([&root]() { return askAgainAndAgain(root); });
}

int ask() {
  // A client that asks for much, and for as much again as soon as it gets it, until it is stopped.
  Peer peer(Side::CLIENT);
  peer.end->start(nullptr);
  auto root = peer.end->root();
  root.sequenceRequest().send().wait(peer.io.waitScope);
  peer.awaitTransport();
  kj::Vector<kj::Promise<void>> calls;
  for (uint i = 0; i < numberOf("count"); i++) calls.add(askAgainAndAgain(root));
  kj::joinPromises(calls.releaseAsArray()).wait(peer.io.waitScope);
  return 1;
}

kj::Promise<uint64_t> receiveAll(Connection& connection, uint64_t count = 0) {
  return connection.receiveIncomingMessage().then(
      [&connection, count](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message)
          -> kj::Promise<uint64_t> {
    KJ_IF_MAYBE(m, message) {
      KJ_REQUIRE(readNumbered(**m) == count, "out of order");
      return receiveAll(connection, count + 1);
    }
    return count;
  });
}

int send() {
  // Sends numbered messages, and receives what comes.
  Peer peer(Side::CLIENT);
  auto connection = peer.end->connect();
  sendNumbered(*connection, 0, 100);
  auto received = receiveAll(*connection).fork();
  auto receiving = received.addBranch().ignoreResult()
      .eagerlyEvaluate([](kj::Exception&&) {});
  peer.awaitTransport();
  uint64_t count = numberOf("count");
  for (uint64_t i = 1; count == 0 || i <= count; i++) {
    sendNumbered(*connection, i, numberedBytes(i));
    if (i % 8 == 0 || i == count) {
      peer.io.waitScope.poll();
      if (count == 0) {
        // As much ahead as it likes, but not without end.
        while (peer.end->network.getCurrentQueueCount() > 100) peer.pause();
      } else if (i == count) {
        peer.flush();
      }
      if (peer.end->network.getCurrentQueueCount() == 0) progress()[FLUSHED].store(i);
    }
  }
  auto then = argument("then", "wait");
  if (then == "exit") {
    // At once: nothing is shut down, nothing destroyed.
    _exit(0);
  } else if (then == "return") {
    return 0;
  } else if (then == "close") {
    connection->shutdown().wait(peer.io.waitScope);
    report(kj::str(received.addBranch().wait(peer.io.waitScope)));
    return 0;
  }
  report("sent");
  kj::Promise<void>(kj::NEVER_DONE).wait(peer.io.waitScope);
  KJ_UNREACHABLE;
}

int hold() {
  // Receives nothing until it is told to, then everything.
  Peer peer(Side::CLIENT);
  auto connection = peer.end->connect();
  sendNumbered(*connection, 0, 100);
  auto first = KJ_ASSERT_NONNULL(
      connection->receiveIncomingMessage().wait(peer.io.waitScope));
  KJ_REQUIRE(readNumbered(*first) == 0);
  first = nullptr;
  report("holding");
  peer.awaitProceed();
  report(kj::str(receiveAll(*connection, 1).wait(peer.io.waitScope)));
  return 0;
}

// =======================================================================================

bool readWord(int socket, kj::byte* buffer, std::vector<int>& fds) {
  // Eight bytes: then the file descriptors go on at the very byte at which they came, since frames
  // are whole words and have theirs at the beginning.
  for (size_t filled = 0; filled < 8;) {
    iovec vector { buffer + filled, 8 - filled };
    alignas(cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))];
    msghdr header {};
    header.msg_iov = &vector;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    ssize_t n = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    if (n <= 0) return false;
    filled += n;
    for (auto c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      auto begin = reinterpret_cast<int*>(CMSG_DATA(c));
      size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      fds.insert(fds.end(), begin, begin + count);
    }
  }
  return true;
}

void writeWord(int socket, kj::byte* buffer, kj::ArrayPtr<const int> fds) {
  iovec vector { buffer, 8 };
  alignas(cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))];
  msghdr header {};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  if (fds.size() > 0) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    auto c = CMSG_FIRSTHDR(&header);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    memcpy(CMSG_DATA(c), fds.begin(), fds.size() * sizeof(int));
  }
  // A blocking socket takes all of so few bytes or fails.
  sendmsg(socket, &header, MSG_NOSIGNAL);
}

int proxy() {
  // Carries bytes and, unless told otherwise, file descriptors between two sockets, and counts the
  // bytes before the other side can have them.
  const bool strip[] = { isSet("strip"), isSet("strip") || isSet("stripBackwards") };
  int sockets[2] = { SOCKET_FD, SOCKET_FD + 1 };
  for (int socket: sockets) {
    // The other end's being non-blocking is a property of its own file description.
    KJ_SYSCALL(fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) & ~O_NONBLOCK));
  }
  pollfd ends[2] = { { sockets[0], POLLIN, 0 }, { sockets[1], POLLIN, 0 } };
  report("ready");
  while (ends[0].fd >= 0 || ends[1].fd >= 0) {
    KJ_SYSCALL(poll(ends, 2, -1));
    for (uint i = 0; i < 2; i++) {
      if (ends[i].fd < 0 || ends[i].revents == 0) continue;
      kj::byte buffer[8];
      std::vector<int> fds;
      if (readWord(sockets[i], buffer, fds)) {
        progress()[i == 0 ? FORWARD_BYTES : BACKWARD_BYTES] += 8;
        writeWord(sockets[1 - i], buffer,
            kj::arrayPtr(fds.data(), strip[i] ? 0 : fds.size()));
      } else {
        ends[i].fd = -1;
        ::shutdown(sockets[1 - i], SHUT_WR);
      }
      for (int fd: fds) close(fd);
    }
  }
  return 0;
}

int run(const std::string& role) {
  if (role == "serve") return serve();
  if (role == "call") return call();
  if (role == "load") return load();
  if (role == "ask") return ask();
  if (role == "send") return send();
  if (role == "hold") return hold();
  if (role == "proxy") return proxy();
  KJ_FAIL_REQUIRE("unknown role", role.c_str());
}

}  // namespace
}  // namespace process
}  // namespace capnpshm

int main(int argc, char** argv) {
  return capnpshm::process::runProgram(argc, argv, &capnpshm::process::run);
}
