// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What the helper programs of the tests between processes have in common: `PROGRAM ROLE
// [KEY=VALUE...]`, started by PeerProcess (process-fixture.h), which says what they inherit.

#include "process-fixture.h"

namespace capnpshm {
namespace process {

std::string argument(const char* name, const char* otherwise = "");
bool isSet(const char* name);
uint64_t numberOf(const char* name);

void report(kj::StringPtr text);
// A line, which PeerProcess::line() returns.

void awaitProceed();
// Blocks until PeerProcess::proceed().

Progress& progress();

int runProgram(int argc, char** argv, int (*run)(const std::string& role));

}  // namespace process
}  // namespace capnpshm
