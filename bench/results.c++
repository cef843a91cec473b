// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "results.h"

#include "meter.h"
#include "plan.h"
#include "ratios.h"
#include <algorithm>
#include <capnp/common.h>
#include <capnp/compat/json.h>
#include <kj/debug.h>
#include <functional>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>

namespace capnpshm {
namespace bench {

namespace {

constexpr double NOISY_LOAD = 0.05;  // Of a core.
constexpr double NOISY_STEAL = 0.02;
constexpr double WIDE_SPREAD = 0.5;

double rounded(double value) {
  // Four digits say all there is to say, and keep the file readable. Sizes and counts stay exact.
  if (value == static_cast<double>(static_cast<int64_t>(value))) return value;
  char buffer[32];
  snprintf(buffer, sizeof(buffer), "%.4g", value);
  return strtod(buffer, nullptr);
}

class JsonObject {
  // Collects fields in order, then writes them.

public:
  JsonObject& number(std::string name, double value) {
    fields.push_back({ name, [value](capnp::json::Value::Builder v) { v.setNumber(value); } });
    return *this;
  }
  JsonObject& text(std::string name, std::string value) {
    fields.push_back({ name, [value](capnp::json::Value::Builder v) {
      v.setString(value.c_str());
    } });
    return *this;
  }
  JsonObject& boolean(std::string name, bool value) {
    fields.push_back({ name, [value](capnp::json::Value::Builder v) { v.setBoolean(value); } });
    return *this;
  }
  JsonObject& object(std::string name, JsonObject value) {
    fields.push_back({ name, [value](capnp::json::Value::Builder v) { value.write(v); } });
    return *this;
  }
  JsonObject& array(std::string name, std::vector<JsonObject> values) {
    fields.push_back({ name, [values](capnp::json::Value::Builder v) {
      auto list = v.initArray(values.size());
      for (size_t i = 0; i < values.size(); i++) values[i].write(list[i]);
    } });
    return *this;
  }
  JsonObject& array(std::string name, std::vector<std::string> values) {
    fields.push_back({ name, [values](capnp::json::Value::Builder v) {
      auto list = v.initArray(values.size());
      for (size_t i = 0; i < values.size(); i++) list[i].setString(values[i].c_str());
    } });
    return *this;
  }

  void write(capnp::json::Value::Builder value) const {
    auto list = value.initObject(fields.size());
    for (size_t i = 0; i < fields.size(); i++) {
      list[i].setName(fields[i].name.c_str());
      fields[i].write(list[i].initValue());
    }
  }

private:
  struct Field {
    std::string name;
    std::function<void(capnp::json::Value::Builder)> write;
  };
  std::vector<Field> fields;
};

std::string afterColon(kj::StringPtr text, const char* name) {
  // Of /proc/cpuinfo and the like: the value of the first line with this name.
  auto line = strstr(text.cStr(), name);
  if (line == nullptr) return "unknown";
  auto colon = strchr(line, ':');
  if (colon == nullptr) return "unknown";
  std::string value(colon + 1, strcspn(colon + 1, "\n"));
  value.erase(0, value.find_first_not_of(" \t"));
  return value;
}

JsonObject describeMachine() {
  struct utsname name;
  KJ_SYSCALL(uname(&name));
  char date[32];
  time_t seconds = time(nullptr);
  struct tm utc;
  strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &utc));
  auto cpuInfo = readFile("/proc/cpuinfo");
  bool isGuest = strstr(cpuInfo.cStr(), "hypervisor") != nullptr;
  auto memory = readFile("/proc/meminfo");
  JsonObject result;
  result.text("cpu", afterColon(cpuInfo, "model name"));
  result.number("cores", usableCores().size());
  result.boolean("virtual", isGuest);
  auto memoryKib = strtoull(afterColon(memory, "MemTotal").c_str(), nullptr, 10);
  result.number("memory_bytes", memoryKib * 1024);
  result.text("kernel", std::string(name.sysname) + " " + name.release + " " + name.machine);
#if __clang__
  result.text("compiler", __VERSION__);
#else
  result.text("compiler", "GCC " __VERSION__);
#endif
  result.text("capnp", kj::str(CAPNP_VERSION / 1000000, '.', CAPNP_VERSION / 1000 % 1000, '.',
      CAPNP_VERSION % 1000).cStr());
  result.text("date", date);
  return result;
}

}  // namespace

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void Row::add(const std::string& figure, double value) {
  auto& rounds = values[figure];
  if (rounds.empty()) names.push_back(figure);
  rounds.push_back(value);
}

const std::vector<double>* Row::rounds(const std::string& figure) const {
  auto entry = values.find(figure);
  return entry == values.end() ? nullptr : &entry->second;
}

double Row::median(const std::string& figure) const {
  auto all = rounds(figure);
  return all == nullptr ? 0 : bench::median(*all);
}

double Row::most(const std::string& figure) const {
  auto all = rounds(figure);
  return all == nullptr ? 0 : *std::max_element(all->begin(), all->end());
}

