// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <capnp-shm/memfd.h>

namespace capnpshm {
namespace fuzz {

// Regions that are zeroed and used again rather than made anew for each execution, which would take
// longer than all the rest. A fuzzer linked with this needs no change for it: by the linker's
// `--wrap`, the library's calls of createRegion(), mapPeerRegion() and Mapping::~Mapping() come
// here, and whatever is not of ours goes on to the real ones.
//
// Each region lies between pages that cannot be touched.

kj::Maybe<kj::ArrayPtr<kj::byte>> findRegion(int fd);
// The memory of a region that createRegion() made, by any of its descriptors.

bool isPeersMapping(const void* address);
// Whether it lies in what mapPeerRegion() gave.

void checkRecycledRegions(kj::uint inUse);
// Between two executions: that nobody has a region but those whom the fuzzer keeps; and what
// checkResources() checks.

}  // namespace fuzz
}  // namespace capnpshm
