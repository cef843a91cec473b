// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "peers.h"
#include "server.h"

#include <kj/debug.h>
#include <string.h>
#include <zmq.h>

namespace capnpshm {
namespace bench {

namespace {

struct Header {
  // The first part of every message; the payload is the second.
  enum Method: uint32_t { ECHO, PUT, GET };
  Method method;
  uint32_t readAndWrite;
  uint64_t number;  // Echoed; the payload's size; its sum.
};

void check(int result, const char* what) {
  if (result == -1) KJ_FAIL_REQUIRE(what, zmq_strerror(zmq_errno()));
}

class Part {
  // One part of a message. Payloads are written and read where it lies.

public:
  explicit Part(size_t size = 0) { check(zmq_msg_init_size(&message, size), "zmq_msg_init_size"); }
  ~Part() noexcept(false) { zmq_msg_close(&message); }
  KJ_DISALLOW_COPY(Part);

  kj::ArrayPtr<kj::byte> bytes() {
    return kj::arrayPtr(reinterpret_cast<kj::byte*>(zmq_msg_data(&message)),
        zmq_msg_size(&message));
  }
  void send(void* socket, int flags) {
    check(zmq_msg_send(&message, socket, flags), "zmq_msg_send");
  }
  void receive(void* socket) { check(zmq_msg_recv(&message, socket, 0), "zmq_msg_recv"); }

private:
  zmq_msg_t message;
};

class Socket {
public:
  Socket(int type): context(zmq_ctx_new()), socket(zmq_socket(context, type)) {
    KJ_REQUIRE(socket != nullptr, zmq_strerror(zmq_errno()));
    int linger = 0;
    check(zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof(linger)), "zmq_setsockopt");
  }
  ~Socket() noexcept(false) {
    zmq_close(socket);
    zmq_ctx_term(context);
  }
  KJ_DISALLOW_COPY(Socket);

  void* get() { return socket; }

  void send(const Header& header, Part& payload) {
    check(zmq_send(socket, &header, sizeof(header), ZMQ_SNDMORE), "zmq_send");
    payload.send(socket, 0);
  }
  Header receive(Part& payload) {
    Header header;
    int size = zmq_recv(socket, &header, sizeof(header), 0);
    check(size, "zmq_recv");
    KJ_REQUIRE(size == sizeof(header));
    payload.receive(socket);
    return header;
  }

private:
  void* context;
  void* socket;
};

void zero(Part& part) {
  // As the other transports do. An empty part may have no memory.
  if (part.bytes().size() > 0) memset(part.bytes().begin(), 0, part.bytes().size());
}

kj::String urlOf(kj::StringPtr address) { return kj::str("ipc://@", address); }

class ZeroMqPeer final: public Peer {
public:
  explicit ZeroMqPeer(kj::StringPtr address): socket(ZMQ_REQ) {
    check(zmq_connect(socket.get(), urlOf(address).cStr()), "zmq_connect");
  }

  void echo() override {
    Part nothing, reply;
    socket.send({ Header::ECHO, 0, 1 }, nothing);
    KJ_REQUIRE(socket.receive(reply).number == 1);
  }

  void put(uint64_t bytes, bool readAndWrite) override {
    Part payload(bytes), reply;
    zero(payload);
    uint64_t sum = readAndWrite ? writeAll(payload.bytes()) : 0;
    socket.send({ Header::PUT, readAndWrite, 0 }, payload);
    KJ_REQUIRE(socket.receive(reply).number == sum, "the payload arrived changed");
  }

  void get(uint64_t bytes, bool readAndWrite) override {
    Part nothing, payload;
    socket.send({ Header::GET, readAndWrite, bytes }, nothing);
    auto header = socket.receive(payload);
    KJ_REQUIRE(payload.bytes().size() == bytes);
    KJ_REQUIRE(!readAndWrite || header.number == sumOf(payload.bytes()),
        "the payload arrived changed");
  }

private:
  Socket socket;
};

}  // namespace

kj::Own<Peer> newZeroMqPeer(kj::StringPtr address) { return kj::heap<ZeroMqPeer>(address); }

void serveZeroMq(kj::StringPtr address) {
  Socket socket(ZMQ_REP);
  check(zmq_bind(socket.get(), urlOf(address).cStr()), "zmq_bind");
  for (;;) {
    Part request;
    auto header = socket.receive(request);
    bool readAndWrite = header.readAndWrite;
    if (header.method == Header::PUT) {
      header.number = readAndWrite ? sumOf(request.bytes()) : 0;
    }
    Part reply(header.method == Header::GET ? header.number : 0);
    zero(reply);
    if (header.method == Header::GET && readAndWrite) header.number = writeAll(reply.bytes());
    socket.send(header, reply);
  }
}

}  // namespace bench
}  // namespace capnpshm
