// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "frame-reader.h"

#include <string.h>
#include <capnp/serialize.h>
#include <kj/debug.h>

namespace capnpshm {

using capnp::word;

namespace {

kj::Exception endedWithin() {
  return KJ_EXCEPTION(DISCONNECTED, "peer disconnected within a message");
}

}  // namespace

kj::Array<kj::AutoCloseFd> moveFirst(kj::ArrayPtr<kj::AutoCloseFd> space, size_t count) {
  if (count == 0) return nullptr;
  auto result = kj::heapArrayBuilder<kj::AutoCloseFd>(count);
  for (size_t i = 0; i < count; i++) result.add(kj::mv(space[i]));
  return result.finish();
}

kj::Promise<kj::Maybe<FrameReader::Frame>> FrameReader::next(Limits limits) {
  if (isEmpty()) return readAhead(limits);
  size_t available = (end - begin) / sizeof(word);
  if (available == 0) return readHeader(limits, 1);

  auto prefix = kj::arrayPtr(buffer.begin() + begin / sizeof(word), available);
  Frame frame;
  memcpy(&frame.header, prefix.begin(), sizeof(frame.header));
  if (frame.header == BELL) {
    begin += sizeof(word);
    return kj::Maybe<Frame>(kj::mv(frame));
  }

  // A header that is not whole gives a size that is too small. Overflow is not possible: all sizes
  // are of 32 bits.
  uint64_t segments = uint64_t(uint32_t(frame.header)) + 1;
  size_t headerWords = segments / 2 + 1;
  if (segments > limits.segments) return kj::Maybe<Frame>(kj::mv(frame));
  size_t words = capnp::expectedSizeInWordsFromPrefix(prefix);
  if (words - headerWords > limits.words) return kj::Maybe<Frame>(kj::mv(frame));
  if (headerWords > available) return readHeader(limits, headerWords);
  if (words > available) return readRest(kj::mv(frame), words);

  frame.words = kj::heapArray<word>(words);
  memcpy(frame.words.begin(), prefix.begin(), words * sizeof(word));
  begin += words * sizeof(word);
  if (isEmpty()) moveFds(frame);
  return kj::Maybe<Frame>(kj::mv(frame));
}

kj::Promise<kj::Maybe<FrameReader::Frame>> FrameReader::readAhead(Limits limits) {
  begin = end = 0;
  if (buffer.size() != limits.aheadWords) buffer = kj::heapArray<word>(limits.aheadWords);
  // Of a BELL nobody has taken them.
  for (size_t i = 0; i < fdCount; i++) fdSpace[i] = nullptr;
  fdCount = 0;
  fdStream = nullptr;
  if (fdSpace.size() != limits.fds) fdSpace = kj::heapArray<kj::AutoCloseFd>(limits.fds);

  // KJ may also throw here and now, if the peer closed a socket in which it had left something.
  return kj::evalNow([&]() {
    size_t bytes = buffer.asBytes().size();
    return limits.fdAsStream
        ? stream.tryReadWithStreams(buffer.begin(), 1, bytes, &fdStream, 1)
        : stream.tryReadWithFds(buffer.begin(), 1, bytes, fdSpace.begin(), fdSpace.size());
  }).then([this, limits](kj::AsyncCapabilityStream::ReadResult n)
      -> kj::Promise<kj::Maybe<Frame>> {
    if (n.byteCount == 0) return kj::Maybe<Frame>(nullptr);
    end = n.byteCount;
    if (!limits.fdAsStream) fdCount = n.capCount;
    return next(limits);
  });
}

kj::Promise<kj::Maybe<FrameReader::Frame>> FrameReader::readHeader(Limits limits, size_t words) {
  // Only the header, as what follows may have file descriptors.
  size_t have = end - begin;
  if (buffer.size() < words) {
    auto larger = kj::heapArray<word>(words);
    memcpy(larger.begin(), buffer.asBytes().begin() + begin, have);
    buffer = kj::mv(larger);
  } else {
    memmove(buffer.begin(), buffer.asBytes().begin() + begin, have);
  }
  begin = 0;
  end = have;
  size_t missing = words * sizeof(word) - have;
  return kj::evalNow([&]() {
    return stream.tryRead(buffer.asBytes().begin() + end, missing, missing);
  }).then([this, limits, missing](size_t n) -> kj::Promise<kj::Maybe<Frame>> {
    if (n < missing) return endedWithin();
    end += n;
    return next(limits);
  });
}

kj::Promise<kj::Maybe<FrameReader::Frame>> FrameReader::readRest(Frame&& frame, size_t words) {
  frame.words = kj::heapArray<word>(words);
  auto bytes = frame.words.asBytes();
  size_t have = end - begin;
  memcpy(bytes.begin(), buffer.asBytes().begin() + begin, have);
  begin = end = 0;
  moveFds(frame);
  auto rest = bytes.slice(have, bytes.size());
  return kj::evalNow([&]() { return stream.tryRead(rest.begin(), rest.size(), rest.size()); })
      .then([frame = kj::mv(frame), missing = rest.size()](size_t n) mutable
          -> kj::Promise<kj::Maybe<Frame>> {
    if (n < missing) return endedWithin();
    return kj::Maybe<Frame>(kj::mv(frame));
  });
}

void FrameReader::moveFds(Frame& frame) {
  frame.fds = moveFirst(fdSpace, fdCount);
  fdCount = 0;
  frame.fdStream = kj::mv(fdStream);
}

}  // namespace capnpshm
