// Launches of x @ dequantize(w).T (metal/qmv.metal, metal/qmm.metal).
#pragma once

#include <vector>

#include "cpu/types.h"
#include "launch/plan.h"
#include "launch/tuning.h"

namespace optiq::launch {

using cpu::Float;

struct QuantizedWeight {
  int out = 0; // columns of the result
  AffineFormat format = {};
  Float scales = Float::f32; // and biases
};

struct QuantizedMatmul {
  int rows = 0;  // of x
  int inner = 0; // columns of x
  Float x = Float::f32;
  std::vector<QuantizedWeight> weights; // that share x; four of one type of scales go in a launch
  bool transpose = true;                // false: x @ dequantize(w), of one weight
  int experts = 0;     // of one weight, stacked: row i uses the one that indices[i] names
  bool sorted = false; // the indices ascend
};

// Inputs: x, then codes, scales and biases of each weight, then indices if there are experts.
// Outputs: one per weight, [rows, out], in the wider type of x and scales. Throws
// std::invalid_argument where no kernel does the job.
Plan plan_quantized_matmul(const QuantizedMatmul& op, const Tuning& tuning);

} // namespace optiq::launch
