// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-live-raw.h"
#include "tamper.h"

#include <capnp/rpc.capnp.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <kj/debug.h>
#include <deque>
#include <mutex>

// Sealed segments with bad pointers in them, in files that are as they should be, which somebody
// tries to change all the time; and, now and then, in files that are not.

namespace capnpshm {
namespace hostile {

namespace {

constexpr size_t PAGE = 4096;
constexpr uint MAX_ENTRIES = 20;  // Of a descriptor.
constexpr int SIZE_SEALS = F_SEAL_SHRINK | F_SEAL_GROW;

class GivenFiles {
  // The last ones that the victim was given, for the thread that tries to change them.

public:
  void add(kj::AutoCloseFd fd) {
    std::lock_guard<std::mutex> lock(mutex);
    files.push_back(kj::mv(fd));
    if (files.size() > 16) files.pop_front();
  }

  bool tryToChangeOne(std::mt19937_64& random) {
    std::lock_guard<std::mutex> lock(mutex);
    return !files.empty() && tryToChange(files[random() % files.size()], random);
  }

private:
  std::mutex mutex;
  std::deque<kj::AutoCloseFd> files;
};

kj::AutoCloseFd fileWith(kj::ArrayPtr<const byte> contents) {
  auto fd = makeMemfd(0, (contents.size() + PAGE - 1) / PAGE * PAGE);
  KJ_SYSCALL(pwrite(fd, contents.begin(), contents.size(), 0));
  return fd;
}

void damage(kj::ArrayPtr<uint64_t> words, std::mt19937_64& random) {
  for (uint i = 1 + random() % 4; i > 0; i--) {
    auto& word = words[random() % words.size()];
    word = damagedPointer(word, random);
  }
}

struct Record {
  kj::Vector<kj::AutoCloseFd> files;
  kj::Vector<uint64_t> sizes;
  std::vector<uint64_t> entries;
  uint segments = 0;
};

Record build(RawPeer& raw) {
  // A message of which some segments are files, and the others in the region.
  auto& random = raw.random;
  bool quiet = random() % 2 == 0;
  capnp::MallocMessageBuilder message(quiet || random() % 2 == 0 ? 1024 : 24,
      capnp::AllocationStrategy::FIXED_SIZE);
  fillMessage(message, random() % 3, quiet);
  Record result;
  size_t place = REGION_BYTES / 2 + random() % 8 * 1024;
  for (auto& segment: message.getSegmentsForOutput()) {
    auto words = kj::heapArray<uint64_t>(segment.size());
    memcpy(words.begin(), segment.begin(), segment.asBytes().size());
    if (quiet) {
      if (random() % 4 != 0) damage(words.slice(QUIET_WORDS, words.size()), random);
    } else if (random() % 64 == 0) {
      damage(words, random);
    }
    auto bytes = words.asPtr().asBytes();
    if (result.files.size() < MAX_SEALED_SEGMENTS && random() % 3 != 0) {
      result.entries = result.entries +
          entry(SEALED_SEGMENT | result.files.size(), words.size(), 0);
      result.sizes.add((bytes.size() + PAGE - 1) / PAGE * PAGE);
      result.files.add(fileWith(bytes));
    } else {
      memcpy(raw.peer.memory().begin() + place, bytes.begin(), bytes.size());
      result.entries = result.entries + entry(0, words.size(), place);
      place += bytes.size();
    }
    ++result.segments;
  }
  return result;
}

bool seal(Record& record, std::mt19937_64& random) {
  // False if something is not as it should be, so that the victim must refuse it.
  bool allRight = true;
  for (auto& file: record.files) {
    switch (random() % 256) {
      case 0:
        KJ_SYSCALL(fcntl(file, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW));
        allRight = false;
        break;
      case 1:
        KJ_SYSCALL(fcntl(file, F_ADD_SEALS, SIZE_SEALS | F_SEAL_FUTURE_WRITE));
        allRight = false;
        break;
      case 2: {
        // With a mapping by which it can still be written, the kernel does not seal it.
        void* map = mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        KJ_REQUIRE(map != MAP_FAILED);
        KJ_REQUIRE(fcntl(file, F_ADD_SEALS, SIZE_SEALS | F_SEAL_WRITE) < 0);
        KJ_SYSCALL(fcntl(file, F_ADD_SEALS, SIZE_SEALS));
        munmap(map, PAGE);
        allRight = false;
        break;
      }
      default:
        KJ_SYSCALL(fcntl(file, F_ADD_SEALS, SIZE_SEALS | F_SEAL_WRITE));
        break;
    }
  }
  if (random() % 256 == 0 && record.sizes.size() > 0) {
    record.sizes[random() % record.sizes.size()] += PAGE;
    allRight = false;
  }
  if (random() % 256 == 0 && record.files.size() > 0) {
    record.files.removeLast();
    allRight = false;
  }
  return allRight;
}

void publish(RawPeer& raw, GivenFiles& given) {
  auto record = build(raw);
  if (record.segments > MAX_ENTRIES) return;  // That is Attack::TABLES's.
  bool allRight = seal(record, raw.random);
  auto fds = KJ_MAP(file, record.files) { return file.get(); };
  if (record.sizes.size() > 0) {
    raw.peer.sealed(record.sizes, fds);
    ++raw.deeds;
  }
  raw.peer.publish({ DescriptorKind::MESSAGE, 0, uint16_t(record.segments),
      uint16_t(record.sizes.size() > 0), 0 },
      std::vector<uint64_t> { FREE_BY_CONSUMPTION } + record.entries);
  if (allRight) {
    for (auto& file: record.files) given.add(kj::mv(file));
  }
}

}  // namespace

void attackWithSealed(RawPeer& raw, uint milliseconds) {
  raw.upgrade();
  GivenFiles given;
  Tamperer tamperer([&](Tamperer& t) {
    if (given.tryToChangeOne(t.random)) raw.changed.store(true);
    t.rewrite(shared(raw.peer, HostilePeer::DATA), 0);
  }, raw.random());
  auto& timer = raw.peer.io.provider->getTimer();
  for (auto end = timer.now() + milliseconds * kj::MILLISECONDS;
       raw.goOn() && timer.now() < end;) {
    if (raw.hasRoom()) publish(raw, given);
    raw.ring();
    raw.pause(0);
  }
  raw.deeds += tamperer.getDeeds();
}

}  // namespace hostile
}  // namespace capnpshm
