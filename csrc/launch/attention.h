// Launches of attention over a cache of keys and values in few bits (metal/attention.metal, and
// metal/attention_vector.metal for few queries), and of the records of such a cache
// (metal/quantize_kv.metal).
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cpu/types.h"
#include "launch/plan.h"
#include "launch/tuning.h"

namespace optiq::launch {

// Keys or values `[batch, kv_heads, keys, ...]`: records, or plain vectors of the queries' type.
struct KvTensor {
  int dim = 0;                      // of the vectors it stands for
  AffineFormat format = {};         // dense: plain vectors
  std::array<int64_t, 3> strides{}; // of batch entry, head and token, in items
};

// BITS and GROUP of the kernels.
std::vector<std::string> kv_format(const KvTensor& x);

struct QuantizedAttention {
  int batch = 1, heads = 1, kv_heads = 1;
  int rows = 1; // queries, which belong to the last of the keys
  int keys = 0;
  cpu::Float type = cpu::Float::f32; // of the queries, and so of all plain vectors and the result
  KvTensor k, v;
  float scale = 1, softcap = 0; // 0: none
  bool causal = false;
  int window = 0;                                                    // 0: all
  enum class Mask : uint8_t { none, seen, added } mask = Mask::none; // bool or float32
  std::array<int, 4> mask_shape{}; // broadcasts to [batch, heads, rows, keys]
  bool sinks = false, starts = false;
  int first = 0, recent = 0; // exact keys and values
};

// Inputs: the queries [batch, heads, rows, k.dim], k, v, then what there is of mask, starts in
// int32, first keys and values, recent keys and values, sinks in float32. k and v may have
// strides, all else is row-major. Output: [batch, heads, rows, v.dim]. Throws
// std::invalid_argument where no kernel does the job.
Plan plan_quantized_attention(const QuantizedAttention& op, const Tuning& tuning);

// Tells the launches of a plan of the same attention how many keys there are now, and their
// strides; false where they are split in another number of parts, which takes another plan.
bool replan_attention(
    const QuantizedAttention& op, const Tuning& tuning, Launch* first, int launches);

struct QuantizeKv {
  size_t vectors = 0;
  int dim = 0;
  AffineFormat format = {};
  cpu::Float type = cpu::Float::f32;
};

// Input: the vectors [vectors, dim]; output: their records.
Plan plan_quantize_kv(const QuantizeKv& op);

} // namespace optiq::launch
