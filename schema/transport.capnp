# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

@0xd3a1f6c2b0947e58;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("capnpshm::protocol");

# What travels on the control socket beside Cap'n Proto RPC itself. Each message is sent as a
# framed rpc.capnp `Message` whose union is `obsoleteSave`, with a Control in it: valid in every
# version of Cap'n Proto, and answered with `unimplemented` by a peer that knows nothing of us.
# docs/PROTOCOL.md tells the order in which they may come.

struct Control {
  magic @0 :UInt64;
  # magicValue below. Anything else is not a message of this protocol.

  union {
    offer @1 :Offer;
    # The sender could use shared memory.

    mapped @2 :Void;
    # The answer to `switch`: the sender has mapped the receiver's first region. It has switched
    # too.

    declined @3 :Text;
    # The sender stays with plain frames in both directions; why. The answer to an offer, or to
    # `switch`.

    switch @4 :Void;
    # The last plain frame of this direction, unless the receiver declines: what follows is in
    # shared memory, and on the socket there are only control messages and bells. The fd of the
    # sender's first region is attached.

    region @5 :Region;
    # The sender has made a further region; its fd is attached.

    regionMapped @6 :UInt32;
    regionRefused @7 :UInt32;
    # Answers to `region`, by id. After a refusal the region will carry no message.

    fds @8 :UInt32;
    # File descriptors of one RPC message, which is published after this was sent, are attached;
    # so many. Messages with fds and these records pair up in order.

    bell @9 :Void;
    # Comes directly after `mapped` if, by the offers, both sides trust each other, and only then:
    # the eventfd by which the sender will wake the receiver is attached. If the sender could not
    # make one nothing is attached, and it goes on ringing by bells on the socket.

    end @10 :Void;
    # The sender will send no more messages. The socket stays open for bells and answers, since the
    # receiver may have messages waiting for room, until the sender does not want those either.

    bellSocket @11 :Void;
    # A Unix stream socket is attached, into whose other end the sender would like to ring from now
    # on: one byte, of any value, for each bell. Only to a peer whose offer has `takesBellSocket`.

    bellSocketTaken @12 :Bool;
    # The answer: whether the receiver listens to it. Until then, and if not, the bells stay where
    # they were. False is also the answer to a `bell` that came with nothing attached.

    sealed @13 :Sealed;
    # As `fds`, for a message with sealed segments, whose files are attached. Only to a receiver
    # whose offer said that it accepts them.

    taken @14 :UInt64;
    # The answer to a `declined` that crossed the sender's `mapped`: how many of the receiver's
    # messages it has taken from shared memory. The receiver sends the others again as plain frames.
  }

  const magicValue :UInt64 = 0x6d6873706e706163;
  # "capnpshm", read as a little-endian word.
}

struct Offer {
  minVersion @0 :UInt32;
  maxVersion @1 :UInt32;
  # Versions of the layout and of this protocol which the sender speaks.

  nonce @2 :UInt64;
  # Random. Tells the echo of a peer that does not understand offers from anything else.

  regionBytes @3 :UInt64;
  # Size of the sender's first region.

  trustsPeer @4 :Bool;
  # Whether the sender reads messages where they lie.

  maxFdsPerMessage @5 :UInt32;
  # How many file descriptors the sender accepts with an RPC message.

  takesBellSocket @6 :Bool;
  # Whether the sender listens to a `bellSocket` if it gets one.

  sealedBytes @7 :UInt64;
  # The size of the largest sealed segment that the sender would map; 0 if it accepts none.

  maxFdsAhead @8 :UInt32 = 64;
  # How many file descriptors may come to the sender for messages which it has not consumed. Those
  # of a single message always may.
}

struct Region {
  id @0 :UInt32;
  # 1, 2, 3, ... in the order in which they are announced. The one that comes with `switch` is 0.

  bytes @1 :UInt64;
}

struct Sealed {
  bytes @0 :List(UInt64);
  # The size of each file; 1 to 16. Sealed segments of the message are numbered in this order.

  fds @1 :UInt32;
  # How many file descriptors of the RPC message itself are attached, behind those files.
}
