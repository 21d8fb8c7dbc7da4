// The choices that only a measurement on the chip can settle, in one table.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace optiq::launch {

// As in the last three letters of Metal's architecture name: applegpu_g15d is {15, 'd'}.
// Generation 13 is M1 ... 17 is M5; g: base and pro, s: max, d: ultra, p: phone.
struct Gpu {
  int generation = 15;
  char size = 'g';
};

Gpu parse_gpu(std::string_view architecture);

struct Tuning {
  // qmv: up to 16 rows of x.
  int k_lanes = 8;      // lanes that share a row of weights; fixes the order of summation
  int results = 4;      // rows of weights a lane holds, for 1 to 3 rows of x
  int results_wide = 2; // the same for 4 to 8; half of it for more rows
  int simdgroups = 2;   // of a threadgroup, where x is not staged
  int stage_from = 4;   // rows of x from which a threadgroup copies x to its own memory
  int staged_tile = 32; // outputs of a threadgroup then
  // qmm: more rows.
  int qmm_from = 17;    // rows of x from which it takes over, at most 17
  int narrow_from = 32; // threadgroups; with fewer, they get 32 outputs, not 64, and split the sums
  // Attention over quantized keys and values.
  int kv_split = 0; // keys of a threadgroup; 0: by the bytes that splitting adds
};

// The table's row for the chip, with what OPTIQ_TUNE overrides: `name=value` joined by commas,
// such as OPTIQ_TUNE="k_lanes=16,qmm_from=9". Throws std::invalid_argument on anything else.
Tuning tuning(Gpu gpu);

// The same with the text in place of the environment.
Tuning tuning(Gpu gpu, std::string_view overrides);

struct Knob {
  const char* name;
  int Tuning::* value;
  std::vector<int> allowed;
};

// What OPTIQ_TUNE can set.
const std::vector<Knob>& knobs();

} // namespace optiq::launch
