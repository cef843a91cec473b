// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/array.h>
#include <kj/common.h>

namespace capnpshm {

constexpr size_t HUGE_PAGE = 2 * 1024 * 1024;
// In bytes, on machines with pages of 4 KiB. Where huge pages have another size these functions do
// no harm and little good.
//
// What is touched for the first time costs a page fault for each 4 KiB, in the writer and, less
// often, in the reader: 0.2 µs each on bare metal, and up to 10 µs on guests whose hypervisor
// shadows the page tables. There the first message of 1 MiB would take longer than the next
// hundred.

void* mapAligned(size_t bytes, int protection, int flags, int fd);
// As mmap() with offset 0 at an address of the kernel's choice, but from HUGE_PAGE bytes on at a
// multiple of HUGE_PAGE, without which no huge page can be mapped. MAP_FAILED and errno if the
// system refuses. The caller unmaps `bytes`. Any thread.

void allocateHugePages(int fd, kj::ArrayPtr<kj::byte> mapped);
// Allocates in huge pages what it can of a memfd that is `mapped` whole, wherever a whole one fits
// in; there may be pages already, which keep their contents. A matter of speed alone: stays silent,
// and leaves holes for the caller to fill, where the kernel cannot (MADV_COLLAPSE is known since
// Linux 6.1), has no huge pages to spare, or takes too long to find some. Any thread.

void populatePages(kj::ArrayPtr<kj::byte> mapped);
// Maps the pages of shared memory, allocated already, for writing, all at once instead of by a
// fault for each. A matter of speed alone: silent where the kernel cannot (before Linux 5.14). Any
// thread.

}  // namespace capnpshm
