// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include "outbox.h"
#include "sealed.h"
#include <capnp/message.h>
#include <capnp/rpc.capnp.h>
#include <capnp/rpc.h>
#include <kj/io.h>

namespace capnpshm {

capnp::rpc::Message::Which kindOf(kj::ArrayPtr<const capnp::word> firstSegment);
// Which of RPC's messages this is, from a look at two words. A hint: UNIMPLEMENTED, which is what
// an empty message would be, if it is not where it usually is; and whatever a hostile peer likes.

class MessageSender {
  // What an OutgoingMessage needs of its connection.

public:
  virtual void sendMessage(OutgoingMessage& message) = 0;
};

class OutgoingMessage final: public capnp::OutgoingRpcMessage,
                             public kj::AtomicRefcounted,
                             private capnp::MessageBuilder {
  // A message being built: a small first segment in warm private memory, to travel inside the ring
  // or to be copied, and further segments in shared memory where there is room, else on the heap.
  //
  // May be made, built and destroyed on any thread, and outlive the connection; send() belongs to
  // the connection's thread.

public:
  OutgoingMessage(kj::Own<Outbox> outbox, MessageSender& sender, kj::uint firstSegmentWords);
  OutgoingMessage(MessageSender& sender, kj::uint firstSegmentWords);
  // The second form builds on the heap alone.

  ~OutgoingMessage() noexcept(false);

  static constexpr size_t SCRATCH_WORDS = 128;
  // First segments of up to this size are private.

  kj::ArrayPtr<const kj::ArrayPtr<const capnp::word>> getSegments();
  // What was written, a range for each segment. Empty if nothing was.

  kj::Maybe<Arena::Block&> findBlock(const capnp::word* segment);
  // The block in which a segment lies, if it lies in shared memory.

  kj::Maybe<Parcel&> getParcel();
  // What holds the blocks, if there are any.

  SealedSegments& getSealed() { return sealed; }
  // Those segments which are built in memfds of their own.

  kj::ArrayPtr<const int> getFds() { return fds; }

  // implements OutgoingRpcMessage ---------------------------------------------

  capnp::AnyPointer::Builder getBody() override;
  void setFds(kj::Array<int> fds) override { this->fds = kj::mv(fds); }
  void send() override { sender.sendMessage(*this); }
  size_t sizeInWords() override;

private:
  kj::Maybe<kj::Own<Outbox>> outbox;
  MessageSender& sender;
  kj::uint firstSegmentWords;
  kj::Array<capnp::word> scratch;
  kj::Vector<kj::Array<capnp::word>> heapSegments;
  size_t totalWords = 0;
  Parcel* parcel = nullptr;
  SealedSegments sealed;
  // Behind `outbox`, which must outlive it.
  kj::Array<int> fds;

  // implements MessageBuilder -------------------------------------------------

  kj::ArrayPtr<capnp::word> allocateSegment(kj::uint minimumSize) override;
};

}  // namespace capnpshm
