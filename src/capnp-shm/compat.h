// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// All differences between the versions of Cap'n Proto that capnp-shm supports (0.9.2 to 1.4.0).

#include <capnp/common.h>
#include <capnp/rpc.h>
#include <capnp/serialize-async.h>
#include <kj/async-io.h>

namespace capnpshm {
namespace compat {

inline kj::Own<capnp::MessageStream> newMessageStream(kj::AsyncCapabilityStream& stream) {
  // What TwoPartyVatNetwork reads and writes a socket with.
#if CAPNP_VERSION >= 1000000
  return kj::heap<capnp::BufferedMessageStream>(
      stream, capnp::IncomingRpcMessage::getShortLivedCallback());
#else
  return kj::heap<capnp::AsyncCapabilityMessageStream>(stream);
#endif
}

}  // namespace compat
}  // namespace capnpshm
