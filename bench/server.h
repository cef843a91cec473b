// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// The server that is measured.

#include "bench.capnp.h"
#include "transports.h"
#include <kj/common.h>
#include <set>

namespace capnpshm {
namespace bench {

uint64_t writeAll(kj::ArrayPtr<kj::byte> data);
// Writes every byte of a payload, and returns what sumOf() will return for it.

uint64_t sumOf(kj::ArrayPtr<const kj::byte> data);
// Reads every byte of a payload.

typedef std::set<Link*> Links;

kj::Own<Target::Server> newTarget(const Links& links);
// `links`: the server's ends of the connections, whose counters it reports.

void serve(const TransportSpec& transport, int listenFd);
// Serves all who connect, until the process is killed.

}  // namespace bench
}  // namespace capnpshm
