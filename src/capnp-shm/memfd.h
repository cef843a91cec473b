// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/array.h>
#include <kj/common.h>
#include <kj/exception.h>
#include <kj/io.h>
#include <kj/memory.h>

namespace capnpshm {

uint64_t forkGeneration();
// Counts the fork() calls between the first process that made a region and this one. Mappings are
// not inherited by a child (MADV_DONTFORK), so whatever refers to one remembers the generation in
// which it was made and is inert in any other. May be called on any thread.

class Mapping {
  // A range of mapped shared memory; unmapped by the destructor.
  //
  // Invariant: the file behind it can neither shrink nor grow, so no access within `bytes()` can
  // fault. In a fork child the range is not mapped; the destructor leaves it alone there.

public:
  Mapping(kj::byte* begin, size_t size);
  Mapping(Mapping&& other);
  ~Mapping() noexcept(false);
  KJ_DISALLOW_COPY(Mapping);

  kj::ArrayPtr<kj::byte> bytes() const { return range; }

private:
  kj::ArrayPtr<kj::byte> range;
  uint64_t generation;
};

struct OwnRegion {
  // A region that this process writes and the peer reads: a memfd, sized, allocated whole, mapped
  // read-write here, and sealed so that whoever receives the fd can map it read-only only.

  kj::AutoCloseFd fd;
  Mapping mapping;
};

OwnRegion createRegion(size_t bytes, kj::ArrayPtr<const kj::byte> beginning = nullptr);
// Creates a region of `bytes` bytes, a positive multiple of the page size: `beginning`, which is
// written without touching the mapping, and zeros behind it. Throws a kj::Exception naming the
// failed call if the system refuses: memfd_create forbidden or unknown, no memory (ENOSPC, ENOMEM),
// no descriptor left (EMFILE), no F_SEAL_FUTURE_WRITE (before Linux 5.1). Any thread.

Mapping mapPeerRegion(int fd, uint64_t announcedBytes, uint64_t maxBytes);
// Maps read-only a region which the peer created and whose fd it sent. `fd` stays the caller's
// and may be closed afterwards.
//
// Two things can go wrong, and the difference matters (see handshake.h):
// - `fd` is not what the protocol demands (seals, file system, size, holes), or `announcedBytes`
//   is not a size we accept: throws type FAILED. The peer is broken or hostile.
// - This process cannot map it (limits, seccomp): throws type OVERLOADED. Nobody's fault.
//
// The checks are made in an order in which none can block, whatever kind of file the fd is: seals
// first, because a FUSE file answers that without asking its server.

// ---------------------------------------------------------------------------------------
// What regions and sealed segments (sealed.h) have in common

OwnRegion newSharedMemory(size_t bytes);
// A memfd of `bytes` zeroed bytes, a positive multiple of the page size, allocated whole, mapped
// for this process alone and not sealed yet. Throws as createRegion() does. Any thread.

void keepToThisProcess(kj::ArrayPtr<kj::byte> mapped);
// Keeps a mapping out of fork children and core dumps. To be called before a Mapping is used, and
// again whenever something else was mapped in its place.

void requirePeerMemfd(int fd, int requiredSeals, uint64_t announcedBytes);
// Throws unless `fd`, which the peer sent, is an ordinary memfd of this size with at least these
// seals and without holes.

}  // namespace capnpshm
