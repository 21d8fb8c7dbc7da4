// Launches of kl_divergence (metal/kl_divergence.metal).
#pragma once

#include "cpu/types.h"
#include "launch/plan.h"

namespace optiq::launch {

struct Head {
  int d = 0;
  cpu::Float type = cpu::Float::f32; // of a dense head, or of scales and biases
  AffineFormat format = {};
};

struct KlDivergenceOp {
  int tokens = 0, vocabulary = 0;
  Head p, q;
  float soft_cap = 0; // 0: none
};

// Inputs: h_p and h_q in float32, then each head: one array, or codes, scales and biases.
// Outputs: kl, agree, lse_p, lse_q. Throws std::invalid_argument where no kernel does the job.
Plan plan_kl_divergence(const KlDivergenceOp& op);

} // namespace optiq::launch
