// Launches of gathered low-rank products (metal/low_rank.metal).
#pragma once

#include "cpu/types.h"
#include "launch/plan.h"

namespace optiq::launch {

struct LowRankOp {
  int rows = 0, in = 0, out = 0;     // of x and the result
  int rank = 0;                      // of all terms
  int slots = 0;                     // terms that are stacked; slot 0 is none
  cpu::Float type = cpu::Float::f32; // of the terms
};

// Inputs: x in float32, a [slots, in, rank], b [slots, rank, out], and the slot of each row.
// Output 0: [rows, out] in float32. Throws std::invalid_argument where no kernel does the job.
Plan plan_low_rank(const LowRankOp& op);

} // namespace optiq::launch
