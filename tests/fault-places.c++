// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "fault-places.h"

#include <sstream>
#include <stdlib.h>

namespace capnpshm {
namespace process {

std::string reportOfPlaces(PeerProcess& process) {
  for (;;) {
    auto line = process.line();
    if (line.find("places:") == 0) return line;
  }
}

Places placesOf(const std::string& report) {
  // "places: file:line=times file:line=times ..."
  Places result;
  std::istringstream words(report.substr(report.find(' ')));
  for (std::string word; words >> word;) {
    auto equals = word.find('=');
    result[word.substr(0, equals)] = strtoull(word.c_str() + equals + 1, nullptr, 10);
  }
  return result;
}

}  // namespace process
}  // namespace capnpshm
