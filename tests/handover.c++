// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "handover.h"

#include "process-fixture.h"
#include <string.h>
#include <sys/socket.h>
#include <kj/debug.h>

namespace capnpshm {
namespace process {

void handOver(int socket, uint64_t tag, int fd) {
  iovec vector { &tag, sizeof(tag) };
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr header {};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  auto c = CMSG_FIRSTHDR(&header);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(c), &fd, sizeof(int));
  ssize_t n;
  KJ_SYSCALL(n = sendmsg(socket, &header, MSG_NOSIGNAL));
  KJ_REQUIRE(n == sizeof(tag));
}

kj::AutoCloseFd handOverNewPair(int socket, uint64_t tag) {
  auto pair = newSocketPair();
  handOver(socket, tag, pair.peers);
  return kj::mv(pair.mine);
}

Handover::Handover(kj::AsyncIoContext& io, kj::AutoCloseFd socket)
    : io(io), stream(wrapSocket(io, kj::mv(socket))) {}

kj::Promise<kj::Maybe<Handover::Connection>> Handover::next() {
  struct Record {
    uint64_t tag;
    kj::AutoCloseFd fd;
  };
  auto record = kj::heap<Record>();
  auto reading = stream->tryReadWithFds(
      &record->tag, sizeof(record->tag), sizeof(record->tag), &record->fd, 1);
  return reading.then([this, record = kj::mv(record)]
      (kj::AsyncCapabilityStream::ReadResult n) mutable -> kj::Maybe<Connection> {
    if (n.byteCount == 0) return nullptr;
    KJ_REQUIRE(n.byteCount == sizeof(record->tag) && n.capCount == 1, n.byteCount, n.capCount);
    return Connection { record->tag, wrapSocket(io, kj::mv(record->fd)) };
  });
}

}  // namespace process
}  // namespace capnpshm
