// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <capnp/common.h>
#include <kj/async-io.h>
#include <kj/io.h>

namespace capnpshm {

using kj::uint;

constexpr uint64_t BELL = ~uint64_t(0);
// What is sent on the socket to wake the peer. As the first word of a frame it would announce 2^32
// segments, so it cannot be one.

kj::Array<kj::AutoCloseFd> moveFirst(kj::ArrayPtr<kj::AutoCloseFd> space, size_t count);
// The `count` file descriptors that were received into `space`.

class FrameReader {
  // Takes frames from a connection's socket, and reads ahead: what the peer has sent at once costs
  // one system call. A frame is a message as capnp::writeMessage() writes it, or a BELL.
  //
  // Invariants:
  // - It reads only if no whole frame is here, and ahead only if nothing is. So the file
  //   descriptors that are here all belong to one frame.
  // - That is the frame with the last byte which came with them. Linux ends a recvmsg() behind what
  //   was sent with descriptors, and a frame that has some is written by itself. (The rule is that
  //   of capnp::BufferedMessageStream, which keeps what it has read ahead to itself.)
  //
  // Belongs to the thread of its event loop.

public:
  explicit FrameReader(kj::AsyncCapabilityStream& stream): stream(stream) {}
  // `stream` must outlive it.
  KJ_DISALLOW_COPY(FrameReader);

  struct Limits {
    uint segments;
    uint64_t words;
    // Of a frame that is read, without its header.
    size_t aheadWords;
    // How much may be read at once into memory that is kept; at least 1, and then no more is read
    // than the frame has.
    uint fds;
    // How many file descriptors may come with the first byte of a frame; others are closed.
    bool fdAsStream = false;
    // One that comes is handed out as what KJ makes of it. Only without reading ahead.
  };

  struct Frame {
    uint64_t header;
    // Its first word.
    kj::Array<capnp::word> words;
    // All of it. Null if it is a BELL, and if it is larger than was allowed: then the rest of it
    // was not read, and nothing further can be.
    kj::Array<kj::AutoCloseFd> fds;
    kj::Own<kj::AsyncCapabilityStream> fdStream;
  };

  kj::Promise<kj::Maybe<Frame>> next(Limits limits);
  // The next frame, or null at the end of the stream. Fails with DISCONNECTED if the stream ends
  // within a frame. One call at a time; if the promise is dropped, nothing further can be read.

  bool isEmpty() const { return begin == end; }
  // Nothing was read ahead, so that somebody else may go on reading the stream.

private:
  kj::AsyncCapabilityStream& stream;
  kj::Array<capnp::word> buffer;
  size_t begin = 0;
  size_t end = 0;
  // What is here: bytes of the buffer. Frames begin on word borders.
  kj::Array<kj::AutoCloseFd> fdSpace;
  size_t fdCount = 0;
  kj::Own<kj::AsyncCapabilityStream> fdStream;
  // Those of the last frame of which something is here.

  kj::Promise<kj::Maybe<Frame>> readAhead(Limits limits);
  kj::Promise<kj::Maybe<Frame>> readHeader(Limits limits, size_t words);
  kj::Promise<kj::Maybe<Frame>> readRest(Frame&& frame, size_t words);
  void moveFds(Frame& frame);
};

}  // namespace capnpshm
