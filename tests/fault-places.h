// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The fault points of the library that a FAULT_PEER passes, by its own account.

#include "process-fixture.h"

#include <map>
#include <string>

namespace capnpshm {
namespace process {

using Places = std::map<std::string, uint64_t>;
// How often each was passed; they are named by file and line.

std::string reportOfPlaces(PeerProcess& process);
// Waits for the line that has them. Throws what PeerProcess::line() throws.

Places placesOf(const std::string& report);

}  // namespace process
}  // namespace capnpshm
