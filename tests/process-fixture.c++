// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "process-fixture.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fstream>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <capnp/rpc.capnp.h>

namespace capnpshm {
namespace process {

using conformance::End;
using conformance::Root;
using kj::uint;

namespace {

Resources lookAtResourcesOf(pid_t pid) {
  auto path = pid == 0 ? kj::str("/proc/self") : kj::str("/proc/", pid);
  Resources result { 0, 0 };
  DIR* directory = opendir(kj::str(path, "/fd").cStr());
  KJ_REQUIRE(directory != nullptr, strerror(errno));
  KJ_DEFER(closedir(directory));
  while (readdir(directory) != nullptr) ++result.fds;
  result.fds -= 2 + (pid == 0);  // "." and ".."; ours has the directory's own.
  std::ifstream maps(kj::str(path, "/maps").cStr());
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:capnp-shm") != std::string::npos) ++result.regions;
  }
  return result;
}

}  // namespace

Resources resourcesOf(pid_t pid) {
  auto result = lookAtResourcesOf(pid);
  // UndefinedBehaviorSanitizer opens a pipe for a moment whenever it must know whether memory can
  // be read, so of a process that runs meanwhile the least of several looks counts.
  for (uint i = 0; pid != 0 && i < 4; i++) {
    usleep(1000);
    auto again = lookAtResourcesOf(pid);
    result.fds = kj::min(result.fds, again.fds);
    result.regions = kj::min(result.regions, again.regions);
  }
  return result;
}

// =======================================================================================

PeerProcess::PeerProcess(
    kj::ArrayPtr<const int> sockets, std::vector<std::string> arguments, const char* program) {
  if (program == nullptr) program = PROCESS_PEER;
  int pair[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
  report = kj::AutoCloseFd(pair[0]);
  kj::AutoCloseFd helpers(pair[1]);

  int number;
  KJ_SYSCALL(number = memfd_create("progress", MFD_CLOEXEC));
  kj::AutoCloseFd memory(number);
  KJ_SYSCALL(ftruncate(memory, sizeof(Progress)));
  void* address = mmap(
      nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  KJ_REQUIRE(address != MAP_FAILED, strerror(errno));
  progress = reinterpret_cast<Progress*>(address);

  std::vector<char*> argv;
  // An emulated program does not start another by itself.
  if (EMULATOR[0] != '\0') argv.push_back(const_cast<char*>(EMULATOR));
  argv.push_back(const_cast<char*>(program));
  for (auto& argument: arguments) argv.push_back(&argument[0]);
  argv.push_back(nullptr);
  std::vector<int> inherited { helpers.get(), memory.get() };
  inherited.insert(inherited.end(), sockets.begin(), sockets.end());

  KJ_SYSCALL(pid = fork());
  if (pid == 0) {
    // Only what is allowed between fork() and exec(). First out of the way of each other.
    for (auto& fd: inherited) fd = fcntl(fd, F_DUPFD_CLOEXEC, 100);
    for (size_t i = 0; i < inherited.size(); i++) {
      if (dup2(inherited[i], REPORT_FD + int(i)) < 0) _exit(126);
    }
    execvp(argv[0], argv.data());
    _exit(127);
  }
}

PeerProcess::~PeerProcess() noexcept(false) {
  if (!reaped) {
    ::kill(pid, SIGKILL);
    wait();
  }
  munmap(progress, sizeof(Progress));
}

std::string PeerProcess::line() {
  for (;;) {
    auto end = unread.find('\n');
    if (end != std::string::npos) {
      auto result = unread.substr(0, end);
      unread.erase(0, end + 1);
      return result;
    }
    pollfd waiting { report.get(), POLLIN, 0 };
    int n;
    KJ_SYSCALL(n = poll(&waiting, 1, 100 * 1000));
    KJ_REQUIRE(n == 1, "the helper does not report");
    char buffer[1024];
    ssize_t size;
    KJ_SYSCALL(size = read(report, buffer, sizeof(buffer)));
    KJ_REQUIRE(size > 0, "the helper ended without a report");
    unread.append(buffer, size);
  }
}

bool PeerProcess::hasReported() {
  if (!unread.empty()) return true;
  pollfd waiting { report.get(), POLLIN, 0 };
  return poll(&waiting, 1, 0) == 1;
}

void PeerProcess::proceed() { KJ_SYSCALL(write(report, "\n", 1)); }

void PeerProcess::signal(int number) { KJ_SYSCALL(::kill(pid, number)); }

void PeerProcess::awaitStop() {
  int status;
  KJ_SYSCALL(waitpid(pid, &status, WUNTRACED));
  KJ_REQUIRE(WIFSTOPPED(status), "the helper ended instead", status);
}

int PeerProcess::wait() {
  int status;
  KJ_SYSCALL(waitpid(pid, &status, 0));
  reaped = true;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

// =======================================================================================

std::vector<std::string> ProcessMode::arguments(
    kj::StringPtr role, std::vector<std::string> more) const {
  std::vector<std::string> result { role.cStr() };
  if (!isShared()) result.push_back("twoParty=1");
  if (trust) result.push_back("trust=1");
  if (port) result.push_back("port=1");
  if (!spins) result.push_back("noSpin=1");
  result.insert(result.end(), more.begin(), more.end());
  return result;
}

std::vector<ProcessMode> processModes() {
  return {
    { "TwoParty", EndMode::TWO_PARTY },
    { "Untrusted", EndMode::CONTEXT, false, true },
    { "Trusted", EndMode::CONTEXT, true, true },
    { "TrustedNoPort", EndMode::CONTEXT, true, false },
  };
}

std::vector<ProcessMode> spinningModes() {
  auto result = processModes();
  result.erase(result.begin());
  return result;
}

std::vector<ProcessMode> sharedModes() {
  auto result = spinningModes();
  for (auto& mode: result) mode.spins = false;
  return result;
}

SocketPair newSocketPair() {
  int fds[2];
  KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
  return { kj::AutoCloseFd(fds[0]), kj::AutoCloseFd(fds[1]) };
}

kj::Own<kj::AsyncCapabilityStream> wrapSocket(kj::AsyncIoContext& io, kj::AutoCloseFd fd) {
  return io.lowLevelProvider->wrapUnixSocketFd(fd.release(),
      kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP | kj::LowLevelAsyncIoProvider::ALREADY_CLOEXEC);
}

// =======================================================================================

size_t numberedBytes(uint64_t number) {
  if (number % 23 == 22) return 30000;
  return number % 3 == 2 ? 700 : 32;
}

namespace {

char textByte(uint64_t number, size_t i) { return char('a' + (number * 7 + i) % 26); }

}  // namespace

void sendNumbered(Connection& connection, uint64_t number, size_t bytes) {
  auto message = connection.newOutgoingMessage(0);
  // A Resolve means nothing to the network, and has a text.
  auto exception = message->getBody().initAs<capnp::rpc::Message>().initResolve().initException();
  auto digits = kj::str(number, ' ');
  auto text = exception.initReason(kj::max(bytes, digits.size()));
  for (size_t i = 0; i < text.size(); i++) text[i] = textByte(number, i);
  memcpy(text.begin(), digits.begin(), digits.size());
  message->send();
}

uint64_t readNumbered(capnp::IncomingRpcMessage& message) {
  auto body = message.getBody().getAs<capnp::rpc::Message>();
  KJ_REQUIRE(body.isResolve());
  auto text = body.getResolve().getException().getReason();
  size_t i = 0;
  uint64_t number = 0;
  for (; text[i] != ' '; i++) {
    KJ_REQUIRE(text[i] >= '0' && text[i] <= '9');
    number = number * 10 + (text[i] - '0');
  }
  for (i++; i < text.size(); i++) KJ_REQUIRE(text[i] == textByte(number, i), number, i);
  return number;
}

void runWorkload(Root::Client root, kj::WaitScope& waitScope) {
  // Pipelined, and in order from the first call on.
  kj::Vector<kj::Promise<int64_t>> numbers;
  for (uint i = 0; i < 100; i++) {
    numbers.add(root.sequenceRequest().send().then([](auto&& r) { return r.getValue(); }));
  }
  for (uint i = 0; i < 100; i++) KJ_REQUIRE(numbers[i].wait(waitScope) == i, i);

  for (size_t bytes: { 0, 10, 500, 5000, 300000 }) {
    auto request = root.echoRequest();
    request.setData(conformance::pattern(bytes, 5));
    auto response = request.send().wait(waitScope);
    KJ_REQUIRE(response.getData().size() == bytes);
    KJ_REQUIRE(conformance::isPattern(response.getData(), 5));
  }

  auto make = root.makeRequest();
  make.setName("item");
  auto item = make.send().getItem();
  KJ_REQUIRE(item.nameRequest().send().wait(waitScope).getName() == "item");

  conformance::ServerState mine;
  auto visit = root.visitRequest();
  visit.setItem(kj::heap<conformance::ItemImpl>(mine, "mine"));
  visit.setCount(20);
  KJ_REQUIRE(visit.send().wait(waitScope).getValue() == 20 * 19 / 2);

  auto fail = root.failRequest();
  fail.setKind(uint(kj::Exception::Type::OVERLOADED));
  fail.setText("as asked");
  bool failed = false;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() { fail.send().wait(waitScope); })) {
    KJ_REQUIRE(exception->getType() == kj::Exception::Type::OVERLOADED);
    KJ_REQUIRE(strstr(exception->getDescription().cStr(), "as asked") != nullptr);
    failed = true;
  }
  KJ_REQUIRE(failed);
}

// =======================================================================================

ProcessTest::~ProcessTest() noexcept {
  EXPECT_EQ(-1, waitpid(-1, nullptr, WNOHANG)) << "a child process is left";
}

ProcessTest::Started ProcessTest::start(std::vector<std::string> arguments) {
  auto pair = newSocketPair();
  int socket = pair.peers;
  auto process = kj::heap<PeerProcess>(kj::arrayPtr(&socket, 1), kj::mv(arguments));
  return { kj::mv(process), wrapSocket(io, kj::mv(pair.mine)) };
}

kj::Own<End> ProcessTest::newEnd(
    kj::Own<kj::AsyncIoStream> stream, Side side, bool small, uint maxFds) {
  conformance::LinkOptions options;
  options.maxFds = maxFds;
  return kj::heap<End>(mode().end(side, small), io.unixEventPort, kj::mv(stream), options);
}

kj::Own<Connection> ProcessTest::rawConnection(End& end) {
  if (end.mode.side == Side::CLIENT) return end.connect();
  return end.network.get().accept().wait(io.waitScope);
}

}  // namespace process
}  // namespace capnpshm
