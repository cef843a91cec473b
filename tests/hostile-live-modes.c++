// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "hostile-live.h"

#include <kj/debug.h>

namespace capnpshm {
namespace hostile {

std::vector<LiveMode> liveModes() {
  // Each way in which messages of an untrusted peer are read.
  std::vector<LiveMode> result;
  SharedMemoryOptions options;
  options.maxBytes = 4 << 20;
  options.plainCalls = 1;
  result.push_back({ "copy", options });
  // Few messages are so large that the attackers' library seals them by itself; attackers by hand
  // do.
  options.sealedThresholdBytes = 16 << 10;
  result.push_back({ "sealed", options });
  return result;
}

const LiveMode& findLiveMode(kj::StringPtr name) {
  static const std::vector<LiveMode> modes = liveModes();
  for (auto& mode: modes) {
    if (name == mode.name) return mode;
  }
  KJ_FAIL_REQUIRE("unknown mode", name);
}

const char* attackName(Attack attack) {
  switch (attack) {
    case Attack::HONEST: return "honest";
    case Attack::STAMPS_AS_PAYLOAD: return "stamps as payload";
    case Attack::STAMPS: return "stamps";
    case Attack::HEADS: return "descriptor heads";
    case Attack::ENTRIES: return "segment entries";
    case Attack::POINTERS: return "message pointers";
    case Attack::FREES: return "free ring";
    case Attack::CONSUMED: return "consumed counter";
    case Attack::SLEEP_WORD: return "sleep word";
    case Attack::HEADER: return "region header";
    case Attack::RANDOM: return "random words";
    case Attack::EVERYTHING: return "everything";
    case Attack::RACE: return "pointer races";
    case Attack::TABLES: return "segment tables";
    case Attack::BELL_FLOOD: return "bell flood";
    case Attack::NO_BELLS: return "no bells";
    case Attack::FD_FLOOD: return "fd flood";
    case Attack::NEVER_READS: return "never reads";
    case Attack::NEVER_FREES: return "never frees";
    case Attack::MID_FRAME: return "stops mid-frame";
    case Attack::CONTROLS: return "control messages";
    case Attack::SEALED: return "sealed segments";
    case Attack::FCNTL: return "fcntl and such";
  }
  KJ_UNREACHABLE;
}

bool isByHand(Attack attack) { return attack >= Attack::RACE; }

}  // namespace hostile
}  // namespace capnpshm
