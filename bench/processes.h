// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The processes that the driver starts: this same program again, with other arguments.

#include "bench.capnp.h"
#include "meter.h"
#include "transports.h"
#include <kj/io.h>

namespace capnpshm {
namespace bench {

class Child {
  // A process that is killed when this is destroyed, and that dies with its parent.

public:
  Child(kj::ArrayPtr<const kj::String> arguments, kj::ArrayPtr<const int> fds);
  // The child finds `fds` as 3, 4, ...

  Child(Child&& other): pid(other.pid) { other.pid = 0; }
  ~Child() noexcept(false);
  KJ_DISALLOW_COPY(Child);

  pid_t getPid() const { return pid; }

private:
  pid_t pid;
};

void dieWithParent();
// Called by the children.

class Pair {
  // A client process and, where there is one, its server process.

public:
  Pair(const TransportSpec& transport, uint clientCore, uint serverCore);

  const TransportSpec& transport;

  kj::Own<capnp::MessageReader> run(capnp::MessageBuilder& task);
  // Has the client do a Task and returns its Outcome.

  pid_t clientPid() const { return client->getPid(); }
  pid_t serverPid() const { return server.get() == nullptr ? clientPid() : server->getPid(); }
  double cpuSeconds() const;

private:
  kj::Own<Child> server;
  kj::Own<Child> client;
  kj::AutoCloseFd tasks;
  kj::AutoCloseFd outcomes;
};

}  // namespace bench
}  // namespace capnpshm
