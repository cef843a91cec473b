// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "processes.h"

#include <capnp/serialize.h>
#include <fcntl.h>
#include <kj/debug.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ;

namespace capnpshm {
namespace bench {

namespace {

constexpr int FIRST_FD = 3;

struct Pipe {
  kj::AutoCloseFd readEnd, writeEnd;
};

Pipe newPipe() {
  int fds[2];
  KJ_SYSCALL(pipe2(fds, O_CLOEXEC));
  return { kj::AutoCloseFd(fds[0]), kj::AutoCloseFd(fds[1]) };
}

struct Listener {
  kj::AutoCloseFd fd;
  kj::String name;  // In the abstract namespace, so that nothing is left behind.
};

Listener newListener(bool bound) {
  static uint count = 0;
  auto name = kj::str("capnp-shm-bench-", getpid(), '-', ++count);
  kj::AutoCloseFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!bound) return { kj::mv(fd), kj::mv(name) };
  struct sockaddr_un address;
  memset(&address, 0, sizeof(address));
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path + 1, name.begin(), name.size());
  KJ_SYSCALL(bind(fd, reinterpret_cast<struct sockaddr*>(&address),
      offsetof(struct sockaddr_un, sun_path) + 1 + name.size()));
  KJ_SYSCALL(listen(fd, SOMAXCONN));
  return { kj::mv(fd), kj::mv(name) };
}

}  // namespace

Child::Child(kj::ArrayPtr<const kj::String> arguments, kj::ArrayPtr<const int> fds) {
  // Copies above all targets first, so that no dup2() overwrites what a later one needs.
  auto copies = KJ_MAP(fd, fds) {
    int copy;
    KJ_SYSCALL(copy = fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FD + int(fds.size())));
    return kj::AutoCloseFd(copy);
  };
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  KJ_DEFER(posix_spawn_file_actions_destroy(&actions));
  for (size_t i = 0; i < copies.size(); i++) {
    posix_spawn_file_actions_adddup2(&actions, copies[i], FIRST_FD + i);
  }

  kj::Vector<char*> argv;
  char name[] = "capnp-shm-bench";
  argv.add(name);
  for (auto& argument: arguments) argv.add(const_cast<char*>(argument.cStr()));
  argv.add(nullptr);
  int error = posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.begin(), environ);
  if (error != 0) KJ_FAIL_SYSCALL("posix_spawn()", error);
}

Child::~Child() noexcept(false) {
  if (pid == 0) return;
  kill(pid, SIGKILL);
  int status;
  KJ_SYSCALL(waitpid(pid, &status, 0));
}

void dieWithParent() { KJ_SYSCALL(prctl(PR_SET_PDEATHSIG, SIGKILL)); }

Pair::Pair(const TransportSpec& transport, uint clientCore, uint serverCore)
    : transport(transport) {
  // Another library listens by itself.
  auto listener = newListener(transport.kind != TransportSpec::PEER);
  if (transport.hasServer()) {
    kj::String arguments[] = {
      kj::str("--role=server"), kj::str("--transport=", transport.name),
      kj::str("--core=", serverCore), kj::str("--address=", listener.name)
    };
    server = kj::heap<Child>(
        kj::arrayPtr(arguments, kj::size(arguments)), kj::arr<int>(listener.fd));
  }

  auto taskPipe = newPipe();
  auto outcomePipe = newPipe();
  kj::String arguments[] = {
    kj::str("--role=client"), kj::str("--transport=", transport.name),
    kj::str("--core=", clientCore), kj::str("--address=", listener.name),
    kj::str("--peer-core=", serverCore),
    kj::str("--server-pid=", server.get() == nullptr ? 0 : server->getPid())
  };
  client = kj::heap<Child>(kj::arrayPtr(arguments, kj::size(arguments)),
      kj::arr<int>(taskPipe.readEnd, outcomePipe.writeEnd));
  tasks = kj::mv(taskPipe.writeEnd);
  outcomes = kj::mv(outcomePipe.readEnd);
}

kj::Own<capnp::MessageReader> Pair::run(capnp::MessageBuilder& task) {
  capnp::writeMessageToFd(tasks, task);
  return kj::heap<capnp::StreamFdMessageReader>(int(outcomes));
}

double Pair::cpuSeconds() const {
  double result = cpuSecondsOf(clientPid());
  if (serverPid() != clientPid()) result += cpuSecondsOf(serverPid());
  return result;
}

}  // namespace bench
}  // namespace capnpshm
