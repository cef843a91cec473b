# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

@0xb4c9f2a6d17e3085;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("example");

interface Calculator {
  # A server that shows what RPC over shared memory is asked to carry: small calls, capabilities in
  # both directions, large messages, and a stream.

  evaluate @0 (expression :Expression) -> (value :Value);
  # Returns at once with a Value; whoever wants the number read()s it. A caller may read() it, or
  # use it in another expression, before this call has returned (promise pipelining).

  getOperator @1 (operator :Operator) -> (function :Function);

  getBulk @2 () -> (bulk :Bulk);

  openSink @3 () -> (sink :Sink);

  struct Expression {
    union {
      number @0 :Float64;
      value @1 :Value;
      # What an earlier evaluate() returned, or any other implementation of Value.

      call :group {
        function @2 :Function;
        # One of the server's operators, or a function of the client's: then the server calls back.

        arguments @3 :List(Expression);
      }
    }
  }

  enum Operator {
    add @0;
    subtract @1;
    multiply @2;
    divide @3;
  }
}

interface Value {
  read @0 () -> (number :Float64);
}

interface Function {
  call @0 (arguments :List(Float64)) -> (number :Float64);
}

interface Bulk {
  # Keeps what is put until the connection ends.

  put @0 (name :Text, content :Data) -> ();
  get @1 (name :Text) -> (content :Data);
}

interface Sink {
  # Takes a stream of chunks. Flow control keeps the sender from running ahead without bounds.

  write @0 (chunk :Data) -> stream;
  finish @1 () -> (chunks :UInt64, bytes :UInt64, sum :UInt64);
}
