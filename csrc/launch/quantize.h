// Launches of quantize (metal/quantize.metal).
#pragma once

#include "cpu/types.h"
#include "launch/plan.h"

namespace optiq::launch {

struct QuantizeOp {
  size_t rows = 0, cols = 0; // of the weight, leading axes counted as rows
  AffineFormat format = {.bits = 4, .group_size = 64};
  cpu::Float type = cpu::Float::f32; // of the weight, and so of scales and biases
  size_t rows_per_importance = 0;    // 0: min/max without importance
};

// Inputs: the weight, and the importance in float32 if there is one. Outputs: codes, scales,
// biases. Throws std::invalid_argument where no kernel does the job.
Plan plan_quantize(const QuantizeOp& op);

} // namespace optiq::launch