double Row::spread(const std::string& figure) const {
  auto all = rounds(figure);
  if (all == nullptr) return 0;
  auto ends = std::minmax_element(all->begin(), all->end());
  double middle = bench::median(*all);
  return middle == 0 ? 0 : (*ends.second - *ends.first) / middle;
}

bool Row::isNoisy() const { return otherLoad > NOISY_LOAD || stolen > NOISY_STEAL; }

Row& Results::row(kj::StringPtr caseName, kj::StringPtr transport, const Parameters& parameters) {
  if (auto found = find(caseName.cStr(), transport.cStr(), parameters)) {
    return const_cast<Row&>(*found);
  }
  auto row = kj::heap<Row>();
  row->caseName = caseName.cStr();
  row->transport = transport.cStr();
  row->parameters = parameters;
  rows.push_back(kj::mv(row));
  return *rows.back();
}

const Row* Results::find(const std::string& caseName, const std::string& transport,
                         const Parameters& parameters) const {
  for (auto& row: rows) {
    if (row->caseName == caseName && row->transport == transport &&
        row->parameters == parameters) {
      return row.get();
    }
  }
  return nullptr;
}

kj::String Results::toJson(bool quick) const {
  std::vector<JsonObject> rowObjects;
  uint noisy = 0, wide = 0;
  double worstSpread = 0;
  for (auto& row: rows) {
    JsonObject object;
    object.text("case", row->caseName).text("transport", row->transport);
    auto& parameters = row->parameters;
    if (parameters.payloadBytes > 0) object.number("payload_bytes", parameters.payloadBytes);
    if (parameters.window > 0) object.number("window", parameters.window);
    if (parameters.gapMicroseconds > 0) object.number("gap_us", parameters.gapMicroseconds);
    if (parameters.connections > 0) object.number("connections", parameters.connections);
    if (parameters.callsEach > 0) object.number("calls_each", parameters.callsEach);
    if (!row->error.empty()) object.text("error", row->error);
    for (auto& name: row->figures()) {
      double value = name == "shared_bytes" ? row->most(name) : row->median(name);
      object.number(name, rounded(value));
    }
    if (row->rounds("p50_us") != nullptr) {
      object.number("p50_spread", rounded(row->spread("p50_us")));
      worstSpread = kj::max(worstSpread, row->spread("p50_us"));
      if (row->spread("p50_us") > WIDE_SPREAD) ++wide;
    }
    if (!row->countMethod.empty()) object.text("syscalls_counted_by", row->countMethod);
    object.number("other_load", rounded(kj::max(0.0, row->otherLoad)));
    object.number("steal", rounded(kj::max(0.0, row->stolen)));
    if (row->isNoisy()) {
      object.boolean("noisy", true);
      ++noisy;
    }
    rowObjects.push_back(object);
  }

  JsonObject ratios, ratioRanges, rpcAlone;
  for (auto& ratio: computeRatios(*this)) {
    ratios.number(ratio.key, rounded(ratio.value));
    JsonObject range;
    range.number("least", rounded(ratio.least)).number("most", rounded(ratio.most));
    ratioRanges.object(ratio.key, range);
    KJ_IF_MAYBE(value, ratio.rpcAlone) rpcAlone.number(ratio.key, rounded(*value));
  }

  std::vector<JsonObject> slower;
  for (auto& comparison: findSlower(rows)) {
    JsonObject object;
    auto& row = *comparison.row;
    object.text("case", row.caseName).text("transport", row.transport);
    auto text = describe(row.parameters);
    if (text.size() > 0) object.text("parameters", text.cStr());
    object.text("figure", comparison.figure).number("ratio", rounded(comparison.ratio));
    object.number("least", rounded(comparison.least)).number("most", rounded(comparison.most));
    slower.push_back(object);
  }

  std::vector<std::string> noteTexts;
  for (auto& text: notes) noteTexts.push_back(text.cStr());
  if (noisy > 0) {
    noteTexts.push_back(kj::str("the machine was noisy during ", noisy, " of ", rows.size(),
        " rows").cStr());
  }

  if (wide > 0) {
    noteTexts.push_back(kj::str("the rounds of ", wide, " of ", rows.size(), " rows differ by more "
        "than half").cStr());
  }

  JsonObject noise;
  noise.number("noisy_rows", noisy).number("rows", rows.size());
  noise.number("rows_with_wide_spread", wide);
  noise.number("largest_p50_spread", rounded(worstSpread));

  JsonObject top;
  top.array("results", kj::mv(rowObjects)).object("ratios", ratios);
  top.object("ratio_ranges", ratioRanges).object("rpc_alone", rpcAlone);
  top.array("slower_than_twoparty", slower);
  top.object("machine", describeMachine()).object("noise", noise).array("notes", noteTexts);
  top.boolean("quick", quick);

  capnp::MallocMessageBuilder message;
  auto value = message.initRoot<capnp::json::Value>();
  top.write(value);
  capnp::JsonCodec codec;
  codec.setPrettyPrint(true);
  return codec.encodeRaw(value);
}

}  // namespace bench
}  // namespace capnpshm
