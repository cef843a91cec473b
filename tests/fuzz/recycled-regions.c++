// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "recycled-regions.h"

#include "fuzz-oracle.h"
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <kj/debug.h>
#include <kj/vector.h>

namespace capnpshm {
namespace fuzz {

using kj::byte;
using kj::uint;

OwnRegion realCreateRegion(size_t bytes, kj::ArrayPtr<const byte> beginning)
    asm("__real__ZN8capnpshm12createRegionEmN2kj8ArrayPtrIKhEE");
Mapping realMapPeerRegion(int fd, uint64_t announcedBytes, uint64_t maxBytes)
    asm("__real__ZN8capnpshm13mapPeerRegionEimm");
void realUnmap(Mapping* mapping) asm("__real__ZN8capnpshm7MappingD1Ev");

OwnRegion wrappedCreateRegion(size_t bytes, kj::ArrayPtr<const byte> beginning)
    asm("__wrap__ZN8capnpshm12createRegionEmN2kj8ArrayPtrIKhEE");
Mapping wrappedMapPeerRegion(int fd, uint64_t announcedBytes, uint64_t maxBytes)
    asm("__wrap__ZN8capnpshm13mapPeerRegionEimm");
void wrappedUnmap(Mapping* mapping) asm("__wrap__ZN8capnpshm7MappingD1Ev");

namespace {

struct Recycled {
  ino_t inode;
  kj::AutoCloseFd fd;
  kj::ArrayPtr<byte> own;
  kj::ArrayPtr<byte> peers;  // Once mapPeerRegion() has seen it.
  uint users;
};

constexpr size_t MAX_KEPT_BYTES = 4 << 20;
size_t keptBytes = 0;

kj::Vector<Recycled>& pool() {
  static kj::Vector<Recycled> regions;
  return regions;
}

kj::ArrayPtr<byte> moveBetweenGuards(kj::ArrayPtr<byte> mapping) {
  size_t page = sysconf(_SC_PAGESIZE);
  void* guards = mmap(nullptr, mapping.size() + 2 * page, PROT_NONE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  KJ_ASSERT(guards != MAP_FAILED);
  void* target = reinterpret_cast<byte*>(guards) + page;
  void* moved = mremap(mapping.begin(), mapping.size(), mapping.size(),
      MREMAP_MAYMOVE | MREMAP_FIXED, target);
  KJ_ASSERT(moved == target);
  return kj::arrayPtr(reinterpret_cast<byte*>(moved), mapping.size());
}

kj::ArrayPtr<byte> keepMapping(Mapping&& mapping) {
  // Never unmapped, as the caller's `mapping` forgets it.
  auto bytes = mapping.bytes();
  alignas(Mapping) byte forgotten[sizeof(Mapping)];
  kj::ctor(*reinterpret_cast<Mapping*>(forgotten), kj::mv(mapping));
  return moveBetweenGuards(bytes);
}

Recycled* findByFd(int fd) {
  struct stat stats;
  if (fstat(fd, &stats) < 0) return nullptr;
  for (auto& region: pool()) {
    if (region.inode == stats.st_ino && size_t(stats.st_size) == region.own.size()) return &region;
  }
  return nullptr;
}

int duplicate(int fd) {
  int result;
  KJ_SYSCALL(result = fcntl(fd, F_DUPFD_CLOEXEC, 0));
  return result;
}

}  // namespace

OwnRegion wrappedCreateRegion(size_t bytes, kj::ArrayPtr<const byte> beginning) {
  for (auto& region: pool()) {
    if (region.users == 0 && region.own.size() == bytes) {
      region.users = 1;
      if (beginning.size() > 0) memcpy(region.own.begin(), beginning.begin(), beginning.size());
      return { kj::AutoCloseFd(duplicate(region.fd)), Mapping(region.own.begin(), bytes) };
    }
  }
  auto fresh = realCreateRegion(bytes, beginning);
  if (keptBytes + bytes > MAX_KEPT_BYTES) return fresh;
  keptBytes += bytes;
  struct stat stats;
  KJ_SYSCALL(fstat(fresh.fd, &stats));
  auto own = keepMapping(kj::mv(fresh.mapping));
  pool().add(Recycled { stats.st_ino, kj::AutoCloseFd(duplicate(fresh.fd)), own, nullptr, 1 });
  return { kj::mv(fresh.fd), Mapping(own.begin(), bytes) };
}

Mapping wrappedMapPeerRegion(int fd, uint64_t announcedBytes, uint64_t maxBytes) {
  auto region = findByFd(fd);
  if (region == nullptr || announcedBytes != region->own.size() || announcedBytes > maxBytes) {
    return realMapPeerRegion(fd, announcedBytes, maxBytes);
  }
  if (region->peers == nullptr) {
    region->peers = keepMapping(realMapPeerRegion(fd, announcedBytes, maxBytes));
  }
  ++region->users;
  return Mapping(region->peers.begin(), region->peers.size());
}

void wrappedUnmap(Mapping* mapping) {
  auto begin = mapping->bytes().begin();
  if (begin != nullptr) {
    for (auto& region: pool()) {
      if (begin == region.own.begin() || begin == region.peers.begin()) {
        if (--region.users == 0) memset(region.own.begin(), 0, region.own.size());
        return;
      }
    }
  }
  realUnmap(mapping);
}

kj::Maybe<kj::ArrayPtr<byte>> findRegion(int fd) {
  auto region = findByFd(fd);
  if (region == nullptr) return nullptr;
  return region->own;
}

bool isPeersMapping(const void* address) {
  for (auto& region: pool()) {
    if (region.peers.begin() <= address && address < region.peers.end()) return true;
  }
  return false;
}

void checkRecycledRegions(uint inUse) {
  uint used = 0, mappings = 0;
  for (auto& region: pool()) {
    used += region.users > 0;
    mappings += region.peers == nullptr ? 1 : 2;
  }
  FUZZ_CHECK(used == inUse, used, " regions in use instead of ", inUse);
  checkResources(pool().size(), mappings);
}

}  // namespace fuzz
}  // namespace capnpshm
