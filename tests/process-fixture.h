// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// Tests between processes: starting, stopping and killing the helper program (process-peer.c++),
// and what the tests and the helper have in common. The reference is capnp::TwoPartyVatNetwork at
// both ends, as in the conformance suite.

#include "conformance-fixture.h"
#include <atomic>
#include <string>
#include <sys/types.h>

namespace capnpshm {
namespace process {

using conformance::EndMode;
using conformance::Side;
using Connection = capnp::TwoPartyVatNetworkBase::Connection;

struct Resources {
  // What a process holds.

  size_t fds;
  size_t regions;
  // Mappings of shared memory, own and the peer's.

  bool operator==(const Resources& other) const {
    return fds == other.fds && regions == other.regions;
  }
};

Resources resourcesOf(pid_t pid = 0);
// Of a process of ours; 0 for this one.

inline void PrintTo(const Resources& resources, std::ostream* out) {
  *out << resources.fds << " fds, " << resources.regions << " regions";
}

// Where the helper finds what it inherits.
constexpr int REPORT_FD = 3;
constexpr int PROGRESS_FD = 4;
constexpr int SOCKET_FD = 5;  // And following.

using Progress = std::atomic<uint64_t>[8];
// Memory that the helper writes and the test reads, also when the helper is dead; or the other way.

enum : kj::uint {
  FLUSHED = 0,        // Messages which the helper sent and which left its process.
  FORWARD_BYTES = 1,  // What a proxy forwarded from its first socket to its second,
  BACKWARD_BYTES = 2, // and back.
  FAULT_STEPS = 3,    // How many fault points a program that has them has passed.
  PUBLISHED = 4,      // Messages which it has sent and the peer must get, whatever happens,
  BEGUN = 5,          // and those which the peer may get.
  MONOTONIC_JUMP = 6, // By how many seconds the clocks of a program are wrong that looks here; the
  REALTIME_JUMP = 7   // test sets it.
};

class PeerProcess {
  // The helper program, in a process of its own. Killed and waited for by the destructor.

public:
  PeerProcess(kj::ArrayPtr<const int> sockets, std::vector<std::string> arguments,
              const char* program = nullptr);
  // `program` is for a test with a helper of its own, which must expect the same descriptors.
  ~PeerProcess() noexcept(false);
  KJ_DISALLOW_COPY(PeerProcess);

  std::string line();
  // The next line that it reports; blocks. For a test whose event loop need not run meanwhile.

  bool hasReported();
  // Whether line() would not block.

  void proceed();
  // Lets a helper go on which waits for it.

  void signal(int number);
  void awaitStop();
  int wait();
  // For its end: the exit code, or minus the signal that killed it.

  uint64_t getProgress(kj::uint index) const { return (*progress)[index].load(); }
  void setProgress(kj::uint index, uint64_t value) { (*progress)[index].store(value); }
  pid_t getPid() const { return pid; }

private:
  pid_t pid;
  bool reaped = false;
  kj::AutoCloseFd report;
  Progress* progress;
  std::string unread;
};

struct ProcessMode {
  const char* name;
  EndMode::Kind kind;
  bool trust = false;
  bool port = false;
  bool spins = true;

  bool isShared() const { return kind != EndMode::TWO_PARTY; }
  Transport expected() const { return isShared() ? Transport::SHARED_MEMORY : Transport::PLAIN; }
  EndMode end(Side side, bool small = false) const {
    return { kind, side, trust, port, small, false, spins };
  }
  std::vector<std::string> arguments(kj::StringPtr role, std::vector<std::string> more = {}) const;
  // For a helper whose end is made in the same way.
};

inline void PrintTo(const ProcessMode& mode, std::ostream* out) { *out << mode.name; }
inline std::string modeName(const testing::TestParamInfo<ProcessMode>& info) {
  return info.param.name;
}

std::vector<ProcessMode> processModes();
std::vector<ProcessMode> spinningModes();
// Without the reference.

std::vector<ProcessMode> sharedModes();
// The same without spinning: then few calls make a connection go through all that there is.

struct SocketPair {
  kj::AutoCloseFd mine;
  kj::AutoCloseFd peers;
};
SocketPair newSocketPair();

kj::Own<kj::AsyncCapabilityStream> wrapSocket(kj::AsyncIoContext& io, kj::AutoCloseFd fd);

// Messages with a number -----------------------------------------------------

size_t numberedBytes(uint64_t number);
// How large the message of a number is: some are inline, some by reference, some large.

void sendNumbered(Connection& connection, uint64_t number, size_t bytes);
uint64_t readNumbered(capnp::IncomingRpcMessage& message);
// Throws if the contents are not what was sent.

void runWorkload(conformance::Root::Client root, kj::WaitScope& waitScope);
// Calls of all kinds to a server of the conformance suite to which nobody has spoken. Throws
// whatever differs from what is expected.

class ProcessTest: public testing::TestWithParam<ProcessMode>, protected LoopFixture {
protected:
  ~ProcessTest() noexcept override;
  // No child process is left.

  const ProcessMode& mode() { return GetParam(); }

  struct Started {
    kj::Own<PeerProcess> process;
    kj::Own<kj::AsyncCapabilityStream> stream;
  };
  Started start(std::vector<std::string> arguments);
  // A helper at the other end of a stream.

  kj::Own<conformance::End> newEnd(kj::Own<kj::AsyncIoStream> stream, Side side,
      bool small = false, kj::uint maxFds = 0);
  kj::Own<Connection> rawConnection(conformance::End& end);
  // For a test that sends and receives messages itself.

  conformance::ServerState state;
};

}  // namespace process
}  // namespace capnpshm
