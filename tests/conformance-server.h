// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The objects which the conformance suite calls, and the state in which a test sees what happened
// to them.

#include <conformance.capnp.h>
#include <kj/async.h>
#include <kj/io.h>
#include <kj/thread.h>
#include <deque>

namespace capnpshm {
namespace conformance {

using kj::byte;
using kj::uint;

void fillPattern(kj::ArrayPtr<byte> data, uint seed);
kj::Array<byte> pattern(size_t bytes, uint seed);
// Data in which every byte tells its place.

bool isPattern(kj::ArrayPtr<const byte> data, uint seed);

struct ServerState {
  // What a server's objects count and wait for. Belongs to the server's thread, unless a test only
  // looks at it before and after.

  uint roots = 0;
  uint items = 0;
  uint sinks = 0;
  // Objects alive.

  uint calls = 0;
  uint running = 0;
  uint sequence = 0;

  std::deque<kj::Own<kj::PromiseFulfiller<void>>> slow;
  // Calls of slow() that run.

  std::deque<kj::Own<kj::PromiseFulfiller<Item::Client>>> promised;
  // What promised() has promised.

  bool holdPuts = false;
  std::deque<kj::Own<kj::PromiseFulfiller<void>>> puts;
  // Calls of put() that run, if it waits for the test.

  uint putCount = 0;
  uint64_t putSum = 0;
  bool ordered = true;
  uint failPut = kj::maxValue;
  // Which put() fails.

  uint callerSide = 99;
};

class ItemImpl: public Item::Server {
public:
  ItemImpl(ServerState& state, kj::StringPtr name): state(state), itemName(kj::str(name)) {
    ++state.items;
  }
  virtual ~ItemImpl() noexcept(false) { --state.items; }

  kj::Promise<void> name(NameContext context) override;
  kj::Promise<void> sequence(SequenceContext context) override;

private:
  ServerState& state;
  kj::String itemName;
  uint count = 0;
};

class FileItem final: public ItemImpl {
  // An item with a file descriptor.

public:
  FileItem(ServerState& state, kj::AutoCloseFd fd): ItemImpl(state, "file"), fd(kj::mv(fd)) {}
  kj::Maybe<int> getFd() override { return fd.get(); }

private:
  kj::AutoCloseFd fd;
};

kj::AutoCloseFd pipeWith(kj::StringPtr text);
// A pipe's reading end, from which the text can be read and nothing more.

class SinkImpl final: public Sink::Server {
public:
  explicit SinkImpl(ServerState& state): state(state) { ++state.sinks; }
  ~SinkImpl() noexcept(false) { --state.sinks; }

  kj::Promise<void> put(PutContext context) override;
  kj::Promise<void> total(TotalContext context) override;
  kj::Promise<void> slow(SlowContext context) override;

private:
  ServerState& state;
};

class RootImpl final: public Root::Server {
public:
  explicit RootImpl(ServerState& state): state(state) { ++state.roots; }
  ~RootImpl() noexcept(false) { --state.roots; }

  kj::Promise<void> add(AddContext context) override;
  kj::Promise<void> echo(EchoContext context) override;
  kj::Promise<void> fail(FailContext context) override;
  kj::Promise<void> never(NeverContext context) override;
  kj::Promise<void> slow(SlowContext context) override;
  kj::Promise<void> sequence(SequenceContext context) override;
  kj::Promise<void> make(MakeContext context) override;
  kj::Promise<void> visit(VisitContext context) override;
  kj::Promise<void> reflect(ReflectContext context) override;
  kj::Promise<void> keep(KeepContext context) override;
  kj::Promise<void> kept(KeptContext context) override;
  kj::Promise<void> fill(FillContext context) override;
  kj::Promise<void> parts(PartsContext context) override;
  kj::Promise<void> forward(ForwardContext context) override;
  kj::Promise<void> open(OpenContext context) override;
  kj::Promise<void> promised(PromisedContext context) override;
  kj::Promise<void> files(FilesContext context) override;
  kj::Promise<void> onThread(OnThreadContext context) override;
  kj::Promise<void> caller(CallerContext context) override;

  DispatchCallResult dispatchCall(uint64_t interfaceId, uint16_t methodId,
      capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer> context) override;

private:
  ServerState& state;
  Item::Client keptItem = nullptr;
};

}  // namespace conformance
}  // namespace capnpshm
