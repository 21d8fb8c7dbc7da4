#include "launch/tuning.h"

#include <charconv>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace optiq::launch {

namespace {

// By size letter; no two generations differ yet. Derived, not measured: no Mac has run these
// kernels. k_lanes 8 is what stock MLX measured best for several rows of x; larger chips need
// more threadgroups to keep all cores busy at one row, hence 16. narrow_from is about two
// threadgroups per core.
Tuning table(Gpu gpu) {
  Tuning t;
  switch (gpu.size) {
    case 's':
      t.k_lanes = 16;
      t.narrow_from = 80;
      break;
    case 'c':
    case 'd':
      t.k_lanes = 16;
      t.narrow_from = 160;
      break;
    default:
      break;
  }
  return t;
}

} // namespace

const std::vector<Knob>& knobs() {
  static const std::vector<Knob> all = {
      {"k_lanes", &Tuning::k_lanes, {4, 8, 16, 32}},
      {"results", &Tuning::results, {1, 2, 4, 8}},
      {"results_wide", &Tuning::results_wide, {1, 2, 4, 8}},
      {"simdgroups", &Tuning::simdgroups, {1, 2, 4, 8}},
      {"stage_from", &Tuning::stage_from,
          {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}},
      {"staged_tile", &Tuning::staged_tile, {16, 32, 64}},
      {"qmm_from", &Tuning::qmm_from, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}},
      {"narrow_from", &Tuning::narrow_from, {0, 16, 32, 64, 80, 96, 128, 160, 192, 256}},
      {"kv_split", &Tuning::kv_split, {0, 128, 256, 512, 1024, 2048, 4096}},
  };
  return all;
}

namespace {

[[noreturn]] void fail(std::string_view item) {
  std::ostringstream msg;
  msg << "OPTIQ_TUNE: '" << item << "' is not name=value with one of";
  for (const Knob& knob : knobs()) {
    msg << " " << knob.name << "=";
    for (size_t i = 0; i < knob.allowed.size(); i++) {
      msg << (i ? "|" : "") << knob.allowed[i];
    }
  }
  throw std::invalid_argument(msg.str());
}

void apply(std::string_view item, Tuning& t) {
  size_t equals = item.find('=');
  if (equals == std::string_view::npos) {
    fail(item);
  }
  std::string_view name = item.substr(0, equals), text = item.substr(equals + 1);
  int value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    fail(item);
  }
  for (const Knob& knob : knobs()) {
    if (name == knob.name) {
      for (int allowed : knob.allowed) {
        if (value == allowed) {
          t.*knob.value = value;
          return;
        }
      }
    }
  }
  fail(item);
}

} // namespace

Gpu parse_gpu(std::string_view architecture) {
  size_t n = architecture.size();
  auto digit = [&](size_t i) { return architecture[i] >= '0' && architecture[i] <= '9'; };
  if (n < 3 || !digit(n - 3) || !digit(n - 2)) {
    return {}; // a chip of the future: the defaults are right everywhere, only perhaps slower
  }
  return {(architecture[n - 3] - '0') * 10 + architecture[n - 2] - '0', architecture[n - 1]};
}

Tuning tuning(Gpu gpu, std::string_view overrides) {
  Tuning t = table(gpu);
  while (!overrides.empty()) {
    size_t comma = overrides.find(',');
    apply(overrides.substr(0, comma), t);
    overrides = comma == std::string_view::npos ? "" : overrides.substr(comma + 1);
  }
  return t;
}

Tuning tuning(Gpu gpu) {
  const char* overrides = std::getenv("OPTIQ_TUNE");
  return tuning(gpu, overrides ? overrides : "");
}

} // namespace optiq::launch
