// Launches of a decoder layer for one new token of each batch entry (metal/layer.metal and
// metal/attention.metal): 7, or 6 where the keys are not split; one more for each norm of a result.
#pragma once

#include <optional>
#include <vector>

#include "launch/attention.h"
#include "launch/quantized_matmul.h"

namespace optiq::launch {

struct DecodeLayer {
  int width = 0;                    // of h
  QuantizedAttention attention;     // one row of h for each batch entry, 16 at most; its type is
                                    // that of h, and so of all that kernels hand on
  std::vector<QuantizedWeight> qkv; // queries, keys, values; or all in one; or no values: the keys
  QuantizedWeight out;
  std::vector<QuantizedWeight> gate_up; // or both in one
  QuantizedWeight down;
  float eps_in = 0, eps_mlp = 0;                  // of the norms before attention and MLP
  std::optional<float> eps_q, eps_k, eps_v;       // of the norms of heads
  std::optional<float> eps_attended, eps_mlp_out; // of the norms of their results
  float gain = 1;                                 // of the results
  bool bias = false;                              // of queries, keys and values
  bool gelu = false;                              // by tanh, else SiLU
  struct Rope {
    int dims = 0; // of a head
    bool traditional = false;
    float magnitude = 1;
  } rope;
  int token = 0;    // where the new keys and values go in the caches
  int position = 0; // in the sequence
};

// Inputs of the plan, in this order. All floats that are not of weights are float32. What there is
// not must be bound all the same, with whatever.
enum class LayerInput : int {
  h,
  gains_in,
  gains_mlp,
  gains_q,
  gains_k,
  gains_attended,
  gains_mlp_out,
  bias,
  frequencies,
  sinks,
  weights, // codes, scales and biases of each: qkv, out, gate_up, down
};

// Outputs: h [batch, width], then the caches, whose contents the launches read and add to. Throws
// std::invalid_argument where no kernel does the job.
Plan plan_decode_layer(const DecodeLayer& op, const Tuning& tuning);

// The plan of a layer from token to token: only what moves with the caches is written anew, until
// the keys are split in another number of parts.
class LayerPlan {
 public:
  LayerPlan(const DecodeLayer& op, const Tuning& tuning);

  // `op` is the layer's, with another token, keys, position or strides.
  const Plan& at(const DecodeLayer& op);
  int made() const { // plans, so far
    return made_;
  }

 private:
  void make(const DecodeLayer& op);

  const Tuning tuning_;
  Plan plan_;
  int made_ = 0;
};

} // namespace optiq::launch
