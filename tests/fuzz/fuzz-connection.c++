// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fuzz-connection.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

namespace capnpshm {
namespace fuzz {

namespace {

constexpr uint MAX_FDS = 8;  // In one sendmsg() or recvmsg().

}  // namespace

Socket::Socket(): io(kj::setupAsyncIo()) {
  int number;
  KJ_SYSCALL(number = open("/dev/null", O_RDWR | O_CLOEXEC));
  nothing = kj::AutoCloseFd(number);
}

void Socket::prepare() {
  if (worn) {
    victimsEnd = nullptr;
    int pair[2];
    KJ_SYSCALL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    peersEnd = kj::AutoCloseFd(pair[1]);
    victimsEnd = io.lowLevelProvider->wrapUnixSocketFd(pair[0],
        kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP |
        kj::LowLevelAsyncIoProvider::ALREADY_CLOEXEC);
    worn = false;
    return;
  }
  // What the last execution left.
  byte space[4096];
  kj::Vector<kj::AutoCloseFd> fds;
  for (int end: { peersEnd.get(), KJ_ASSERT_NONNULL(victimsEnd->getFd()) }) {
    while (receive(end, space, fds) > 0) fds.resize(0);
  }
}

bool Socket::send(kj::ArrayPtr<const byte> bytes, kj::ArrayPtr<const int> fds) {
  if (peersEnd == nullptr || bytes.size() == 0) return false;
  struct iovec part { const_cast<byte*>(bytes.begin()), bytes.size() };
  struct msghdr message {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(struct cmsghdr) byte ancillary[CMSG_SPACE(sizeof(int) * MAX_FDS)];
  if (fds.size() > 0) {
    message.msg_control = ancillary;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    auto header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    memcpy(CMSG_DATA(header), fds.begin(), sizeof(int) * fds.size());
  }
  return sendmsg(peersEnd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == ssize_t(bytes.size());
}

size_t Socket::receive(kj::ArrayPtr<byte> space, kj::Vector<kj::AutoCloseFd>& fds) {
  if (peersEnd == nullptr) return 0;
  return receive(peersEnd, space, fds);
}

size_t Socket::receive(
    int socket, kj::ArrayPtr<byte> space, kj::Vector<kj::AutoCloseFd>& fds) {
  struct iovec part { space.begin(), space.size() };
  struct msghdr message {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(struct cmsghdr) byte ancillary[CMSG_SPACE(sizeof(int) * MAX_FDS)];
  message.msg_control = ancillary;
  message.msg_controllen = sizeof(ancillary);
  ssize_t n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return 0;
  for (auto header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    auto numbers = reinterpret_cast<int*>(CMSG_DATA(header));
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) fds.add(kj::AutoCloseFd(numbers[i]));
  }
  return n;
}

void Socket::endWriting() {
  worn = true;
  if (peersEnd != nullptr) ::shutdown(peersEnd, SHUT_WR);
}

void Socket::close() {
  worn = true;
  peersEnd = nullptr;
}

// =======================================================================================

Victim::Victim(Socket& socket, const SharedMemoryContext& context, Side side, uint maxFds)
    : socket(socket),
      network(context, *socket.victimsEnd, maxFds, side,
          capnp::ReaderOptions { LIMIT_WORDS, 16 }),
      connection(open(side)),
      receiving(receive().eagerlyEvaluate([this](kj::Exception&& exception) {
        checkComplaint(exception);
        failure = kj::str(exception);
      })),
      shuttingDown(nullptr) {}

Victim::~Victim() noexcept(false) {
  receiving = nullptr;
  shuttingDown = nullptr;
}

kj::Own<Connection> Victim::open(Side side) {
  if (side == Side::SERVER) return network.accept().wait(socket.io.waitScope);
  capnp::MallocMessageBuilder message(8);
  auto vatId = message.initRoot<capnp::rpc::twoparty::VatId>();
  vatId.setSide(Side::SERVER);
  return KJ_ASSERT_NONNULL(network.connect(vatId));
}

kj::Promise<void> Victim::receive() {
  return connection->receiveIncomingMessage().then(
      [this](kj::Maybe<kj::Own<capnp::IncomingRpcMessage>>&& message) -> kj::Promise<void> {
    KJ_IF_MAYBE(m, message) {
      FUZZ_CHECK((*m)->sizeInWords() <= LIMIT_WORDS, (*m)->sizeInWords());
      attempt([&]() { (*m)->getBody().targetSize(); });
      received(**m);
      if (holdAt < MAX_HELD) held[holdAt] = kj::mv(*m);
      holdAt = MAX_HELD;
      message = nullptr;
      return receive();
    }
    ended = true;
    return kj::READY_NOW;
  });
}

void Victim::send(uint64_t number, size_t bytes, uint firstSegmentWords, bool withFd) {
  if (didShutDown) return;
  auto message = connection->newOutgoingMessage(firstSegmentWords);
  auto data = message->getBody().initAs<capnp::Data>(bytes);
  memset(data.begin(), number, data.size());
  if (withFd) {
    auto fds = kj::heapArray<int>(1);
    fds[0] = socket.nothing;
    message->setFds(kj::mv(fds));
  }
  message->send();
}

void Victim::shutdown() {
  if (didShutDown) return;
  didShutDown = true;
  socket.wearOut();
  shuttingDown = connection->shutdown().eagerlyEvaluate([](kj::Exception&& exception) {
    checkComplaint(exception);
  });
}

// =======================================================================================

void ControlFrame::finish() {
  auto segments = message.getMessage().getSegmentsForOutput();
  KJ_ASSERT(segments.size() == 1 && segments[0].size() < MAX_WORDS);
  uint64_t header = uint64_t(segments[0].size()) << 32;
  memcpy(frame, &header, sizeof(header));
  memcpy(frame + 1, segments[0].begin(), segments[0].asBytes().size());
  size = 1 + segments[0].size();
}

void ControlFrame::lie(Input& input) {
  auto& word = frame[input.below(size)];
  uint64_t value;
  memcpy(&value, &word, sizeof(value));
  value = input.takeValue(value);
  memcpy(&word, &value, sizeof(value));
}

void checkConnections() { checkRecycledRegions(0); }

}  // namespace fuzz
}  // namespace capnpshm
