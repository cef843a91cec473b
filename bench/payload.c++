// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// Payloads: in params, in results, and as a stream. A case whose name ends in "_rw" has the sender
// write every byte and the receiver read it; the others measure the transport alone.
//
// No size hints are given, as in most code that one meets.

#include "client.h"

#include <kj/debug.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr uint HELD_MESSAGES = 16;         // Each way.
constexpr uint64_t HELD_BYTES = 64 << 10;  // In each of them.

bool isReadAndWritten(Task::Reader task) {
  kj::StringPtr name = task.getCase();
  return name.endsWith("_rw");
}

void put(Session& session, Target::Client& target, uint64_t bytes, bool readAndWrite) {
  auto request = target.putRequest();
  auto data = request.initData(bytes);
  uint64_t sum = readAndWrite ? writeAll(data) : 0;
  request.setRead(readAndWrite);
  auto response = request.send().wait(session.waitScope());
  KJ_REQUIRE(response.getSum() == sum, "the payload arrived changed", bytes);
}

}  // namespace

void param(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  Slice slice(session, task);
  slice.run([&]() { put(session, target, task.getPayloadBytes(), isReadAndWritten(task)); });
  slice.report(figures);
  slice.reportRate(figures, task.getPayloadBytes());
}

void firstParam(Session& session, Task::Reader task, Figures& figures) {
  // The first payload on a connection that has only carried small calls, or the second. What it
  // takes to make such a connection is no matter here, and since that cannot be told apart in other
  // figures, the latency is the only one.
  bool readAndWrite = isReadAndWritten(task);
  bool second = kj::StringPtr(task.getCase()).startsWith("second");
  auto call = [&]() {
    auto connection = session.connect();
    session.setUp(connection);
    if (second) put(session, connection.target, task.getPayloadBytes(), readAndWrite);
    uint64_t begin = now();
    put(session, connection.target, task.getPayloadBytes(), readAndWrite);
    return now() - begin;
  };
  Slice slice(session, task);
  slice.warmUp(call);
  slice.start();
  do slice.record(call()); while (slice.more());
  slice.stop();
  slice.reportLatencies(figures);
}

void result(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  bool readAndWrite = isReadAndWritten(task);
  Slice slice(session, task);
  slice.run([&]() {
    auto request = target.getRequest();
    request.setBytes(task.getPayloadBytes());
    request.setWrite(readAndWrite);
    auto response = request.send().wait(session.waitScope());
    auto data = response.getData();
    KJ_REQUIRE(data.size() == task.getPayloadBytes());
    KJ_REQUIRE(!readAndWrite || response.getSum() == sumOf(data), "the payload arrived changed");
  });
  slice.report(figures);
  slice.reportRate(figures, task.getPayloadBytes());
}

void stream(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  bool readAndWrite = isReadAndWritten(task);
  uint64_t sum = 0, bytes = 0;
  auto write = [&]() {
    auto request = target.writeRequest();
    auto data = request.initData(task.getPayloadBytes());
    if (readAndWrite) sum += writeAll(data);
    request.setRead(readAndWrite);
    bytes += data.size();
    request.send().wait(session.waitScope());
  };
  auto finish = [&]() {
    auto response = target.finishRequest().send().wait(session.waitScope());
    KJ_REQUIRE(response.getBytes() == bytes && response.getSum() == sum,
        "the stream arrived changed", response.getBytes(), bytes);
    sum = bytes = 0;
  };

  Slice slice(session, task);
  slice.warmUp(write);
  finish();
  slice.start();
  do {
    uint64_t begin = now();
    write();
    slice.record(now() - begin);
  } while (slice.more());
  finish();  // Until all has arrived.
  slice.stop();
  slice.report(figures);
  slice.reportRate(figures, task.getPayloadBytes());
}

void held(Session& session, Task::Reader task, Figures& figures) {
  // Messages that neither side lets go of, while others pass.
  auto& target = session.target();
  while (session.heldCalls.size() < HELD_MESSAGES) {
    auto hold = target.holdRequest();
    hold.initData(HELD_BYTES);
    session.heldCalls.add(hold.send().ignoreResult().eagerlyEvaluate(nullptr));
    auto get = target.getRequest();
    get.setBytes(HELD_BYTES);
    session.heldResponses.add(get.send().wait(session.waitScope()));
  }
  Slice slice(session, task);
  slice.run([&]() { put(session, target, task.getPayloadBytes(), false); });
  slice.report(figures);
}

}  // namespace bench
}  // namespace capnpshm
