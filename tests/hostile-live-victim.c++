// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// The server that is attacked: `hostile-live-victim MODE`. See hostile-live.h.

#include "handover.h"
#include "hostile-live.h"

#include <capnp-shm/layout.h>
#include <capnp/any.h>
#include <capnp/rpc.capnp.h>
#include <algorithm>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace hostile {
namespace {

using capnp::AnyList;
using capnp::AnyPointer;
using capnp::AnyStruct;
using capnp::List;
using conformance::ItemImpl;
using conformance::Root;
using conformance::ServerState;
using conformance::SinkImpl;
using Connection = capnp::TwoPartyVatNetworkBase::Connection;

constexpr uint64_t LIMIT_IN_WORDS = 256 * 1024;
// Of a message. Lower than usual, so that no message can make its reader work for long.

constexpr uint MAX_NODES = 500;
constexpr uint RACES = 50, RACE_NODES = 8;
// How much of a message is looked at; and how often, and how much then, of one that was not inside
// the descriptor ring, where its peer may be rewriting it.

void report(kj::StringPtr text) {
  // One line, whatever the text came from.
  auto line = kj::str(text, '\n');
  for (auto& c: line.asArray().slice(0, line.size() - 1)) {
    if (c < ' ' || c > '~') c = ' ';
  }
  kj::FdOutputStream(process::REPORT_FD).write(line.begin(), line.size());
}

uint64_t milliseconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000 + time.tv_nsec / 1000000;
}

class LogReporter final: public kj::ExceptionCallback {
  // What a peer does is no reason to log.

public:
  void logMessage(kj::LogSeverity severity, const char* file, int line, int contextDepth,
                  kj::String&& text) override {
    if (severity >= kj::LogSeverity::WARNING) report(kj::str("log ", file, ':', line, ": ", text));
    kj::ExceptionCallback::logMessage(severity, file, line, contextDepth, kj::mv(text));
  }
};

class Inspector {
  // Looks at all of a message as an application might, and reads every byte of it. It must be the
  // same each time. And no reader of a part may be larger than the message: then it was made of a
  // pointer that had been changed after it was checked. What lies outside otherwise,
  // AddressSanitizer sees.

public:
  Inspector(process::Progress& progress, capnp::IncomingRpcMessage& message)
      : progress(progress), message(message), limit(message.sizeInWords() * sizeof(capnp::word)) {}

  void inspect() {
    if (limit > MAX_BODY_WORDS * sizeof(capnp::word)) {
      // About as often as the limit for what is read of a message allows. A pointer may lead to
      // more than there is, such as a long list of nothing, so it can be reached before.
      uint races = kj::min(RACES, LIMIT_IN_WORDS / 4 * sizeof(capnp::word) / limit);
      nodes = RACE_NODES;
      bool more = attempt();
      uint before = sum;
      bool changed = false;
      for (uint i = 1; i < races && more; i++) {
        nodes = RACE_NODES;
        more = attempt();
        changed = changed || (more && sum != before);
      }
      if (changed) progress[CHANGED].fetch_add(1, std::memory_order_relaxed);
    }
    nodes = MAX_NODES;
    attempt();
    // Relaxed, as all of these: figures for the driver.
    progress[INSPECTED].fetch_add(1, std::memory_order_relaxed);
    progress[READERS].fetch_add(readers, std::memory_order_relaxed);
  }

private:
  process::Progress& progress;
  capnp::IncomingRpcMessage& message;
  size_t limit;
  uint nodes = 0;
  uint64_t readers = 0;
  uint sum = 0;

  bool attempt() {
    // False if the limit was reached, so that a part of the message was not looked at.
    sum = 0;
    KJ_IF_MAYBE(exception, kj::runCatchingExceptions([this]() { look(message.getBody()); })) {
      // That the message is nonsense is for the RPC system to say.
      return strstr(exception->getDescription().cStr(), "traversal limit") == nullptr;
    }
    return true;
  }

  void look(AnyPointer::Reader pointer) {
    if (nodes == 0) return;
    --nodes;
    switch (pointer.getPointerType()) {
      case capnp::PointerType::STRUCT:
        look(pointer.getAs<AnyStruct>());
        return;
      case capnp::PointerType::LIST:
        look(pointer.getAs<AnyList>());
        return;
      default:
        return;
    }
  }

  void look(AnyStruct::Reader reader) {
    auto pointers = reader.getPointerSection();
    check(reader.getDataSection(), pointers.size() * sizeof(capnp::word));
    for (auto pointer: pointers) {
      if (nodes == 0) return;
      look(pointer);
    }
  }

  void look(AnyList::Reader reader) {
    switch (reader.getElementSize()) {
      case capnp::ElementSize::INLINE_COMPOSITE:
        for (auto element: reader.as<List<AnyStruct>>()) {
          if (nodes == 0) return;
          --nodes;
          look(element);
        }
        return;
      case capnp::ElementSize::POINTER:
        check(nullptr, reader.size() * sizeof(capnp::word));
        for (auto element: reader.as<List<AnyPointer>>()) {
          if (nodes == 0) return;
          look(element);
        }
        return;
      default:
        check(reader.getRawBytes(), 0);
    }
  }

