// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// Limits of the machine, without RPC: how long it takes two threads on two cores to answer each
// other, and to hand memory over, how fast memory is copied and zeroed, and how evenly the machine
// does plain work.

#include "client.h"

#include <atomic>
#include <kj/debug.h>
#include <kj/thread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr uint WORK_STEPS = 3000;  // Of four cycles each.
constexpr size_t TURNS_BYTES = 4 << 20;  // More than a core's own caches.

void pause() {
#if __x86_64__ || __i386__
  __builtin_ia32_pause();
#elif __aarch64__
  asm volatile("yield" ::: "memory");
#endif
}

void copyAll(kj::ArrayPtr<kj::byte> to, kj::ArrayPtr<const kj::byte> from) {
  memcpy(to.begin(), from.begin(), from.size());
  asm volatile("" : : "r"(to.begin()) : "memory");  // The copy is wanted.
}

class Buffer {
  // Written, and aligned as blocks of shared memory are. (glibc's memcpy() takes ten times as long
  // on some processors if the target lies just behind the source, modulo the size of a page; and
  // just there malloc() puts two blocks of a round size.)

public:
  explicit Buffer(size_t bytes): space(kj::heapArray<kj::byte>(bytes + ALIGNMENT)) {
    size_t before = -reinterpret_cast<uintptr_t>(space.begin()) % ALIGNMENT;
    memory = space.slice(before, before + bytes);
    writeAll(memory);
  }
  kj::ArrayPtr<kj::byte> get() { return memory; }

private:
  static constexpr size_t ALIGNMENT = 64;
  kj::Array<kj::byte> space;
  kj::ArrayPtr<kj::byte> memory;
};

class PingPong {
  // Two threads that answer each other.

public:
  virtual ~PingPong() noexcept(false) {}
  virtual void call() = 0;
  // Asks and waits for the answer.
  virtual bool answer() = 0;
  // Waits for a question and answers it. False when there will be no more.
  virtual void end() = 0;
};

class CacheLine final: public PingPong {
public:
  void call() override {
    uint64_t number = ++count;
    question.store(number, std::memory_order_release);
    while (reply.load(std::memory_order_acquire) != number) pause();
  }
  bool answer() override { return answer([]() {}); }
  template <typename Work>
  bool answer(Work&& work) {
    uint64_t number;
    while ((number = question.load(std::memory_order_acquire)) == answered) pause();
    if (number == END) return false;
    work();
    answered = number;
    reply.store(number, std::memory_order_release);
    return true;
  }
  void end() override { question.store(END, std::memory_order_release); }

private:
  static constexpr uint64_t END = ~uint64_t(0);
  // 128 bytes apart: CPUs fetch lines in pairs.
  alignas(128) std::atomic<uint64_t> question { 0 };
  alignas(128) std::atomic<uint64_t> reply { 0 };
  alignas(128) uint64_t count = 0;
  alignas(128) uint64_t answered = 0;
};

class EventFds final: public PingPong {
public:
  EventFds(): question(eventfd(0, EFD_CLOEXEC)), reply(eventfd(0, EFD_CLOEXEC)) {}
  void call() override {
    ring(question, 1);
    wait(reply);
  }
  bool answer() override {
    if (wait(question) != 1) return false;
    ring(reply, 1);
    return true;
  }
  void end() override { ring(question, 2); }

private:
  kj::AutoCloseFd question, reply;

  static void ring(int fd, uint64_t value) { KJ_SYSCALL(write(fd, &value, sizeof(value))); }
  static uint64_t wait(int fd) {
    uint64_t value;
    KJ_SYSCALL(read(fd, &value, sizeof(value)));
    return value;
  }
};

class Sockets final: public PingPong {
public:
  Sockets() {
    int fds[2];
    KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    asker = kj::AutoCloseFd(fds[0]);
    answerer = kj::AutoCloseFd(fds[1]);
  }
  void call() override {
    send(asker);
    receive(asker);
  }
  bool answer() override {
    if (receive(answerer) == 0) return false;
    send(answerer);
    return true;
  }
  void end() override { KJ_SYSCALL(shutdown(asker, SHUT_WR)); }

private:
  kj::AutoCloseFd asker, answerer;

