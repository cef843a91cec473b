// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fault-places.h"
#include "process-fixture.h"

#include <dirent.h>
#include <fstream>
#include <set>
#include <unistd.h>
#include <kj/debug.h>

// That the tests which kill a process at each fault point it passes miss none: each one in the
// library's sources is passed in some mode.

namespace capnpshm {
namespace process {
namespace {

std::set<std::string> placesInSource() {
  std::set<std::string> result;
  DIR* directory = opendir(CAPNP_SHM_SOURCES);
  KJ_REQUIRE(directory != nullptr);
  KJ_DEFER(closedir(directory));
  while (auto entry = readdir(directory)) {
    std::string name = entry->d_name;
    if (name == "fault-point.h") continue;
    std::ifstream source(std::string(CAPNP_SHM_SOURCES "/") + name);
    uint number = 0;
    for (std::string line; std::getline(source, line);) {
      ++number;
      if (line.find("faultPoint();") != std::string::npos) {
        result.insert(kj::str(name.c_str(), ':', number).cStr());
      }
    }
  }
  return result;
}

std::set<std::string> placesPassed(const ProcessMode& mode, const char* small, bool raw) {
  // By two of them that talk to each other: a client and a server, or two that send messages.
  alarm(120);
  auto pair = newSocketPair();
  int ends[] = { pair.mine, pair.peers };
  std::vector<std::string> arguments { "record=1", "rare=1", "count=60", small };
  PeerProcess first(kj::arrayPtr(&ends[0], 1),
      mode.arguments(raw ? "send" : "serve", arguments), FAULT_PEER);
  PeerProcess second(kj::arrayPtr(&ends[1], 1),
      mode.arguments(raw ? "send" : "call", arguments), FAULT_PEER);
  pair = SocketPair();
  first.proceed();
  second.proceed();
  std::set<std::string> result;
  for (auto process: { &second, &first }) {
    for (auto& place: placesOf(reportOfPlaces(*process))) result.insert(place.first);
    EXPECT_EQ(0, process->wait());
  }
  alarm(0);
  return result;
}

TEST(FaultPoints, AreAllPassedBySomeone) {
  auto missing = placesInSource();
  // Some depend on whether the other one is behind just then: those may take a few rounds.
  for (uint round = 0; round < 20 && !missing.empty(); round++) {
    for (auto& mode: sharedModes()) {
      for (const char* small: { "small=0", "small=1" }) {
        for (bool raw: { false, true }) {
          for (auto& place: placesPassed(mode, small, raw)) missing.erase(place);
        }
      }
    }
  }
  for (auto& place: missing) ADD_FAILURE() << "never passed: " << place;
}

}  // namespace
}  // namespace process
}  // namespace capnpshm
