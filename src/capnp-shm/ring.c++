// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "ring.h"

#include "fault-point.h"
#include <kj/debug.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CAPNP_SHM_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define CAPNP_SHM_TSAN 1
#endif

namespace capnpshm {

namespace {

constexpr bool isPowerOfTwo(size_t n) { return n != 0 && (n & (n - 1)) == 0; }

}  // namespace

void fullFence() {
  // Each pairs with another: SleepWord::arm() with PeerSleepWord::mustRing().
#if CAPNP_SHM_TSAN
  static std::atomic<uint64_t> standIn{0};
  standIn.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

// =======================================================================================

DescriptorProducer::DescriptorProducer(kj::ArrayPtr<DescriptorLine> lines)
    : DescriptorProducer(lines, lines.size()) {}

DescriptorProducer::DescriptorProducer(
    kj::ArrayPtr<DescriptorLine> lines, uint64_t firstPosition)
    : lines(lines), position(firstPosition), consumed(firstPosition) {
  KJ_REQUIRE(isPowerOfTwo(lines.size()) && lines.size() >= 2 * MAX_DESCRIPTOR_LINES,
      "bad size of descriptor ring", lines.size());
}

void DescriptorProducer::updateConsumed(uint64_t peerConsumed) {
  KJ_REQUIRE(peerConsumed <= position,
      "peer says it consumed descriptors that were not published", peerConsumed, position);
  KJ_REQUIRE(peerConsumed >= consumed,
      "peer's count of consumed descriptors went backwards", peerConsumed, consumed);
  consumed = peerConsumed;
}

void DescriptorProducer::publish(DescriptorHead head, kj::ArrayPtr<const uint64_t> body) {
  KJ_IREQUIRE(hasRoom(linesForBody(body.size())));
  write(head, body);
}

void DescriptorProducer::write(DescriptorHead head, kj::ArrayPtr<const uint64_t> body) {
  KJ_IREQUIRE(body.size() <= MAX_BODY_WORDS);
  uint lineCount = linesForBody(body.size());
  head.lines = lineCount;

  // All stores but the last are relaxed: the release store of the head's stamp publishes them
  // together. They are atomic only because a hostile or merely early reader may look.
  for (uint i = lineCount - 1; i > 0; i--) {
    auto& target = line(position + i);
    uint start = bodyCapacity(i);
    uint end = kj::min(start + CONTINUATION_BODY_WORDS, uint(body.size()));
    target.stamp.store(continuationStamp(position + i), std::memory_order_relaxed);
    faultPoint();
    for (uint j = start; j < end; j++) {
      target.words[j - start].store(body[j], std::memory_order_relaxed);
      faultPoint();
    }
  }

  auto& target = line(position);
  target.words[0].store(head.pack(), std::memory_order_relaxed);
  faultPoint();
  for (uint j = 0; j < kj::min(HEAD_BODY_WORDS, uint(body.size())); j++) {
    target.words[1 + j].store(body[j], std::memory_order_relaxed);
    faultPoint();
  }

  // Release: pairs with the acquire load of the stamp in DescriptorConsumer.
  target.stamp.store(headStamp(position), std::memory_order_release);
  faultPoint();
  position += lineCount;
}

void DescriptorProducer::jump(SegmentEntry target, kj::ArrayPtr<DescriptorLine> newLines) {
  KJ_IREQUIRE(position + 1 <= consumed + lines.size(), "the line in reserve was used");
  KJ_IREQUIRE(isPowerOfTwo(newLines.size()) && newLines.size() > lines.size());
  uint64_t body[SegmentEntry::WORDS] = { target.packFirst(), target.offset };
  write({ DescriptorKind::JUMP, 1, 0, 0, 0 }, body);
  lines = newLines;
}

// =======================================================================================

DescriptorConsumer::DescriptorConsumer(kj::ArrayPtr<const DescriptorLine> lines)
    : DescriptorConsumer(lines, lines.size()) {}

DescriptorConsumer::DescriptorConsumer(
    kj::ArrayPtr<const DescriptorLine> lines, uint64_t firstPosition)
    : lines(lines), position(firstPosition) {
  KJ_REQUIRE(isPowerOfTwo(lines.size()) && lines.size() >= 2 * MAX_DESCRIPTOR_LINES,
      "bad size of descriptor ring", lines.size());
}

bool DescriptorConsumer::tryTake(Descriptor& descriptor) {
  auto& first = line(position);

  // Acquire: pairs with the release store of the head's stamp in DescriptorProducer::write().
  uint64_t stamp = first.stamp.load(std::memory_order_acquire);
  if (stamp != headStamp(position)) {
    // A line that was not written yet holds zero or the stamp of an earlier lap.
    KJ_REQUIRE((stamp >> 2) < position,
        "peer wrote an impossible stamp into the descriptor ring", stamp, position);
    return false;
  }

  // Relaxed from here on: ordered after the acquire load above. A peer that rewrites lines it has
  // published only hurts itself, since each word is loaded once and validated afterwards.
  descriptor.head = DescriptorHead::unpack(first.words[0].load(std::memory_order_relaxed));
  uint lineCount = descriptor.head.lines;
  KJ_REQUIRE(lineCount >= 1 && lineCount <= MAX_DESCRIPTOR_LINES,
      "peer published a descriptor of an impossible length", lineCount);
  descriptor.bodyWords = bodyCapacity(lineCount);

  for (uint j = 0; j < HEAD_BODY_WORDS; j++) {
    descriptor.body[j] = first.words[1 + j].load(std::memory_order_relaxed);
  }
  for (uint i = 1; i < lineCount; i++) {
    auto& next = line(position + i);
    uint64_t nextStamp = next.stamp.load(std::memory_order_relaxed);
    KJ_REQUIRE(nextStamp == continuationStamp(position + i),
        "peer published a descriptor with a wrong continuation", nextStamp, position + i);
    for (uint j = 0; j < CONTINUATION_BODY_WORDS; j++) {
      descriptor.body[bodyCapacity(i) + j] = next.words[j].load(std::memory_order_relaxed);
    }
  }

  position += lineCount;
  return true;
}

void DescriptorConsumer::jump(kj::ArrayPtr<const DescriptorLine> newLines) {
  KJ_REQUIRE(isPowerOfTwo(newLines.size()) && newLines.size() > lines.size(),
      "peer's JUMP leads to a ring of an impossible size", newLines.size());
  lines = newLines;
}

// =======================================================================================

FreeProducer::FreeProducer(kj::ArrayPtr<SharedWord> entries, SharedWord& freed)
    : entries(entries), freed(freed) {
  KJ_REQUIRE(isPowerOfTwo(entries.size()), "bad size of free ring", entries.size());
}

void FreeProducer::push(uint64_t handle) {
  // Relaxed: published by the release store below.
  entries[count & (entries.size() - 1)].store(handle, std::memory_order_relaxed);
  faultPoint();
  ++count;
  // Release: pairs with the acquire loads in FreeConsumer. Our reads of the block come before.
  freed.store(count, std::memory_order_release);
  faultPoint();
}

FreeConsumer::FreeConsumer(kj::ArrayPtr<const SharedWord> entries, const SharedWord& freed)
    : entries(entries), freed(freed) {
  KJ_REQUIRE(isPowerOfTwo(entries.size()),
      "peer's free ring has a size that is no power of two", entries.size());
}

kj::Maybe<uint64_t> FreeConsumer::tryPop(uint64_t outstanding) {
  // Acquire: pairs with the release store in FreeProducer::push().
  uint64_t peerCount = freed.load(std::memory_order_acquire);
  if (peerCount == count) return nullptr;
  KJ_REQUIRE(peerCount - count <= outstanding,
      "peer's count of freed messages is impossible", peerCount, count, outstanding);
  // Relaxed: ordered after the acquire load above.
  uint64_t handle = entries[count & (entries.size() - 1)].load(std::memory_order_relaxed);
  ++count;
  return handle;
}

}  // namespace capnpshm
