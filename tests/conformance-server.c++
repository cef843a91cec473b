// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-server.h"

#include <string.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {
namespace conformance {

namespace {

byte patternByte(size_t i, uint seed) { return byte(i * 131 + (i >> 8) * 17 + seed); }

}  // namespace

void fillPattern(kj::ArrayPtr<byte> data, uint seed) {
  for (size_t i = 0; i < data.size(); i++) data[i] = patternByte(i, seed);
}

kj::Array<byte> pattern(size_t bytes, uint seed) {
  auto result = kj::heapArray<byte>(bytes);
  fillPattern(result, seed);
  return result;
}

bool isPattern(kj::ArrayPtr<const byte> data, uint seed) {
  for (size_t i = 0; i < data.size(); i++) {
    if (data[i] != patternByte(i, seed)) return false;
  }
  return true;
}

kj::AutoCloseFd pipeWith(kj::StringPtr text) {
  int fds[2];
  KJ_SYSCALL(pipe(fds));
  kj::AutoCloseFd in(fds[0]), out(fds[1]);
  kj::FdOutputStream(out.get()).write(text.begin(), text.size());
  return in;
}

kj::Promise<void> ItemImpl::name(NameContext context) {
  context.getResults().setName(itemName);
  return kj::READY_NOW;
}

kj::Promise<void> ItemImpl::sequence(SequenceContext context) {
  context.getResults().setValue(count++);
  return kj::READY_NOW;
}

kj::Promise<void> SinkImpl::put(PutContext context) {
  auto params = context.getParams();
  uint n = state.putCount++;
  if (params.getN() != n || !isPattern(params.getFill(), n)) state.ordered = false;
  state.putSum += params.getN();
  KJ_REQUIRE(n != state.failPut, "this put fails");
  if (!state.holdPuts) return kj::READY_NOW;
  auto paf = kj::newPromiseAndFulfiller<void>();
  state.puts.push_back(kj::mv(paf.fulfiller));
  return kj::mv(paf.promise);
}

kj::Promise<void> SinkImpl::total(TotalContext context) {
  auto results = context.getResults();
  results.setCount(state.putCount);
  results.setSum(state.putSum);
  results.setOrdered(state.ordered);
  return kj::READY_NOW;
}

kj::Promise<void> SinkImpl::slow(SlowContext context) {
  auto paf = kj::newPromiseAndFulfiller<void>();
  state.slow.push_back(kj::mv(paf.fulfiller));
  return paf.promise.then([this, context]() mutable {
    context.getResults().setValue(state.putCount);
  });
}

Root::Server::DispatchCallResult RootImpl::dispatchCall(uint64_t interfaceId, uint16_t methodId,
    capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer> context) {
  ++state.calls;
  auto result = Root::Server::dispatchCall(interfaceId, methodId, context);
#if CAPNP_VERSION >= 1000000
  if (methodId == 3) result.allowCancellation = true;  // Of never().
#endif
  return result;
}

kj::Promise<void> RootImpl::add(AddContext context) {
  auto params = context.getParams();
  context.getResults().setValue(params.getA() + params.getB());
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::echo(EchoContext context) {
  context.getResults().setData(context.getParams().getData());
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::fail(FailContext context) {
  auto params = context.getParams();
  return kj::Exception(static_cast<kj::Exception::Type>(params.getKind()), __FILE__, __LINE__,
      kj::str(params.getText()));
}

kj::Promise<void> RootImpl::never(NeverContext context) {
#if CAPNP_VERSION < 1000000
  context.allowCancellation();
#else
  (void)context;
#endif
  ++state.running;
  return kj::Promise<void>(kj::NEVER_DONE).attach(kj::defer([this]() { --state.running; }));
}

kj::Promise<void> RootImpl::slow(SlowContext context) {
  ++state.running;
  auto paf = kj::newPromiseAndFulfiller<void>();
  state.slow.push_back(kj::mv(paf.fulfiller));
  return paf.promise.then([context]() mutable {
    context.getResults().setValue(42);
  }).attach(kj::defer([this]() { --state.running; }));
}

kj::Promise<void> RootImpl::sequence(SequenceContext context) {
  context.getResults().setValue(state.sequence++);
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::make(MakeContext context) {
  context.getResults().setItem(kj::heap<ItemImpl>(state, context.getParams().getName()));
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::visit(VisitContext context) {
  auto params = context.getParams();
  auto item = params.getItem();
  auto promises = kj::heapArrayBuilder<kj::Promise<int64_t>>(params.getCount());
  for (uint i = 0; i < params.getCount(); i++) {
    promises.add(item.sequenceRequest().send().then(
        [](capnp::Response<Sum>&& response) { return response.getValue(); }));
  }
  return kj::joinPromises(promises.finish()).then([context](kj::Array<int64_t>&& values) mutable {
    int64_t sum = 0;
    for (auto value: values) sum += value;
    context.getResults().setValue(sum);
  });
}

kj::Promise<void> RootImpl::reflect(ReflectContext context) {
  context.getResults().setItem(context.getParams().getItem());
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::keep(KeepContext context) {
  keptItem = context.getParams().getItem();
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::kept(KeptContext context) {
  context.getResults().setItem(keptItem);
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::fill(FillContext context) {
  auto params = context.getParams();
  fillPattern(context.getResults().initData(params.getBytes()), params.getSeed());
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::parts(PartsContext context) {
  auto in = context.getParams().getParts();
  auto out = context.getResults().initParts(in.size());
  for (uint i = 0; i < in.size(); i++) out.set(i, in[i]);
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::forward(ForwardContext context) {
  auto params = context.getParams();
  auto request = params.getTo().addRequest();
  request.setA(params.getA());
  request.setB(params.getB());
  return context.tailCall(kj::mv(request));
}

kj::Promise<void> RootImpl::open(OpenContext context) {
  context.getResults().setSink(kj::heap<SinkImpl>(state));
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::promised(PromisedContext context) {
  auto paf = kj::newPromiseAndFulfiller<Item::Client>();
  state.promised.push_back(kj::mv(paf.fulfiller));
  context.getResults().setItem(kj::mv(paf.promise));
  return kj::READY_NOW;
}

kj::Promise<void> RootImpl::files(FilesContext context) {
  auto items = context.getParams().getItems();
  auto promises = kj::heapArrayBuilder<kj::Promise<kj::String>>(items.size());
  for (auto item: items) {
    promises.add(item.getFd().then([](kj::Maybe<int> fd) {
      KJ_IF_MAYBE(f, fd) {
        char buffer[64];
        ssize_t n;
        KJ_SYSCALL(n = read(*f, buffer, sizeof(buffer)));
        return kj::heapString(buffer, n);
      }
      return kj::str("none");
    }));
  }
  return kj::joinPromises(promises.finish())
      .then([this, context](kj::Array<kj::String>&& contents) mutable {
    auto results = context.getResults();
    auto list = results.initContents(contents.size());
    for (uint i = 0; i < contents.size(); i++) list.set(i, contents[i]);
    results.setItem(kj::heap<FileItem>(state, pipeWith("reply")));
  });
}

kj::Promise<void> RootImpl::onThread(OnThreadContext context) {
  // As libmultiprocess does it: this thread goes on, and does not touch the call meanwhile.
  auto params = context.getParams();
  uint64_t bytes = params.getBytes();
  uint seed = params.getSeed();
  auto paf = kj::newPromiseAndCrossThreadFulfiller<void>();
  auto thread = kj::heap<kj::Thread>(
      [context, bytes, seed, fulfiller = kj::mv(paf.fulfiller)]() mutable {
    fillPattern(context.getResults().initData(bytes), seed);
    fulfiller->fulfill();
  });
  return paf.promise.then([thread = kj::mv(thread)]() mutable { thread = nullptr; });
}

kj::Promise<void> RootImpl::caller(CallerContext context) {
  context.getResults().setSide(state.callerSide);
  return kj::READY_NOW;
}

}  // namespace conformance
}  // namespace capnpshm
