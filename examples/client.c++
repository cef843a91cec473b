// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The client of the example: connects to the server's Unix socket, makes calls of every kind, and
// shows that their data went through shared memory. SharedMemoryClient stands in the place of
// capnp::TwoPartyClient; everything else is Cap'n Proto as ever.

#include "calculator.capnp.h"

#include <capnp-shm/rpc-shm.h>
#include <cmath>
#include <kj/async-io.h>
#include <kj/debug.h>
#include <kj/io.h>
#include <kj/main.h>
#include <unistd.h>

namespace example {
namespace {

using kj::uint;

template <typename... Params>
void say(Params&&... params) {
  // Prints a line at once. (KJ_MAIN ends the process without flushing stdio.)
  auto line = kj::str(kj::fwd<Params>(params)..., '\n');
  kj::FdOutputStream(STDOUT_FILENO).write(line.begin(), line.size());
}

class PowerFunction final: public Function::Server {
  // A function that lives in the client; the server calls it back.

public:
  kj::Promise<void> call(CallContext context) override {
    auto arguments = context.getParams().getArguments();
    KJ_REQUIRE(arguments.size() == 2, "power takes two arguments", arguments.size());
    context.getResults().setNumber(std::pow(arguments[0], arguments[1]));
    return kj::READY_NOW;
  }
};

kj::byte patternAt(uint64_t position) { return position * 31 + (position >> 12); }

class ClientMain {
public:
  explicit ClientMain(kj::ProcessContext& context): context(context) {}

  kj::MainFunc getMain() {
    return kj::MainBuilder(context, "capnp-shm example client",
        "Calls the calculator on the Unix socket <socket>, and shows what carried the calls.")
        .expectArg("<socket>", KJ_BIND_METHOD(*this, run))
        .build();
  }

  kj::MainBuilder::Validity run(kj::StringPtr path) {
    auto io = kj::setupAsyncIo();
    auto& waitScope = io.waitScope;
    auto address = io.provider->getNetwork().parseAddress(kj::str("unix:", path)).wait(waitScope);
    auto connection = address->connect().wait(waitScope);

    capnpshm::SharedMemoryContext shm;
    shm.port = &io.unixEventPort;
    capnpshm::SharedMemoryClient client(shm, *connection);
    auto calculator = client.bootstrap().castAs<Calculator>();
    say("client: process ", getpid(), " is connected");

    // A connection begins as a plain stream, and stays one for a few calls: so short a connection
    // would not be worth shared memory. With the next we switch, and the server with the answer. We
    // look at the figures then, so that we can say below what came before the switch and what
    // after.
    for (uint i = 0; i <= shm.options.plainCalls; i++) {
      calculator.getOperatorRequest().send().wait(waitScope);
    }
    auto before = client.getStats();
    requireSharedMemory(before.outgoing);
    requireSharedMemory(before.incoming);
    pipelinedCalls(calculator, waitScope);
    callbacks(calculator, waitScope);
    bulkTransfer(calculator, waitScope);
    stream(calculator, waitScope);

    report(before, client.getStats());
    return true;
  }

private:
  kj::ProcessContext& context;
  uint64_t calls = 0;  // Since the switch.

  template <typename Request>
  auto send(Request&& request) {
    // Sends a request and counts it.
    ++calls;
    return request.send();
  }

  void pipelinedCalls(Calculator::Client& calculator, kj::WaitScope& waitScope) {
    // (123 + 45) * 2: all requests are sent at once, and only the last is waited for. What they
    // refer to are promises of what the earlier ones will return.
    auto getOperator = [&](Calculator::Operator op) {
      auto request = calculator.getOperatorRequest();
      request.setOperator(op);
      return send(request).getFunction();
    };
    auto add = getOperator(Calculator::Operator::ADD);
    auto multiply = getOperator(Calculator::Operator::MULTIPLY);

    auto sumRequest = calculator.evaluateRequest();
    auto sumCall = sumRequest.getExpression().initCall();
    sumCall.setFunction(add);
    auto sumArguments = sumCall.initArguments(2);
    sumArguments[0].setNumber(123);
    sumArguments[1].setNumber(45);
    auto sum = send(sumRequest).getValue();

    auto productRequest = calculator.evaluateRequest();
    auto productCall = productRequest.getExpression().initCall();
    productCall.setFunction(multiply);
    auto productArguments = productCall.initArguments(2);
    productArguments[0].setValue(sum);
    productArguments[1].setNumber(2);
    auto product = send(productRequest).getValue();

    double number = send(product.readRequest()).wait(waitScope).getNumber();
    say("client: pipelined calls: (123 + 45) * 2 = ", number);
    KJ_REQUIRE(number == 336, "wrong result", number);
  }

