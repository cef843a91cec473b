// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "server.h"
#include "system-call-trap.h"

#include <kj/debug.h>
#include <string.h>

namespace capnpshm {
namespace bench {

namespace {

class TargetImpl final: public Target::Server {
public:
  explicit TargetImpl(const Links& links): links(links) {}

  kj::Promise<void> echo(EchoContext context) override {
    context.getResults().setNumber(context.getParams().getNumber());
    return kj::READY_NOW;
  }

  kj::Promise<void> put(PutContext context) override {
    auto params = context.getParams();
    context.getResults().setSum(params.getRead() ? sumOf(params.getData()) : 0);
    return kj::READY_NOW;
  }

  kj::Promise<void> get(GetContext context) override {
    auto params = context.getParams();
    auto results = context.getResults();
    auto data = results.initData(params.getBytes());
    if (params.getWrite()) results.setSum(writeAll(data));
    return kj::READY_NOW;
  }

  kj::Promise<void> write(WriteContext context) override {
    auto params = context.getParams();
    auto data = params.getData();
    streamBytes += data.size();
    if (params.getRead()) streamSum += sumOf(data);
    return kj::READY_NOW;
  }

  kj::Promise<void> finish(FinishContext context) override {
    auto results = context.getResults();
    results.setBytes(streamBytes);
    results.setSum(streamSum);
    streamBytes = 0;
    streamSum = 0;
    return kj::READY_NOW;
  }

  kj::Promise<void> hold(HoldContext context) override {
    return kj::Promise<void>(kj::NEVER_DONE).attach(kj::mv(context));
  }

  kj::Promise<void> counters(CountersContext context) override {
    uint64_t doorbells = 0, sleeps = 0, sharedBytes = 0, copiedBytes = 0, heapWaits = 0;
    for (auto link: links) {
      KJ_IF_MAYBE(stats, link->getStats()) {
        doorbells += stats->bellsRung;
        sleeps += stats->sleeps;
        sharedBytes += stats->regionBytes;
        copiedBytes += stats->outgoing.copiedBytes + stats->incoming.copiedBytes;
        heapWaits += stats->heapWaits;
      }
    }
    auto counters = context.getResults().initCounters();
    counters.setConnections(links.size());
    counters.setDoorbells(doorbells);
    counters.setSleeps(sleeps);
    counters.setSharedBytes(sharedBytes);
    counters.setCopiedBytes(copiedBytes);
    counters.setHeapWaits(heapWaits);
    return kj::READY_NOW;
  }

  kj::Promise<void> trapSystemCalls(TrapSystemCallsContext context) override {
    auto results = context.getResults();
    if (context.getParams().getOn()) {
      trap = kj::heap<SystemCallTrap>();
      results.setPermitted(trap->isPermitted());
    } else if (trap.get() != nullptr) {
      results.setCount(trap->getCount());
      trap = nullptr;
    }
    return kj::READY_NOW;
  }

private:
  const Links& links;
  kj::Own<SystemCallTrap> trap;
  uint64_t streamBytes = 0;
  uint64_t streamSum = 0;
};

class Server final: private kj::TaskSet::ErrorHandler {
public:
  Server(const TransportSpec& transport, kj::AsyncIoContext& io)
      : transport(transport), io(io), tasks(*this) {}

  kj::Promise<void> listen(kj::ConnectionReceiver& receiver) {
    return receiver.accept().then([this, &receiver](kj::Own<kj::AsyncIoStream>&& stream) {
      auto link = newServerLink(transport, io, kj::mv(stream), newTarget(links));
      auto entry = link.get();
      links.insert(entry);
      auto end = link->onDisconnect();
      tasks.add(end.attach(kj::defer([this, entry]() { links.erase(entry); }), kj::mv(link)));
      return listen(receiver);
    });
  }

private:
  const TransportSpec& transport;
  kj::AsyncIoContext& io;
  Links links;
  kj::TaskSet tasks;

  void taskFailed(kj::Exception&& exception) override {
    // A client that was ended.
    if (exception.getType() != kj::Exception::Type::DISCONNECTED) KJ_LOG(ERROR, exception);
  }
};

}  // namespace

uint64_t writeAll(kj::ArrayPtr<kj::byte> data) {
  static uint64_t seed = 0;
  uint64_t value = ++seed;  // Another content each time.
  uint64_t sum = 0;
  size_t i = 0;
  for (; i + sizeof(value) <= data.size(); i += sizeof(value)) {
    memcpy(data.begin() + i, &value, sizeof(value));
    sum += value;
    value += 0x9e3779b97f4a7c15ull;
  }
  for (; i < data.size(); i++) sum += data[i] = kj::byte(value);
  return sum;
}

uint64_t sumOf(kj::ArrayPtr<const kj::byte> data) {
  uint64_t sum = 0;
  size_t i = 0;
  for (; i + sizeof(sum) <= data.size(); i += sizeof(sum)) {
    uint64_t value;
    memcpy(&value, data.begin() + i, sizeof(value));
    sum += value;
  }
  for (; i < data.size(); i++) sum += data[i];
  return sum;
}

kj::Own<Target::Server> newTarget(const Links& links) { return kj::heap<TargetImpl>(links); }

void serve(const TransportSpec& transport, int listenFd) {
  auto io = kj::setupAsyncIo();
  auto receiver = io.lowLevelProvider->wrapListenSocketFd(
      listenFd, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
  Server server(transport, io);
  server.listen(*receiver).wait(io.waitScope);
}

}  // namespace bench
}  // namespace capnpshm
