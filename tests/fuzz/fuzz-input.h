// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

#include <kj/array.h>
#include <kj/common.h>
#include <stdint.h>
#include <string.h>

namespace capnpshm {
namespace fuzz {

using kj::byte;
using kj::uint;

class Input {
  // The bytes that the fuzzer chose, taken from the front; zeroes when there are no more. So that
  // small changes of an input stay small changes of what is done, nothing is taken from the end.

public:
  Input(const uint8_t* data, size_t size): rest(data, size) {}

  bool isEmpty() const { return rest.size() == 0; }

  uint8_t takeByte() { return take<uint8_t>(); }
  uint16_t takeShort() { return take<uint16_t>(); }
  uint64_t takeWord() { return take<uint64_t>(); }
  bool takeFlag() { return takeByte() & 1; }

  uint below(uint limit) {
    // A number smaller than `limit`, which is positive. Takes one byte if that is enough.
    return (limit <= 256 ? uint(takeByte()) : uint(takeShort())) % limit;
  }

  kj::ArrayPtr<const byte> takeBytes(size_t size) {
    // No more than there are.
    size_t count = kj::min(size, rest.size());
    auto result = rest.slice(0, count);
    rest = rest.slice(count, rest.size());
    return result;
  }

  uint64_t takeValue(uint64_t near) {
    // A word such as a liar would choose: something near the truth, one of its bits changed, a
    // limit, or anything.
    switch (takeByte() % 8) {
      case 0: return near + takeByte();
      case 1: return near - takeByte();
      case 2: return near ^ uint64_t(1) << (takeByte() % 64);
      case 3: return takeByte();
      case 4: return (uint64_t(1) << (takeByte() % 64)) - (takeByte() & 1);
      case 5: return ~uint64_t(takeByte());
      case 6: return takeShort();
      default: return takeWord();
    }
  }

private:
  kj::ArrayPtr<const byte> rest;

  template <typename T>
  T take() {
    T result = 0;
    auto bytes = takeBytes(sizeof(T));
    if (bytes.size() > 0) memcpy(&result, bytes.begin(), bytes.size());
    return result;
  }
};

}  // namespace fuzz
}  // namespace capnpshm