  void callbacks(Calculator::Client& calculator, kj::WaitScope& waitScope) {
    // The server calls our function for each of these.
    Function::Client power = kj::heap<PowerFunction>();
    constexpr uint COUNT = 10;
    double total = 0;
    for (uint i = 0; i < COUNT; i++) {
      auto request = calculator.evaluateRequest();
      auto call = request.getExpression().initCall();
      call.setFunction(power);
      auto arguments = call.initArguments(2);
      arguments[0].setNumber(2);
      arguments[1].setNumber(i);
      auto value = send(request).getValue();
      total += send(value.readRequest()).wait(waitScope).getNumber();
    }
    say("client: callbacks: 2^0 + 2^1 + ... + 2^", COUNT - 1, " = ", total);
    KJ_REQUIRE(total == 1023, "wrong result", total);
  }

  void bulkTransfer(Calculator::Client& calculator, kj::WaitScope& waitScope) {
    constexpr size_t SIZE = 16 << 20;
    auto bulk = send(calculator.getBulkRequest()).getBulk();

    // With a size hint the content is one piece of shared memory, which we fill in place.
    auto put = bulk.putRequest(capnp::MessageSize { 16 + SIZE / 8, 0 });
    put.setName("pattern");
    auto content = put.initContent(SIZE);
    for (size_t i = 0; i < SIZE; i++) content[i] = patternAt(i);
    send(put).wait(waitScope);

    auto get = bulk.getRequest();
    get.setName("pattern");
    auto response = send(get).wait(waitScope);
    auto returned = response.getContent();
    KJ_REQUIRE(returned.size() == SIZE, "wrong size", returned.size());
    for (size_t i = 0; i < SIZE; i++) {
      KJ_REQUIRE(returned[i] == patternAt(i), "wrong content", i);
    }
    say("client: bulk transfer: ", returned.size(), " bytes there and back, unchanged");
  }

  void stream(Calculator::Client& calculator, kj::WaitScope& waitScope) {
    // Each send() of a streaming call resolves when the next may be sent, not when it was answered.
    constexpr uint COUNT = 1000;
    constexpr size_t SIZE = 16 << 10;
    auto sink = send(calculator.openSinkRequest()).getSink();
    uint64_t sum = 0;
    for (uint i = 0; i < COUNT; i++) {
      auto request = sink.writeRequest();
      auto chunk = request.initChunk(SIZE);
      for (size_t j = 0; j < SIZE; j++) sum += chunk[j] = patternAt(i * SIZE + j);
      send(request).wait(waitScope);
    }
    auto result = send(sink.finishRequest()).wait(waitScope);
    say("client: stream: ", result.getChunks(), " chunks, ", result.getBytes(), " bytes, sum ",
        result.getSum());
    KJ_REQUIRE(result.getChunks() == COUNT && result.getBytes() == COUNT * SIZE &&
               result.getSum() == sum, "wrong result", sum);
  }

  static void requireSharedMemory(const capnpshm::DirectionStats& direction) {
    KJ_REQUIRE(direction.transport == capnpshm::Transport::SHARED_MEMORY,
        "this connection does not use shared memory", direction.plainReason);
  }

  void report(const capnpshm::SharedMemoryStats& before, const capnpshm::SharedMemoryStats& after) {
    // All figures are the connection's own.
    auto sharedBytes = [](const capnpshm::DirectionStats& direction) {
      return direction.inlineBytes + direction.referencedBytes;
    };
    auto grown = [&](uint64_t capnpshm::DirectionStats::* figure) {
      return (after.outgoing.*figure - before.outgoing.*figure) +
          (after.incoming.*figure - before.incoming.*figure);
    };
    uint64_t bytes = sharedBytes(after.outgoing) - sharedBytes(before.outgoing) +
        sharedBytes(after.incoming) - sharedBytes(before.incoming);

    // Once the connection counts by itself what comes after the switch; once we compare.
    uint64_t onSocket = after.outgoing.socketMessageBytesAfterSwitch +
        after.incoming.socketMessageBytesAfterSwitch;
    uint64_t difference = grown(&capnpshm::DirectionStats::socketMessageBytes);
    KJ_REQUIRE(onSocket == difference, "the figures contradict each other", onSocket, difference);

    say("client: messages: ", grown(&capnpshm::DirectionStats::inlineMessages),
        " inside the rings, ", grown(&capnpshm::DirectionStats::referencedMessages),
        " by reference");
    say("client: on the socket: ", grown(&capnpshm::DirectionStats::socketBytes) - difference,
        " bytes of control messages and bells");
    say("shared memory: ", calls, " calls, ", bytes, " bytes; socket after the switch: ",
        onSocket, " message bytes");
    KJ_REQUIRE(onSocket == 0, "messages went over the socket after the switch");
  }
};

}  // namespace
}  // namespace example

KJ_MAIN(example::ClientMain)
