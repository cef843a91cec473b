// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

namespace capnpshm {

// The moments between which a process that dies leaves something different behind: after each store
// to shared memory, before and after each system call that the library makes itself. (Those that KJ
// makes for us are stepped through from outside.) The kill tests compile the sources once more with
// CAPNP_SHM_FAULT_POINTS, and kill the process at each of them; in the library itself there is
// nothing of it.

#if CAPNP_SHM_FAULT_POINTS
void faultPoint(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE());
// Defined by the program under test.
#else
__attribute__((always_inline)) inline void faultPoint() {}
#endif

}  // namespace capnpshm