  void check(kj::ArrayPtr<const byte> bytes, size_t more) {
    ++readers;
    if (bytes.size() + more > limit) {
      progress[OUT_OF_BOUNDS].fetch_add(1, std::memory_order_relaxed);
      report(kj::str("out of bounds: ", bytes.size(), " bytes of data and ", more,
          " of pointers in a message of ", limit));
      return;
    }
    for (byte b: bytes) sum = sum * 31 + b + 1;
    asm volatile("" :: "r"(sum));  // So that they are read.
  }
};

struct Outcome {
  // How a connection ended: what was said first.
  int type = -1;
  kj::String text;
  bool known = false;

  void set(int newType, kj::StringPtr newText) {
    if (known) return;
    known = true;
    type = newType;
    text = kj::str(newText);
  }
};

class ObservedMessage final: public capnp::OutgoingRpcMessage {
  // An Abort tells why the RPC system gave up.

public:
  ObservedMessage(kj::Own<capnp::OutgoingRpcMessage> inner, Outcome& outcome)
      : inner(kj::mv(inner)), outcome(outcome) {}

  AnyPointer::Builder getBody() override { return inner->getBody(); }
  void setFds(kj::Array<int> fds) override { inner->setFds(kj::mv(fds)); }
  size_t sizeInWords() override { return inner->sizeInWords(); }
  void send() override {
    auto body = inner->getBody().asReader().getAs<capnp::rpc::Message>();
    if (body.isAbort()) outcome.set(int(body.getAbort().getType()), body.getAbort().getReason());
    inner->send();
  }

private:
  kj::Own<capnp::OutgoingRpcMessage> inner;
  Outcome& outcome;
};

class ObservedConnection final: public Connection {
public:
  ObservedConnection(kj::Own<Connection> inner, process::Progress& progress, Outcome& outcome)
      : inner(kj::mv(inner)), progress(progress), outcome(outcome) {}

  kj::Own<capnp::RpcFlowController> newStream() override { return inner->newStream(); }
  capnp::rpc::twoparty::VatId::Reader getPeerVatId() override { return inner->getPeerVatId(); }
  kj::Promise<void> shutdown() override { return inner->shutdown(); }

  kj::Own<capnp::OutgoingRpcMessage> newOutgoingMessage(uint firstSegmentWordSize) override {
    return kj::heap<ObservedMessage>(inner->newOutgoingMessage(firstSegmentWordSize), outcome);
  }

  kj::Promise<kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>> receiveIncomingMessage() override {
    using Result = kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>;
    return inner->receiveIncomingMessage().then([this](Result&& message) -> kj::Promise<Result> {
      KJ_IF_MAYBE(m, message) {
        Inspector(progress, **m).inspect();
      } else {
        outcome.set(-1, "a clean end");
      }
      return kj::mv(message);
    }, [this](kj::Exception&& exception) -> kj::Promise<Result> {
      outcome.set(int(exception.getType()), exception.getDescription());
      return kj::mv(exception);
    });
  }

private:
  kj::Own<Connection> inner;
  process::Progress& progress;
  Outcome& outcome;
};

class ObservedNetwork final: public SharedMemoryVatNetwork {
public:
  ObservedNetwork(const SharedMemoryContext& context, kj::AsyncCapabilityStream& stream,
                  process::Progress& progress, Outcome& outcome)
      : SharedMemoryVatNetwork(context, stream, 2, process::Side::SERVER, readerOptions()),
        progress(progress), outcome(outcome) {}

  kj::Promise<kj::Own<Connection>> accept() override {
    return SharedMemoryVatNetwork::accept().then(
        [this](kj::Own<Connection>&& inner) -> kj::Own<Connection> {
      return kj::heap<ObservedConnection>(kj::mv(inner), progress, outcome);
    });
  }

private:
  process::Progress& progress;
  Outcome& outcome;

  static capnp::ReaderOptions readerOptions() {
    capnp::ReaderOptions options;
    options.traversalLimitInWords = LIMIT_IN_WORDS;
    return options;
  }
};

class VictimRoot final: public Root::Server {
  // What an application offers to those whom it does not trust: nothing that can be asked for
  // without bounds.

public:
  VictimRoot(process::Progress& progress, ServerState& state): progress(progress), state(state) {}

