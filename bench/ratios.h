// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// What is compared with capnp::TwoPartyVatNetwork.

#include "results.h"

namespace capnpshm {
namespace bench {

struct Ratio {
  std::string key;
  double value;        // In our favour, if above 1. The median over the rounds' own ratios.
  double least, most;  // Of the rounds.
  kj::Maybe<double> rpcAlone;
  // What it would be if nothing but RPC itself took time, both vats in one process; by the medians
  // of all rounds. If the case has that transport.
};

std::vector<Ratio> computeRatios(const Results& results);
// Those for which there are figures.

struct Comparison {
  const Row* row;
  std::string figure;
  double ratio;
  double least, most;  // If `most` is above 1, some rounds found the opposite.
};

std::vector<Comparison> findSlower(const std::vector<kj::Own<Row>>& rows);
// All rows with default settings that took longer, or more CPU time, than TwoPartyVatNetwork.

}  // namespace bench
}  // namespace capnpshm
