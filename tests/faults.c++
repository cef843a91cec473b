// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "faults.h"

#include "process-fixture.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

namespace capnpshm {
namespace process {

namespace {

bool onSocket(const SystemCall& call) { return call.arguments[0] == SOCKET_FD; }
bool isMemfd(const SystemCall& call) { return call.number == SYS_memfd_create; }
bool isMemfdWithNoexec(const SystemCall& call) {
  return isMemfd(call) && (call.arguments[1] & ~uint64_t(MFD_CLOEXEC | MFD_ALLOW_SEALING)) != 0;
}
bool isTruncate(const SystemCall& call) { return call.number == SYS_ftruncate; }
bool isAllocate(const SystemCall& call) { return call.number == SYS_fallocate; }
bool isMapping(const SystemCall& call, int protection) {
  return call.number == SYS_mmap && int(call.arguments[2]) == protection &&
      (call.arguments[3] & MAP_TYPE) == MAP_SHARED;
}
bool isOwnMapping(const SystemCall& call) { return isMapping(call, PROT_READ | PROT_WRITE); }
bool isPeersMapping(const SystemCall& call) { return isMapping(call, PROT_READ); }
bool isAdvice(const SystemCall& call) {
  return call.number == SYS_madvise && call.arguments[2] == MADV_DONTFORK;
}
bool isFcntl(const SystemCall& call, uint64_t command) {
  return call.number == SYS_fcntl && call.arguments[1] == command;
}
bool isSealing(const SystemCall& call) { return isFcntl(call, F_ADD_SEALS); }
bool isSealCheck(const SystemCall& call) { return isFcntl(call, F_GET_SEALS); }
bool isDuplication(const SystemCall& call) { return isFcntl(call, F_DUPFD_CLOEXEC); }
bool isFstatfs(const SystemCall& call) { return call.number == SYS_fstatfs; }
bool isFstat(const SystemCall& call) {
  return call.number == SYS_fstat ||
      (call.number == SYS_newfstatat && (call.arguments[3] & AT_EMPTY_PATH) != 0);
}
bool isGetrandom(const SystemCall& call) { return call.number == SYS_getrandom; }
bool isEventfd(const SystemCall& call) { return call.number == SYS_eventfd2; }
bool isSocketBell(const SystemCall& call) {
  // On the control socket, or on one for bells; nothing else is sent in this way.
  return call.number == SYS_sendto;
}
bool isEventBell(const SystemCall& call) {
  return call.number == SYS_write && call.arguments[2] == 8 && call.arguments[0] > 5;
}
bool isReceive(const SystemCall& call) { return call.number == SYS_recvmsg && onSocket(call); }
bool isRead(const SystemCall& call) {
  return (call.number == SYS_read || call.number == SYS_readv || call.number == SYS_recvmsg) &&
      onSocket(call);
}
bool isWrite(const SystemCall& call) {
  return (call.number == SYS_write || call.number == SYS_writev || call.number == SYS_sendmsg) &&
      onSocket(call);
}
bool isSocketTransfer(const SystemCall& call) { return isRead(call) || isWrite(call); }
bool isWait(const SystemCall& call) {
#ifdef SYS_epoll_wait
  if (call.number == SYS_epoll_wait) return true;
#endif
  return call.number == SYS_epoll_pwait;
}

const char* const CANNOT_MAKE = "this side cannot make shared memory";
const char* const CANNOT_MAP = "cannot map the peer's shared memory";
const char* const NO_FDS_PASS = "file descriptors do not pass";

}  // namespace

bool isLargeAllocation(const SystemCall& call) {
  // A mapping, or more heap when it cannot have that.
  return (call.number == SYS_mmap && (call.arguments[3] & MAP_ANONYMOUS) != 0 &&
          call.arguments[1] > LARGE) || call.number == SYS_brk;
}

std::vector<Fault> faults() {
  using O = Outcome;
  constexpr auto FAIL = Effect::FAIL;
  constexpr auto S = Phase::SET_UP;
  constexpr auto G = Phase::GROWTH;
  constexpr auto Y = Phase::STEADY;
  return {
    // Its own memory: at the beginning it does without, later with what it has.
    { "MemfdRefused", isMemfd, FAIL, { EMFILE, ENFILE, ENOMEM, EPERM, ENOSYS }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAKE },
    { "MemfdFlagUnknown", isMemfdWithNoexec, FAIL, { EINVAL }, S, EVERY, O::WORKS, "" },
    { "MemfdRefusedLater", isMemfd, FAIL, { EMFILE, ENFILE, ENOMEM, EPERM }, G, EVERY,
      O::WORKS, "" },
    { "TruncateRefused", isTruncate, FAIL, { ENOSPC, ENOMEM, EFBIG, EPERM }, S, EVERY,
      O::STAYS_PLAIN, "shared memory" },  // Its own, or the check of the peer's.
    { "TruncateInterrupted", isTruncate, FAIL, { EINTR }, S, 3, O::WORKS, "" },
    { "TruncateRefusedLater", isTruncate, FAIL, { ENOSPC, ENOMEM }, G, EVERY, O::WORKS, "" },
    { "AllocateRefused", isAllocate, FAIL, { ENOSPC, ENOMEM, EPERM }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAKE },
    { "AllocateInterrupted", isAllocate, FAIL, { EINTR }, S, 3, O::WORKS, "" },
    { "AllocateInterruptedLater", isAllocate, FAIL, { EINTR }, G, 3, O::WORKS, "" },
    { "AllocateRefusedLater", isAllocate, FAIL, { ENOSPC, ENOMEM }, G, EVERY, O::WORKS, "" },
    { "MapRefused", isOwnMapping, FAIL, { ENOMEM, EPERM }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAKE },
    { "MapRefusedLater", isOwnMapping, FAIL, { ENOMEM }, G, EVERY, O::WORKS, "" },
    { "SealRefused", isSealing, FAIL, { EINVAL, EPERM }, S, EVERY, O::STAYS_PLAIN, CANNOT_MAKE },
    { "SealRefusedLater", isSealing, FAIL, { EINVAL }, G, EVERY, O::WORKS, "" },
    { "AdviceRefused", isAdvice, FAIL, { ENOMEM, EINVAL, EPERM }, S, EVERY, O::STAYS_PLAIN, "" },
    { "AdviceRefusedLater", isAdvice, FAIL, { ENOMEM, EINVAL, EPERM }, G, EVERY, O::WORKS, "" },

    // The peer's.
    { "PeersMapRefused", isPeersMapping, FAIL, { ENOMEM, EPERM, EACCES }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAP },
    { "PeersMapRefusedLater", isPeersMapping, FAIL, { ENOMEM, EPERM }, G, EVERY, O::WORKS, "" },
    { "SealCheckRefused", isSealCheck, FAIL, { EPERM, ENOSYS }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAP },
    { "SealCheckRefusedLater", isSealCheck, FAIL, { EPERM }, G, EVERY, O::WORKS, "" },
    { "FstatfsRefused", isFstatfs, FAIL, { EPERM, ENOSYS, ENOMEM }, S, EVERY,
      O::STAYS_PLAIN, CANNOT_MAP },
    { "FstatfsInterrupted", isFstatfs, FAIL, { EINTR }, S, 3, O::WORKS, "" },
    { "FstatfsRefusedLater", isFstatfs, FAIL, { EPERM }, G, EVERY, O::WORKS, "" },
    { "FstatRefused", isFstat, FAIL, { EPERM, ENOMEM }, S, EVERY, O::STAYS_PLAIN, CANNOT_MAP },
    { "FstatRefusedLater", isFstat, FAIL, { EPERM }, G, EVERY, O::WORKS, "" },

    // Set-up otherwise.
    { "NoRandomNumbers", isGetrandom, FAIL, { ENOSYS, EPERM }, S, EVERY, O::WORKS, "" },
    { "RandomNumbersInterrupted", isGetrandom, FAIL, { EINTR }, S, 3, O::WORKS, "" },
    { "NoEventfd", isEventfd, FAIL, { EMFILE, ENFILE, ENOMEM, EPERM }, S, EVERY, O::WORKS, "",
      Fault::TRUSTED },
    { "OfferWithoutFds", isReceive, Effect::NO_FDS, {}, S, EVERY, O::STAYS_PLAIN, NO_FDS_PASS },

    // File descriptors of messages and regions.
    { "RegionsWithoutFds", isReceive, Effect::NO_FDS, {}, G, EVERY, O::LOSES_FDS, "" },
    { "MessagesWithoutFds", isReceive, Effect::NO_FDS, {}, Y, EVERY, O::LOSES_FDS, "" },
    { "NoFdForMessage", isDuplication, FAIL, { EMFILE, EPERM }, Y, EVERY, O::CALL_FAILS,
      "cannot send a file descriptor" },

    // The socket.
    { "SetUpInterrupted", isSocketTransfer, FAIL, { EINTR }, S, 20, O::WORKS, "" },
    { "GrowthInterrupted", isSocketTransfer, FAIL, { EINTR }, G, 20, O::WORKS, "" },
    { "SteadyInterrupted", isSocketTransfer, FAIL, { EINTR }, Y, 20, O::WORKS, "" },
    { "SetUpByteByByte", isSocketTransfer, Effect::SHORT, {}, S, EVERY, O::WORKS, "" },
    { "GrowthByteByByte", isSocketTransfer, Effect::SHORT, {}, G, EVERY, O::WORKS, "" },
    { "SteadyByteByByte", isSocketTransfer, Effect::SHORT, {}, Y, EVERY, O::WORKS, "" },
    { "ReadFails", isRead, FAIL, { ENOMEM, ENOBUFS, EIO }, S, 1, O::CONNECTION_FAILS, "" },
    { "ReadFailsLater", isRead, FAIL, { ENOMEM, ENOBUFS, EIO }, G, 1, O::CONNECTION_FAILS, "" },
    { "WriteFails", isWrite, FAIL, { ENOMEM, ENOBUFS, ETOOMANYREFS }, S, 1,
      O::CONNECTION_FAILS, "" },
    { "WriteFailsLater", isWrite, FAIL, { ENOMEM, ENOBUFS, ETOOMANYREFS }, G, 1,
      O::CONNECTION_FAILS, "" },

    // Bells and waiting.
    { "BellInterrupted", isSocketBell, FAIL, { EINTR }, Y, 20, O::WORKS, "", Fault::UNTRUSTED },
    { "BellWithoutMemory", isSocketBell, FAIL, { ENOBUFS, ENOMEM }, Y, EVERY, O::WORKS, "",
      Fault::UNTRUSTED },
    { "EventBellInterrupted", isEventBell, FAIL, { EINTR }, Y, 20, O::WORKS, "",
      Fault::TRUSTED },
    { "WaitInterrupted", isWait, FAIL, { EINTR }, G, 50, O::WORKS, "" },

    // Private memory for a large message.
    { "NoMemoryForACopy", isLargeAllocation, FAIL, { ENOMEM }, G, EVERY,
      O::CONNECTION_FAILS, "" , Fault::UNTRUSTED },
  };
}

}  // namespace process
}  // namespace capnpshm
