// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "large-buffer.h"

#include "huge-pages.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;

namespace {

constexpr uint64_t MESSAGES_UNUSED = 256;

class PagesDisposer final: public kj::ArrayDisposer {
  // Unmaps an array that is a mapping.

protected:
  void disposeImpl(void* firstElement, size_t elementSize, size_t, size_t capacity,
                   void (*)(void*)) const override {
    KJ_SYSCALL(munmap(firstElement, elementSize * capacity)) { break; }
  }
};

constexpr PagesDisposer PAGES_DISPOSER {};

class CallocDisposer final: public kj::ArrayDisposer {
protected:
  void disposeImpl(void* firstElement, size_t, size_t, size_t,
                   void (*)(void*)) const override {
    free(firstElement);
  }
};

constexpr CallocDisposer CALLOC_DISPOSER {};

kj::Array<word> newPages(size_t words) {
  size_t bytes = words * sizeof(word);
  void* pages = mapAligned(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  if (pages == MAP_FAILED) KJ_FAIL_SYSCALL("mmap", errno, "no memory for a message", bytes);
  // Only faster with it; a kernel without huge pages refuses.
  madvise(pages, bytes, MADV_HUGEPAGE);
  return kj::Array<word>(reinterpret_cast<word*>(pages), words, PAGES_DISPOSER);
}

}  // namespace

kj::Array<word> newZeroedBuffer(size_t words) {
  if (words < MAX_MALLOC_WORDS) {
    void* memory = calloc(words, sizeof(word));
    if (memory == nullptr) {
      KJ_FAIL_SYSCALL("calloc", errno, "no memory for a message", words * sizeof(word));
    }
    return kj::Array<word>(reinterpret_cast<word*>(memory), words, CALLOC_DISPOSER);
  }
  return newPages(words);
}

kj::Array<word> BufferPool::take(size_t words) {
  words = kj::max(words, LARGE_BUFFER_WORDS);
  // What is half a huge page or more becomes a whole one, for it is the faults that are expensive.
  constexpr size_t PAGE_WORDS = HUGE_PAGE / sizeof(word);
  size_t rest = words % PAGE_WORDS;
  if (rest >= PAGE_WORDS / 2) words += PAGE_WORDS - rest;
  {
    std::lock_guard<std::mutex> lock(mutex);
    // The one used last, of those that are not much too large.
    for (size_t i = kept.size(); i > 0; i--) {
      auto size = kept[i - 1].buffer.size();
      if (size >= words && size / 2 <= words) {
        auto result = kj::mv(kept[i - 1].buffer);
        keptBytes -= size * sizeof(word);
        drop(i - 1);
        return result;
      }
    }
  }
  return newPages(words);
}

void BufferPool::giveBack(kj::Array<word>&& buffer) {
  size_t bytes = buffer.size() * sizeof(word);
  if (bytes > limitBytes) return;
  std::lock_guard<std::mutex> lock(mutex);
  while (keptBytes + bytes > limitBytes) {
    keptBytes -= kept[0].buffer.size() * sizeof(word);
    drop(0);
  }
  keptBytes += bytes;
  kept.add(Kept { kj::mv(buffer), messages });
}

void BufferPool::passed(uint64_t count) {
  std::lock_guard<std::mutex> lock(mutex);
  messages = count;
  while (kept.size() > 0 && messages - kept[0].since >= MESSAGES_UNUSED) {
    keptBytes -= kept[0].buffer.size() * sizeof(word);
    drop(0);
  }
}

size_t BufferPool::getKeptBytes() const {
  std::lock_guard<std::mutex> lock(mutex);
  return keptBytes;
}

void BufferPool::drop(size_t index) {
  for (size_t i = index + 1; i < kept.size(); i++) kept[i - 1] = kj::mv(kept[i]);
  kept.removeLast();
}

}  // namespace capnpshm