  kj::Promise<void> add(AddContext context) override {
    auto params = context.getParams();
    context.getResults().setValue(int64_t(uint64_t(params.getA()) + uint64_t(params.getB())));
    return served();
  }
  kj::Promise<void> echo(EchoContext context) override {
    context.getResults().setData(context.getParams().getData());
    return served();
  }
  kj::Promise<void> sequence(SequenceContext context) override {
    context.getResults().setValue(state.sequence++);
    return served();
  }
  kj::Promise<void> make(MakeContext context) override {
    context.getResults().setItem(kj::heap<ItemImpl>(state, context.getParams().getName()));
    return served();
  }
  kj::Promise<void> reflect(ReflectContext context) override {
    context.getResults().setItem(context.getParams().getItem());
    return served();
  }
  kj::Promise<void> parts(PartsContext context) override {
    auto in = context.getParams().getParts();
    KJ_REQUIRE(in.size() <= 1000, "too many parts");
    auto out = context.getResults().initParts(in.size());
    for (uint i = 0; i < in.size(); i++) out.set(i, in[i]);
    return served();
  }
  kj::Promise<void> visit(VisitContext context) override {
    auto params = context.getParams();
    KJ_REQUIRE(params.getCount() <= 10, "too many visits");
    kj::Vector<kj::Promise<void>> calls;
    for (uint i = 0; i < params.getCount(); i++) {
      calls.add(params.getItem().sequenceRequest().send().ignoreResult());
    }
    served();
    return kj::joinPromises(calls.releaseAsArray());
  }
  kj::Promise<void> open(OpenContext context) override {
    context.getResults().setSink(kj::heap<SinkImpl>(state));
    return served();
  }

private:
  process::Progress& progress;
  ServerState& state;

  kj::Promise<void> served() {
    progress[CALLS].fetch_add(1, std::memory_order_relaxed);
    return kj::READY_NOW;
  }
};

class Victim final: private kj::TaskSet::ErrorHandler {
public:
  Victim(kj::AsyncIoContext& io, const LiveMode& mode)
      : io(io), progress(mapProgress()), handover(io, kj::AutoCloseFd(process::SOCKET_FD)),
        tasks(*this), lastTick(milliseconds()), ticking(tick().eagerlyEvaluate(nullptr)) {
    context.port = &io.unixEventPort;
    context.options = mode.options;
  }

  kj::Promise<void> run() {
    return handover.next().then([this](kj::Maybe<process::Handover::Connection>&& next)
        -> kj::Promise<void> {
      KJ_IF_MAYBE(n, next) {
        auto client = kj::heap<Client>(kj::mv(n->stream), context, n->tag, progress);
        auto disconnected = client->network.onDisconnect();
        tasks.add(disconnected.attach(kj::mv(client)));
        return run();
      }
      return tasks.onEmpty();
    });
  }

private:
  struct Alive {
    // Reports the end, when nothing is left of the connection.
    process::Progress& progress;
    uint64_t tag;
    Outcome outcome;

    Alive(process::Progress& progress, uint64_t tag): progress(progress), tag(tag) {
      progress[CONNECTIONS].fetch_add(1, std::memory_order_relaxed);
    }
    ~Alive() noexcept(false) {
      report(kj::str("end ", tag, ' ', outcome.type, ' ', outcome.text));
      progress[CONNECTIONS].fetch_sub(1, std::memory_order_relaxed);
    }
    KJ_DISALLOW_COPY(Alive);
  };

  struct Client {
    Alive alive;
    kj::Own<kj::AsyncCapabilityStream> stream;
    ServerState state;
    ObservedNetwork network;
    capnp::RpcSystem<conformance::VatId> rpc;

    Client(kj::Own<kj::AsyncCapabilityStream> streamParam, const SharedMemoryContext& context,
           uint64_t tag, process::Progress& progress)
        : alive(progress, tag), stream(kj::mv(streamParam)),
          network(context, *stream, progress, alive.outcome),
          rpc(capnp::makeRpcServer(
              network, capnp::Capability::Client(kj::heap<VictimRoot>(progress, state)))) {
      // What the RPC system gives to those who must bound it.
      rpc.setFlowLimit(LIMIT_IN_WORDS);
    }
  };

  kj::AsyncIoContext& io;
  process::Progress& progress;
  SharedMemoryContext context;
  process::Handover handover;
  kj::TaskSet tasks;
  uint64_t lastTick;
  kj::Promise<void> ticking;

  static process::Progress& mapProgress() {
    void* address = mmap(nullptr, sizeof(process::Progress), PROT_READ | PROT_WRITE, MAP_SHARED,
        process::PROGRESS_FD, 0);
    KJ_REQUIRE(address != MAP_FAILED, strerror(errno));
    return *reinterpret_cast<process::Progress*>(address);
  }

  kj::Promise<void> tick() {
    return io.provider->getTimer().afterDelay(TICK_MILLISECONDS * kj::MILLISECONDS)
        .then([this]() {
      auto now = milliseconds();
      progress[TICKS].fetch_add(1, std::memory_order_relaxed);
      if (now - lastTick > progress[LONGEST_GAP].load(std::memory_order_relaxed)) {
        progress[LONGEST_GAP].store(now - lastTick, std::memory_order_relaxed);
      }
      lastTick = now;
      return tick();
    });
  }

  void taskFailed(kj::Exception&& exception) override {
    report(kj::str("log a connection's end failed: ", exception));
  }
};

}  // namespace
}  // namespace hostile
}  // namespace capnpshm

int main(int, char** argv) {
  using namespace capnpshm::hostile;
  // So that it does not outlive a test that crashed.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  LogReporter logs;
  auto io = kj::setupAsyncIo();
  Victim victim(io, findLiveMode(argv[1]));
  report("ready");
  victim.run().wait(io.waitScope);
  report("done");
  return 0;
}