  static void send(int fd) {
    uint64_t word = 1;
    KJ_SYSCALL(write(fd, &word, sizeof(word)));
  }
  static ssize_t receive(int fd) {
    uint64_t word;
    ssize_t n;
    KJ_SYSCALL(n = read(fd, &word, sizeof(word)));
    return n;
  }
};

class Handover final: public PingPong {
  // One writes a block, the other copies it to memory of its own: what any transport must do whose
  // receiver copies. The lines travel between the caches, there and, to be written again, back;
  // unless there are so many blocks, used in turn, that meanwhile they left the other's cache.

public:
  Handover(size_t bytes, size_t count): blocks(bytes * count), copy(bytes) {}
  void call() override {
    size_t bytes = copy.get().size();
    block = blocks.get().slice(begin, begin + bytes);
    begin = (begin + bytes) % blocks.get().size();
    memset(block.begin(), 0, bytes);
    signal.call();
  }
  bool answer() override { return signal.answer([this]() { copyAll(copy.get(), block); }); }
  void end() override { signal.end(); }

private:
  CacheLine signal;
  Buffer blocks, copy;
  size_t begin = 0;
  kj::ArrayPtr<kj::byte> block;  // The present one; ordered by the signal.
};

void work() {
  // About as long as a small call, and always the same: what some take longer is ticks, interrupts
  // and the host.
  uint64_t value = 1;
  for (uint i = 0; i < WORK_STEPS; i++) {
    value = value * 6364136223846793005 + 1;
    asm volatile("" : "+r"(value));  // Each step waits for the one before.
  }
}

kj::Own<PingPong> newPingPong(kj::StringPtr transport, size_t bytes) {
  if (transport == "cache-line") return kj::heap<CacheLine>();
  if (transport == "eventfd") return kj::heap<EventFds>();
  if (transport == "socket") return kj::heap<Sockets>();
  if (transport == "handover") return kj::heap<Handover>(bytes, 1);
  if (transport == "handover-turns") {
    return kj::heap<Handover>(bytes, kj::max(TURNS_BYTES / bytes, size_t(2)));
  }
  KJ_FAIL_REQUIRE("there is no such limit", transport);
}

template <typename Call>
void measure(Latencies& latencies, Task::Reader task, Figures& figures, Call&& call) {
  uint64_t warm = now() + uint64_t(task.getWarmUpSeconds() * 1e9);
  while (now() < warm) call();
  latencies.clear();
  uint64_t begin = now();
  uint64_t end = begin + uint64_t(task.getSeconds() * 1e9);
  uint64_t calls = 0, last = begin;
  do {
    call();
    uint64_t time = now();
    latencies.add(time - last);
    last = time;
    ++calls;
  } while (last < end);
  figures.add("calls", calls);
  figures.add("p50_us", latencies.percentile(0.5));
  figures.add("p99_us", latencies.percentile(0.99));
  figures.add("calls_per_s", calls * 1e9 / (last - begin));
  if (task.getPayloadBytes() > 0) {
    figures.add("bytes_per_s", double(task.getPayloadBytes()) * calls * 1e9 / (last - begin));
  }
}

}  // namespace

void rawLimit(Session& session, Task::Reader task, Figures& figures) {
  if (session.transport.name.startsWith("work")) {
    bool peers = session.transport.name == "work-peer";
    kj::Thread worker([&]() {
      if (peers) pinTo(0, session.peerCore);
      measure(session.latencies, task, figures, &work);
    });
    return;
  }
  if (session.transport.name == "memset") {
    Buffer buffer(task.getPayloadBytes());
    measure(session.latencies, task, figures, [&]() {
      memset(buffer.get().begin(), 0, buffer.get().size());
      asm volatile("" : : "r"(buffer.get().begin()) : "memory");  // The zeroes are wanted.
    });
    return;
  }
  if (session.transport.name == "memcpy") {
    Buffer from(task.getPayloadBytes());
    Buffer to(task.getPayloadBytes());
    measure(session.latencies, task, figures, [&]() { copyAll(to.get(), from.get()); });
    return;
  }

  auto pingPong = newPingPong(session.transport.name, task.getPayloadBytes());
  kj::Thread answerer([&]() {
    pinTo(0, session.peerCore);
    while (pingPong->answer()) {}
  });
  KJ_DEFER(pingPong->end());
  measure(session.latencies, task, figures, [&]() { pingPong->call(); });
}

}  // namespace bench
}  // namespace capnpshm
