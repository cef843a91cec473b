// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "sealed.h"

#include "huge-pages.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;
using kj::uint;

namespace {

constexpr int REQUIRED_SEALS = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;

constexpr uint MAX_OPEN_FILES = 64;
// Of buffers being built. An application may have any number of unsent messages.

constexpr uint64_t MAX_SEGMENT_WORDS = (uint64_t(1) << 29) - 1;

size_t roundUpToPages(size_t bytes) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  return (bytes + pageSize - 1) / pageSize * pageSize;
}

}  // namespace

// =======================================================================================
// Sending

SealedBuffer::~SealedBuffer() noexcept(false) {
  // Relaxed: a mere count, nothing is ordered by it.
  if (fd != nullptr) sender.openFiles.fetch_sub(1, std::memory_order_relaxed);
}

bool SealedBuffer::trySeal() {
  // The kernel refuses the seal as long as there is a shared writable mapping, which cannot be
  // made private but by mapping anew. NORESERVE, so that this needs no memory: pages are copied
  // only if they are written once more.
  auto range = mapping.bytes();
  constexpr int READ_WRITE = PROT_READ | PROT_WRITE;
  bool isPrivate = mmap(range.begin(), range.size(), READ_WRITE,
      MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, 0) != MAP_FAILED;
  if (!isPrivate) {
    // What was there may be gone, but the file still has it all.
    void* again = mmap(range.begin(), range.size(), READ_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (again == MAP_FAILED) {
      KJ_FAIL_SYSCALL("mmap()", errno, "lost the memory of a message", range.size());
    }
  }
  keepToThisProcess(range);
  return isPrivate && fcntl(fd, F_ADD_SEALS, REQUIRED_SEALS | F_SEAL_SEAL) == 0;
}

kj::AutoCloseFd SealedBuffer::takeFd() {
  sender.openFiles.fetch_sub(1, std::memory_order_relaxed);
  return kj::mv(fd);
}

kj::Maybe<kj::Own<SealedBuffer>> SealedSender::tryCreate(size_t bytes) {
  if (stopped || bytes < limits.thresholdBytes || bytes > limits.largestBytes ||
      bytes > MAX_SEGMENT_WORDS * sizeof(word)) {
    return nullptr;
  }
  size_t size = roundUpToPages(bytes);
  if (size > limits.largestBytes || size > limits.totalBytes - givenBytes) return nullptr;
  if (openFiles.load(std::memory_order_relaxed) >= MAX_OPEN_FILES) return nullptr;

  kj::Maybe<kj::Own<SealedBuffer>> result;
  KJ_IF_MAYBE(exception, kj::runCatchingExceptions([&]() {
    // Kept to this process, since a fork child's mapping, too, would be in the way of the seal.
    auto memory = newSharedMemory(size);
    // It is made to be filled, and a fault for each page costs several times as much.
    populatePages(memory.mapping.bytes());
    result = kj::heap<SealedBuffer>(*this, kj::mv(memory.fd), kj::mv(memory.mapping));
    openFiles.fetch_add(1, std::memory_order_relaxed);
  })) {
    // No memory or no fds; there are other ways to send a message.
    (void)exception;
  }
  return result;
}

bool SealedSender::trySeal(SealedBuffer& buffer, size_t usedBytes) {
  size_t size = buffer.bytes().size();
  if (stopped || usedBytes < limits.thresholdBytes || size > limits.totalBytes - givenBytes) {
    return false;
  }
  if (!buffer.trySeal()) {
    // Whatever is in the way may be in the way of the next one, and the attempt is expensive.
    stopped = true;
    return false;
  }
  givenBytes += size;
  return true;
}

kj::ArrayPtr<word> SealedSegments::tryAllocate(SealedSender& newSender, size_t bytes) {
  if (buffers.size() >= MAX_SEALED_SEGMENTS) return nullptr;
  KJ_IF_MAYBE(buffer, newSender.tryCreate(bytes)) {
    sender = newSender;
    auto memory = (*buffer)->bytes();
    buffers.add(kj::mv(*buffer));
    return kj::arrayPtr(reinterpret_cast<word*>(memory.begin()),
        kj::min(memory.size() / sizeof(word), MAX_SEGMENT_WORDS));
  }
  return nullptr;
}

kj::Vector<SealedSegments::File> SealedSegments::seal(
    kj::ArrayPtr<const kj::ArrayPtr<const word>> segments) {
  kj::Vector<File> result;
  KJ_IF_MAYBE(s, sender) {
    for (auto& buffer: buffers) {
      auto begin = reinterpret_cast<const word*>(buffer->bytes().begin());
      for (auto& segment: segments) {
        if (segment.begin() == begin && s->trySeal(*buffer, segment.size() * sizeof(word))) {
          sealed.add(begin);
          result.add(File { buffer->takeFd(), buffer->bytes().size() });
        }
      }
    }
  }
  return result;
}

kj::Maybe<uint32_t> SealedSegments::find(const word* segment) const {
  for (uint i = 0; i < sealed.size(); i++) {
    if (sealed[i] == segment) return SEALED_SEGMENT | i;
  }
  return nullptr;
}

// =======================================================================================
// Receiving

void claimSealed(kj::ArrayPtr<SealedFile> files, const SegmentEntry& entry) {
  uint32_t number = entry.region & ~SEALED_SEGMENT;
  KJ_REQUIRE(number < files.size(),
      "peer's descriptor refers to a sealed segment that does not belong to it",
      number, files.size());
  auto& file = files[number];
  KJ_REQUIRE(file.fd != nullptr,
      "peer's descriptor refers to a sealed segment whose file did not arrive", number);
  KJ_REQUIRE(!file.claimed, "peer's descriptor refers to a sealed segment twice", number);
  KJ_REQUIRE(entry.offset == 0 && entry.words > 0 &&
             uint64_t(entry.words) * sizeof(word) <= file.bytes,
      "peer's descriptor refers to memory outside its sealed segment",
      entry.offset, entry.words, file.bytes);
  file.claimed = true;
}

SealedSegment::SealedSegment(kj::Own<SealedBudget> budget, Mapping mappingParam, size_t words)
    : budget(kj::mv(budget)),
      words(kj::arrayPtr(
          reinterpret_cast<const word*>(mappingParam.bytes().begin()), words)) {
  mapping = kj::mv(mappingParam);
}

SealedSegment::~SealedSegment() noexcept(false) {
  KJ_IF_MAYBE(b, budget) {
    // Relaxed: a mere count; a mapping belongs to one segment alone.
    (*b)->mappedBytes.fetch_sub(
        KJ_ASSERT_NONNULL(mapping).bytes().size(), std::memory_order_relaxed);
  }
}

kj::Own<SealedSegment> SealedBudget::open(SealedFile& file, size_t words) {
  size_t pageSize = sysconf(_SC_PAGESIZE);
  KJ_REQUIRE(file.bytes % pageSize == 0,
      "peer sent a sealed segment whose size is not a multiple of the page size", file.bytes);
  requirePeerMemfd(file.fd, REQUIRED_SEALS, file.bytes);

  size_t size = roundUpToPages(words * sizeof(word));
  // Relaxed: see the destructor of SealedSegment. Only one thread adds, so the sum is kept below.
  uint64_t mapped = mappedBytes.load(std::memory_order_relaxed);
  if (mapped <= maxBytes && size <= maxBytes - mapped) {
    // Private, since before Linux 6.7 a file that is sealed against writing cannot be mapped
    // shared, not even for reading. Populated, since a message is sent to be read.
    void* begin = mapAligned(size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file.fd);
    if (begin != MAP_FAILED) {
      Mapping mapping(reinterpret_cast<byte*>(begin), size);
      keepToThisProcess(mapping.bytes());
      mappedBytes.fetch_add(size, std::memory_order_relaxed);
      return kj::heap<SealedSegment>(kj::atomicAddRef(*this), kj::mv(mapping), words);
    }
  }

  auto copy = kj::heapArray<word>(words);
  auto target = copy.asBytes();
  while (target.size() > 0) {
    ssize_t n;
    KJ_SYSCALL(n = pread(file.fd, target.begin(), target.size(),
        copy.asBytes().size() - target.size()));
    KJ_REQUIRE(n > 0, "a sealed file became shorter");
    target = target.slice(n, target.size());
  }
  return kj::heap<SealedSegment>(kj::mv(copy));
}

}  // namespace capnpshm
