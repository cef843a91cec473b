// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What the kernel tells of one mapping of this process.

#include <fstream>
#include <kj/common.h>
#include <kj/string.h>
#include <stdint.h>
#include <string.h>
#include <string>

namespace capnpshm {

inline kj::Maybe<kj::String> mappingField(const void* address, const char* field) {
  // What follows `field`, such as "Rss:", of the mapping that begins at an address.
  std::ifstream smaps("/proc/self/smaps");
  auto begin = kj::str(kj::hex(reinterpret_cast<uintptr_t>(address)), "-");
  bool found = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.compare(0, begin.size(), begin.cStr()) == 0) found = true;
    if (found && line.compare(0, strlen(field), field) == 0) {
      return kj::str(line.substr(strlen(field)).c_str());
    }
  }
  return nullptr;
}

}  // namespace capnpshm
