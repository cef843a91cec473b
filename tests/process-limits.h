// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/string.h>

namespace capnpshm {
namespace process {

void deny(kj::StringPtr what);
// Takes something away from this process for good, as sandboxes and limits do:
// - "memfd": memfd_create() fails with EPERM.
// - "map": mapping a file shared and read-only, as a peer's region is, fails with ENOMEM.
// - "private-map": the same for mapping it private, as a sealed segment is.
// - "files": no further file descriptor can be opened or received.

}  // namespace process
}  // namespace capnpshm
