// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "peers.h"
#include "server.h"

#include "peer.grpc.pb.h"
#include <grpcpp/grpcpp.h>
#include <kj/debug.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr int UNLIMITED = -1;

kj::ArrayPtr<kj::byte> bytesOf(std::string& data) {
  return kj::arrayPtr(reinterpret_cast<kj::byte*>(&data[0]), data.size());
}
kj::ArrayPtr<const kj::byte> bytesOf(const std::string& data) {
  return kj::arrayPtr(reinterpret_cast<const kj::byte*>(data.data()), data.size());
}

class GrpcTarget final: public grpcpeer::Target::Service {
public:
  grpc::Status Echo(grpc::ServerContext*, const grpcpeer::Number* request,
                    grpcpeer::Number* reply) override {
    reply->set_number(request->number());
    return grpc::Status::OK;
  }
  grpc::Status Put(grpc::ServerContext*, const grpcpeer::Payload* request,
                   grpcpeer::Number* reply) override {
    reply->set_number(request->read() ? sumOf(bytesOf(request->data())) : 0);
    return grpc::Status::OK;
  }
  grpc::Status Get(grpc::ServerContext*, const grpcpeer::Wanted* request,
                   grpcpeer::Payload* reply) override {
    auto& data = *reply->mutable_data();
    data.resize(request->bytes());
    if (request->write()) reply->set_sum(writeAll(bytesOf(data)));
    return grpc::Status::OK;
  }
};

std::string urlOf(kj::StringPtr address) { return kj::str("unix-abstract:", address).cStr(); }

class GrpcPeer final: public Peer {
public:
  explicit GrpcPeer(kj::StringPtr address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(UNLIMITED);
    arguments.SetMaxSendMessageSize(UNLIMITED);
    stub = grpcpeer::Target::NewStub(grpc::CreateCustomChannel(
        urlOf(address), grpc::InsecureChannelCredentials(), arguments));
  }

  void echo() override {
    grpcpeer::Number request, reply;
    request.set_number(1);
    call([&](grpc::ClientContext& context) { return stub->Echo(&context, request, &reply); });
    KJ_REQUIRE(reply.number() == 1);
  }

  void put(uint64_t bytes, bool readAndWrite) override {
    grpcpeer::Payload request;
    grpcpeer::Number reply;
    auto& data = *request.mutable_data();
    data.resize(bytes);
    uint64_t sum = readAndWrite ? writeAll(bytesOf(data)) : 0;
    request.set_read(readAndWrite);
    call([&](grpc::ClientContext& context) { return stub->Put(&context, request, &reply); });
    KJ_REQUIRE(reply.number() == sum, "the payload arrived changed");
  }

  void get(uint64_t bytes, bool readAndWrite) override {
    grpcpeer::Wanted request;
    grpcpeer::Payload reply;
    request.set_bytes(bytes);
    request.set_write(readAndWrite);
    call([&](grpc::ClientContext& context) { return stub->Get(&context, request, &reply); });
    KJ_REQUIRE(reply.data().size() == bytes);
    KJ_REQUIRE(!readAndWrite || sumOf(bytesOf(reply.data())) == reply.sum(),
        "the payload arrived changed");
  }

private:
  std::unique_ptr<grpcpeer::Target::Stub> stub;

  template <typename Call>
  void call(Call&& call) {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);  // The server may still be starting.
    auto status = call(context);
    KJ_REQUIRE(status.ok(), status.error_message().c_str());
  }
};

}  // namespace

kj::Own<Peer> newGrpcPeer(kj::StringPtr address) { return kj::heap<GrpcPeer>(address); }

void serveGrpc(kj::StringPtr address) {
  GrpcTarget target;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(UNLIMITED);
  builder.SetMaxSendMessageSize(UNLIMITED);
  builder.AddListeningPort(urlOf(address), grpc::InsecureServerCredentials());
  builder.RegisterService(&target);
  auto server = builder.BuildAndStart();
  KJ_REQUIRE(server != nullptr, "gRPC cannot listen", address);
  server->Wait();
}

}  // namespace bench
}  // namespace capnpshm
