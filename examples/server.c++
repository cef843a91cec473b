// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The server of the example: listens on a Unix socket and serves a Calculator to everybody who
// connects. All that makes it use shared memory is SharedMemoryServer in the place of
// capnp::TwoPartyServer; a client that knows only TwoPartyClient is served too, over the socket.

#include "calculator.capnp.h"

#include <capnp-shm/rpc-shm.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <kj/debug.h>
#include <kj/io.h>
#include <kj/main.h>
#include <map>
#include <signal.h>
#include <string>
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

class ValueImpl final: public Value::Server {
  // A number that is known.

public:
  explicit ValueImpl(double number): number(number) {}

  kj::Promise<void> read(ReadContext context) override {
    context.getResults().setNumber(number);
    return kj::READY_NOW;
  }

private:
  double number;
};

class OperatorImpl final: public Function::Server {
public:
  explicit OperatorImpl(Calculator::Operator op): op(op) {}

  kj::Promise<void> call(CallContext context) override {
    auto arguments = context.getParams().getArguments();
    KJ_REQUIRE(arguments.size() == 2, "operators take two arguments", arguments.size());
    context.getResults().setNumber(apply(arguments[0], arguments[1]));
    return kj::READY_NOW;
  }

private:
  Calculator::Operator op;

  double apply(double left, double right) {
    switch (op) {
      case Calculator::Operator::ADD:      return left + right;
      case Calculator::Operator::SUBTRACT: return left - right;
      case Calculator::Operator::MULTIPLY: return left * right;
      case Calculator::Operator::DIVIDE:   return left / right;
    }
    KJ_FAIL_REQUIRE("unknown operator", uint(op));
  }
};

kj::Promise<double> compute(Calculator::Expression::Reader expression) {
  // The caller keeps `expression` alive until the promise resolves.

  switch (expression.which()) {
    case Calculator::Expression::NUMBER:
      return expression.getNumber();

    case Calculator::Expression::VALUE:
      return expression.getValue().readRequest().send().then(
          [](capnp::Response<Value::ReadResults>&& result) { return result.getNumber(); });

    case Calculator::Expression::CALL: {
      auto call = expression.getCall();
      auto arguments = KJ_MAP(argument, call.getArguments()) { return compute(argument); };
      auto function = call.getFunction();
      return kj::joinPromises(kj::mv(arguments)).then(
          [function = kj::mv(function)](kj::Array<double>&& numbers) mutable {
        // If it is the client's function, this call goes back through the same connection.
        auto request = function.callRequest();
        request.setArguments(kj::ArrayPtr<const double>(numbers));
        return request.send();
      }).then([](capnp::Response<Function::CallResults>&& result) { return result.getNumber(); });
    }
  }
  KJ_FAIL_REQUIRE("unknown kind of expression", uint(expression.which()));
}

class BulkImpl final: public Bulk::Server {
public:
  kj::Promise<void> put(PutContext context) override {
    auto params = context.getParams();
    auto content = params.getContent();
    // The message is released when the call ends, so what is to stay must be copied out of it.
    contents[std::string(params.getName().cStr())] =
        kj::heapArray<kj::byte>(content.begin(), content.size());
    return kj::READY_NOW;
  }

  kj::Promise<void> get(GetContext context) override {
    auto entry = contents.find(std::string(context.getParams().getName().cStr()));
    KJ_REQUIRE(entry != contents.end(), "nothing was put under this name",
        context.getParams().getName());
    auto& content = entry->second;
    // A size hint lets the whole message be one piece of shared memory. Without it the result is
    // the same; it may only take one more allocation.
    auto results = context.getResults(capnp::MessageSize { 8 + content.size() / 8, 0 });
    results.setContent(content);
    return kj::READY_NOW;
  }

private:
  std::map<std::string, kj::Array<kj::byte>> contents;
};

class SinkImpl final: public Sink::Server {
public:
  kj::Promise<void> write(WriteContext context) override {
    auto chunk = context.getParams().getChunk();
    ++chunks;
    bytes += chunk.size();
    for (kj::byte b: chunk) sum += b;
    return kj::READY_NOW;
  }

  kj::Promise<void> finish(FinishContext context) override {
    auto results = context.getResults();
    results.setChunks(chunks);
    results.setBytes(bytes);
    results.setSum(sum);
    return kj::READY_NOW;
  }

private:
  uint64_t chunks = 0;
  uint64_t bytes = 0;
  uint64_t sum = 0;
};

class CalculatorImpl final: public Calculator::Server {
public:
  kj::Promise<void> evaluate(EvaluateContext context) override {
    return compute(context.getParams().getExpression()).then([context](double number) mutable {
      context.getResults().setValue(kj::heap<ValueImpl>(number));
    });
  }

  kj::Promise<void> getOperator(GetOperatorContext context) override {
    context.getResults().setFunction(
        kj::heap<OperatorImpl>(context.getParams().getOperator()));
    return kj::READY_NOW;
  }

  kj::Promise<void> getBulk(GetBulkContext context) override {
    context.getResults().setBulk(kj::heap<BulkImpl>());
    return kj::READY_NOW;
  }

  kj::Promise<void> openSink(OpenSinkContext context) override {
    context.getResults().setSink(kj::heap<SinkImpl>());
    return kj::READY_NOW;
  }
};

class ServerMain {
public:
  explicit ServerMain(kj::ProcessContext& context): context(context) {}

  kj::MainFunc getMain() {
    return kj::MainBuilder(context, "capnp-shm example server",
        "Serves a calculator on the Unix socket <socket> until SIGTERM or SIGINT.")
        .expectArg("<socket>", KJ_BIND_METHOD(*this, run))
        .build();
  }

  kj::MainBuilder::Validity run(kj::StringPtr path) {
    kj::UnixEventPort::captureSignal(SIGTERM);
    kj::UnixEventPort::captureSignal(SIGINT);
    auto io = kj::setupAsyncIo();

    // The context is optional: SharedMemoryServer's other constructor takes exactly what
    // TwoPartyServer's takes. `options` is where a trusted client would be called one.
    capnpshm::SharedMemoryContext shm;
    shm.port = &io.unixEventPort;
    capnpshm::SharedMemoryServer server(shm, kj::heap<CalculatorImpl>());

    auto address = io.provider->getNetwork().parseAddress(kj::str("unix:", path))
        .wait(io.waitScope);
    auto listener = address->listen();
    say("server: process ", getpid(), " listens on ", path);

    auto signal = io.unixEventPort.onSignal(SIGTERM)
        .exclusiveJoin(io.unixEventPort.onSignal(SIGINT))
        .ignoreResult();
    server.listen(*listener).exclusiveJoin(kj::mv(signal)).wait(io.waitScope);

    // Let those who are connected finish, then go.
    server.drain().wait(io.waitScope);
    say("server: done");
    return true;
  }

private:
  kj::ProcessContext& context;
};

}  // namespace
}  // namespace example

KJ_MAIN(example::ServerMain)
