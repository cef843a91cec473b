// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#pragma once

// All figures of a run, the ratios between them, and the JSON that holds both.

#include "bench.capnp.h"
#include <kj/string.h>
#include <kj/vector.h>
#include <map>
#include <string>
#include <vector>

namespace capnpshm {
namespace bench {

using kj::uint;

struct Parameters {
  // What distinguishes one row of a case from the others of the same transport. 0: not relevant.

  uint64_t payloadBytes = 0;
  uint window = 0;
  uint gapMicroseconds = 0;
  uint connections = 0;
  uint callsEach = 0;  // On each of the connections that a case makes, if not one.

  bool operator==(const Parameters& other) const {
    return payloadBytes == other.payloadBytes && window == other.window &&
        gapMicroseconds == other.gapMicroseconds && connections == other.connections &&
        callsEach == other.callsEach;
  }

  static Parameters ofPayload(uint64_t bytes) { return with(&Parameters::payloadBytes, bytes); }
  static Parameters ofWindow(uint size) { return with(&Parameters::window, size); }
  static Parameters ofConnections(uint count) { return with(&Parameters::connections, count); }
  static Parameters ofCallsEach(uint count) { return with(&Parameters::callsEach, count); }

private:
  template <typename T>
  static Parameters with(T Parameters::*parameter, T value) {
    Parameters result;
    result.*parameter = value;
    return result;
  }
};

class Row {
  // A case on a transport: the figures of all rounds.

public:
  std::string caseName;
  std::string transport;
  Parameters parameters;
  std::string error;         // Why there are no figures, if so.
  std::string countMethod;   // How system calls were counted, if they were.
  double otherLoad = 0;      // CPU time of others during the slices, in cores; the highest.
  double stolen = 0;         // CPU time the host took, in cores; the highest.

  void add(const std::string& figure, double value);
  const std::vector<double>* rounds(const std::string& figure) const;
  double median(const std::string& figure) const;
  double most(const std::string& figure) const;
  const std::vector<std::string>& figures() const { return names; }
  double spread(const std::string& figure) const;
  // (Largest - smallest) / median of the rounds.

  bool isNoisy() const;
  // Whether others used the machine while this was measured.

private:
  std::vector<std::string> names;  // In the order in which they came.
  std::map<std::string, std::vector<double>> values;
};

double median(std::vector<double> values);

class Results {
public:
  Row& row(kj::StringPtr caseName, kj::StringPtr transport, const Parameters& parameters);
  const Row* find(const std::string& caseName, const std::string& transport,
                  const Parameters& parameters) const;

  void note(kj::String text) { notes.push_back(kj::mv(text)); }

  kj::String toJson(bool quick) const;

private:
  std::vector<kj::Own<Row>> rows;
  std::vector<kj::String> notes;
};

}  // namespace bench
}  // namespace capnpshm
