// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "message.h"

#include "large-buffer.h"
#include <string.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;
using kj::uint;

capnp::rpc::Message::Which kindOf(kj::ArrayPtr<const word> firstSegment) {
  if (firstSegment.size() < 2) return capnp::rpc::Message::UNIMPLEMENTED;
  // A root pointer to a struct right behind it that has data, the first of which is the union's
  // discriminant.
  uint64_t root, data;
  memcpy(&root, &firstSegment[0], sizeof(root));
  memcpy(&data, &firstSegment[1], sizeof(data));
  if (uint32_t(root) != 0 || uint16_t(root >> 32) == 0) return capnp::rpc::Message::UNIMPLEMENTED;
  return capnp::rpc::Message::Which(uint16_t(data));
}

OutgoingMessage::OutgoingMessage(
    kj::Own<Outbox> outbox, MessageSender& sender, uint firstSegmentWords)
    : outbox(kj::mv(outbox)), sender(sender), firstSegmentWords(firstSegmentWords) {}

OutgoingMessage::OutgoingMessage(MessageSender& sender, uint firstSegmentWords)
    : sender(sender), firstSegmentWords(firstSegmentWords) {}

OutgoingMessage::~OutgoingMessage() noexcept(false) {
  KJ_IF_MAYBE(o, outbox) {
    auto segments = getSegments();
    if (parcel != nullptr) {
      // The library writes only below the used size of a segment, and zeroes what it gives back.
      for (auto& use: parcel->uses) {
        use.dirtyBytes = 0;
        for (auto& segment: segments) {
          if (reinterpret_cast<const byte*>(segment.begin()) == use.block->bytes().begin()) {
            use.dirtyBytes = segment.size() * sizeof(word);
          }
        }
      }
      (*o)->builderGone(*parcel);
    }
    if (scratch != nullptr && (*o)->isOwnerThread()) {
      size_t dirty = segments.size() > 0 && segments[0].begin() == scratch.begin()
          ? segments[0].size() : scratch.size();
      (*o)->returnScratch(kj::mv(scratch), dirty);
    }
  }
}

kj::ArrayPtr<const kj::ArrayPtr<const word>> OutgoingMessage::getSegments() {
  return getSegmentsForOutput();
}

kj::Maybe<Arena::Block&> OutgoingMessage::findBlock(const word* segment) {
  if (parcel != nullptr) {
    for (auto& use: parcel->uses) {
      if (use.block->bytes().begin() == reinterpret_cast<const byte*>(segment)) return *use.block;
    }
  }
  return nullptr;
}

kj::Maybe<Parcel&> OutgoingMessage::getParcel() {
  if (parcel == nullptr) return nullptr;
  return *parcel;
}

capnp::AnyPointer::Builder OutgoingMessage::getBody() {
  return getRoot<capnp::AnyPointer>();
}

size_t OutgoingMessage::sizeInWords() {
  size_t result = 0;
  for (auto& segment: getSegments()) result += segment.size();
  return result;
}

kj::ArrayPtr<word> OutgoingMessage::allocateSegment(uint minimumSize) {
  size_t size = minimumSize;
  KJ_IF_MAYBE(o, outbox) {
    if ((*o)->isOwnerThread()) {
      if (totalWords == 0) {
        if (firstSegmentWords <= SCRATCH_WORDS && size <= SCRATCH_WORDS) {
          scratch = (*o)->takeScratch(SCRATCH_WORDS);
          totalWords = scratch.size();
          return scratch;
        }
        size = kj::max(size, size_t(firstSegmentWords));
      } else {
        // Grow as MallocMessageBuilder does, by the total so far.
        size = kj::max(size, totalWords);
      }
      KJ_IF_MAYBE(s, (*o)->getSealedSender()) {
        auto result = sealed.tryAllocate(*s, size * sizeof(word));
        if (result != nullptr) {
          totalWords += result.size();
          return result;
        }
      }
      KJ_IF_MAYBE(block, (*o)->tryAllocate(parcel, size * sizeof(word))) {
        auto bytes = block->bytes();
        auto result = kj::arrayPtr(
            reinterpret_cast<word*>(bytes.begin()), bytes.size() / sizeof(word));
        totalWords += result.size();
        return result;
      }
    }
  }

  if (totalWords == 0) {
    size = kj::max(size, firstSegmentWords == 0
        ? size_t(capnp::SUGGESTED_FIRST_SEGMENT_WORDS) : size_t(firstSegmentWords));
  } else {
    size = kj::max(size, totalWords);
  }
  // A segment is limited to 2^29 - 1 words.
  size = kj::max(size_t(minimumSize), kj::min(size, (size_t(1) << 29) - 1));
  totalWords += size;
  return heapSegments.add(newZeroedBuffer(size));
}

}  // namespace capnpshm
