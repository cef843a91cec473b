// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "ratios.h"

#include <algorithm>

namespace capnpshm {
namespace bench {

namespace {

constexpr char BASELINE[] = "twoparty";
constexpr char DEFAULT[] = "default";
constexpr char RPC_ALONE[] = "in-process";

struct Spec {
  const char* key;
  const char* caseName;
  Parameters parameters;
  const char* figure;
  bool moreIsBetter;
  const char* transport;
};

const Spec SPECS[] = {
  { "small_p50_spin", "small_call", {}, "p50_us", false, "copy-spin" },
  { "small_p99_spin", "small_call", {}, "p99_us", false, "copy-spin" },
  { "small_p50_nospin", "small_call", {}, "p50_us", false, "copy-nospin" },
  { "small_p50_default", "small_call", {}, "p50_us", false, "default" },
  { "small_cpu_default", "small_call", {}, "cpu_us_per_call", false, "default" },
  { "small_cpu_nospin", "small_call", {}, "cpu_us_per_call", false, "copy-nospin" },
  { "small_p50_plain_ctor", "small_call", {}, "p50_us", false, "plain-ctor" },
  { "window256_copy", "window", Parameters::ofWindow(256), "calls_per_s", true, "copy-spin" },
  { "param16k_copy_spin", "param", Parameters::ofPayload(16 << 10), "p50_us", false, "copy-spin" },
  { "param64k_copy_spin", "param", Parameters::ofPayload(64 << 10), "p50_us", false, "copy-spin" },
  { "param1m_copy_rw", "param_rw", Parameters::ofPayload(1 << 20), "p50_us", false, "copy-spin" },
  { "param1m_inplace", "param", Parameters::ofPayload(1 << 20), "p50_us", false, "inplace-spin" },
  { "param16m_inplace", "param", Parameters::ofPayload(16 << 20), "p50_us", false, "inplace-spin" },
  { "stream_copy", "stream", Parameters::ofPayload(64 << 10), "bytes_per_s", true, "copy-spin" },
  { "stream_copy_rw", "stream_rw", Parameters::ofPayload(64 << 10), "bytes_per_s", true,
    "copy-spin" },
  { "one_core", "one_core", {}, "p50_us", false, "default" },
  { "loaded", "loaded", {}, "p50_us", false, "default" },
};

std::vector<double> pairedRatios(
    const Row& base, const Row& ours, const char* figure, bool moreIsBetter) {
  // Round by round, since both were measured within the same fraction of a second.
  std::vector<double> result;
  auto baseRounds = base.rounds(figure);
  auto ourRounds = ours.rounds(figure);
  if (baseRounds == nullptr || ourRounds == nullptr) return result;
  for (size_t i = 0; i < baseRounds->size() && i < ourRounds->size(); i++) {
    double numerator = moreIsBetter ? (*ourRounds)[i] : (*baseRounds)[i];
    double denominator = moreIsBetter ? (*baseRounds)[i] : (*ourRounds)[i];
    if (denominator > 0) result.push_back(numerator / denominator);
  }
  return result;
}

kj::Maybe<double> ratioOfRpcAlone(const Results& results, const Spec& spec, const Row& base) {
  auto alone = results.find(spec.caseName, RPC_ALONE, spec.parameters);
  if (alone == nullptr) return nullptr;
  double ours = alone->median(spec.figure), socket = base.median(spec.figure);
  if (ours == 0 || socket == 0) return nullptr;
  return spec.moreIsBetter ? ours / socket : socket / ours;
}

void compare(const char* figure, bool moreIsBetter, const Row& base, const Row& ours,
             std::vector<Comparison>& slower) {
  auto rounds = pairedRatios(base, ours, figure, moreIsBetter);
  if (rounds.empty() || median(rounds) >= 1) return;
  auto ends = std::minmax_element(rounds.begin(), rounds.end());
  slower.push_back({ &ours, figure, median(rounds), *ends.first, *ends.second });
}

}  // namespace

std::vector<Ratio> computeRatios(const Results& results) {
  std::vector<Ratio> ratios;
  for (auto& spec: SPECS) {
    auto base = results.find(spec.caseName, BASELINE, spec.parameters);
    auto ours = results.find(spec.caseName, spec.transport, spec.parameters);
    if (base == nullptr || ours == nullptr) continue;
    auto rounds = pairedRatios(*base, *ours, spec.figure, spec.moreIsBetter);
    if (rounds.empty()) continue;
    auto ends = std::minmax_element(rounds.begin(), rounds.end());
    ratios.push_back({ spec.key, median(rounds), *ends.first, *ends.second,
                       ratioOfRpcAlone(results, spec, *base) });
  }
  return ratios;
}

std::vector<Comparison> findSlower(const std::vector<kj::Own<Row>>& rows) {
  std::vector<Comparison> slower;
  for (auto& ours: rows) {
    if (ours->transport != DEFAULT) continue;
    for (auto& base: rows) {
      if (base->transport != BASELINE || base->caseName != ours->caseName ||
          !(base->parameters == ours->parameters)) {
        continue;
      }
      compare("p50_us", false, *base, *ours, slower);
      compare("p99_us", false, *base, *ours, slower);
      compare("cpu_us_per_call", false, *base, *ours, slower);
      // With pauses between the calls the rate says nothing.
      if (ours->caseName != "idle_gap") compare("calls_per_s", true, *base, *ours, slower);
    }
  }
  return slower;
}

}  // namespace bench
}  // namespace capnpshm
