# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

@0xa2c51f0be7d64939;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("capnpshm::conformance");

# What the conformance suite calls.

struct Sum {
  value @0 :Int64;
}

interface Root {
  # The bootstrap interface of the suite's servers.

  add @0 (a :Int64, b :Int64) -> Sum;
  echo @1 (data :Data) -> (data :Data);

  fail @2 (kind :UInt16, text :Text);
  # Fails with a kj::Exception::Type and a text.

  never @3 (item :Item, data :Data);
  # Never returns; lets itself be canceled.

  slow @4 (item :Item) -> Sum;
  # Returns when the test says so; does not let itself be canceled.

  sequence @5 () -> Sum;
  # How often it was called before.

  make @6 (name :Text) -> (item :Item);
  visit @7 (item :Item, count :UInt32) -> Sum;
  # Calls item.sequence() so often, all at once, and returns the sum of what came back.

  reflect @8 (item :Item) -> (item :Item);
  keep @9 (item :Item) -> ();
  kept @10 () -> (item :Item);

  fill @11 (bytes :UInt64, seed :UInt8) -> (data :Data);
  parts @12 (parts :List(Data)) -> (parts :List(Data));

  forward @13 (to :Root, a :Int64, b :Int64) -> Sum;
  # A tail call of to.add().

  open @14 () -> (sink :Sink);
  promised @15 () -> (item :Item);
  # A promise for an item, which the test resolves.

  files @16 (items :List(Item), fill :Data) -> (contents :List(Text), item :Item);
  # Which of the items came with a file descriptor, and what could be read from it; "none" for no
  # descriptor. Returns an item with the descriptor of a pipe from which "reply" can be read.

  onThread @17 (bytes :UInt64, seed :UInt8) -> (data :Data);
  # As fill(), but the results are built on another thread.

  caller @18 () -> (side :UInt16);
  # Which side the caller is, if the server was made by a bootstrap factory.
}

interface Item {
  name @0 () -> (name :Text);
  sequence @1 () -> Sum;
}

interface Sink {
  put @0 (n :UInt64, fill :Data) -> stream;
  total @1 () -> (count :UInt64, sum :UInt64, ordered :Bool);
  slow @2 () -> Sum;
}
