// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "processes.h"

namespace capnpshm {
namespace bench {

kj::Maybe<double> systemCallsByStrace(Pair& pair, Task::Builder task, bool quick);
// System calls per call, both sides together, counted by the program strace in some hundred calls;
// or, unless it must be quick, in as many as go into a tenth of a second. For processes with
// several threads, and for machines where neither the kernel's tracepoint is ours to use nor a
// SystemCallTrap works. Nothing if there is no strace either.

}  // namespace bench
}  // namespace capnpshm
