// Attention of few query rows over the keys of one split, without matrices: several lanes share a
// key, each with 8 of its elements. They read a record side by side, and every key and value is
// decoded once for all rows. The rest is that of attention.metal, whose kernel merges the splits.
#include <metal_stdlib>

#include "kv_shape.h"
#include "records.h"
#include "softmax.h"

using namespace metal;

// Lanes that share a vector of `dim` elements.
constexpr int lanes_of(int dim) {
  return dim <= 8 ? 1 : dim <= 16 ? 2 : dim <= 32 ? 4 : dim <= 64 ? 8 : dim <= 128 ? 16 : 32;
}

// Vectors in few bits stay codes: scales, biases and the places of codes are outside of the sums.
template <int BITS, bool EXACT>
constexpr bool coded() {
  return BITS != kDense && !EXACT;
}
template <int BITS, bool EXACT>
METAL_FUNC float place(int i) {
  if constexpr (coded<BITS, EXACT>()) {
    return at_place<BITS>(1.0f, i);
  } else {
    return 1;
  }
}

// Scale and bias of elements `at` ... `at` + 7 of a token: bias + scale * place(i) * x[i]; zeros
// where there is none.
template <typename X, int BITS, int GROUP, int DIM, bool EXACT>
METAL_FUNC float2 load_x(
    Tokens<X, BITS, EXACT> tokens, int token, bool there, int at, thread float* x) {
  if constexpr (coded<BITS, EXACT>()) {
    uint words[2] = {0, 0};
    float2 grid = float2(0, 0);
    if (there) {
      grid = load_codes8<BITS, GROUP, DIM>(tokens.stored + token * tokens.stride, at, words);
    }
    codes8<BITS>(words, 0, x);
    return grid;
  } else {
    load8<X, BITS, GROUP, DIM>(tokens, token, there, at, x);
    return float2(1, 0);
  }
}

// The sum over the lanes of a vector, in all of them.
template <int LANES>
METAL_FUNC float sum_of_lanes(float x) {
  if constexpr (LANES >= 4) {
    x = quad_sum(x);
  } else if constexpr (LANES == 2) {
    x += simd_shuffle_xor(x, ushort(1));
  }
#pragma unroll
  for (int mask = 4; mask < LANES; mask *= 2) {
    x += simd_shuffle_xor(x, ushort(mask));
  }
  return x;
}

// What a lane has of a row: a softmax over the keys it saw, and 8 columns of the result.
struct Row {
  Softmax softmax;
  float out[8];
};

METAL_FUNC void merge_rows(thread Row& a, Softmax softmax, const thread float* out) {
  float by, other_by;
  a.softmax = merged(a.softmax, softmax, by, other_by);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    a.out[i] = fma(out[i], other_by, a.out[i] * by);
  }
}

// ROWS: all queries that share a key head. PLAIN: they all see all of these keys, and no score is
// capped. A row has the same bits with any ROWS, but for a window. Threads: 128; a simdgroup takes
// every fourth run of keys, as many as its lanes hold. Grid: x over splits, y 1, z over batch and
// key heads.
template <typename X, int DIM, int VALUE_DIM, int K_BITS, int K_GROUP, int V_BITS, int V_GROUP,
    int ROWS, bool PLAIN, bool EXACT, bool SPLIT>
[[kernel]] void attention_vector(const device X* queries [[buffer(0)]],
    const device typename Stored<X, K_BITS>::type* k [[buffer(1)]],
    const device typename Stored<X, V_BITS>::type* v [[buffer(2)]],
    const device bool* seen [[buffer(3)]], const device float* added [[buffer(4)]],
    const device int* starts [[buffer(5)]], const device X* first_k [[buffer(6)]],
    const device X* first_v [[buffer(7)]], const device X* recent_k [[buffer(8)]],
    const device X* recent_v [[buffer(9)]], const device float* sinks [[buffer(10)]],
    device X* y [[buffer(11)]], device float* parts [[buffer(12)]],
    device float2* states [[buffer(13)]], constant AttentionShape& shape [[buffer(14)]],
    uint3 at [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int lanes = lanes_of(DIM > VALUE_DIM ? DIM : VALUE_DIM);
  constexpr int run = 32 / lanes; // keys of a simdgroup at a time
  threadgroup float shared[ROWS * 10 * lanes];
  const int batch = at.z / shape.kv_heads, kv_head = at.z % shape.kv_heads;
  const int column = int(lane) % lanes * 8, member = int(lane) / lanes;
  const int start = shape.starts ? max(starts[batch], 0) : 0;
  const int first = max(start, query_at(shape, batch, kv_head, 0).first);
  const int begin = first + int(at.x) * shape.split_keys;
  const int end = min(begin + shape.split_keys, query_at(shape, batch, kv_head, ROWS - 1).last + 1);

  const Tokens<X, K_BITS, EXACT> keys = tokens_of<X, K_BITS, EXACT>(
      k, shape.k_strides, first_k, recent_k, DIM, batch, kv_head, start, shape);
  const Tokens<X, V_BITS, EXACT> values = tokens_of<X, V_BITS, EXACT>(
      v, shape.v_strides, first_v, recent_v, VALUE_DIM, batch, kv_head, start, shape);
  Query query[ROWS];
  const float scale = shape.scale * kLog2E;
  Row rows[ROWS];
  X q[ROWS][8];
  float q_sum[ROWS], bias_sum[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    query[r] = query_at(shape, batch, kv_head, r);
    const int64_t head = batch * shape.heads + query[r].head;
    const device X* own = queries + (head * shape.rows + query[r].index) * DIM;
    rows[r].softmax = {-INFINITY, 0};
    q_sum[r] = bias_sum[r] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      q[r][i] = column < DIM ? own[column + i] : X(0);
      q_sum[r] += float(q[r][i]);
      rows[r].out[i] = 0;
    }
  }
  for (int key0 = begin + int(simdgroup) * run; key0 < end; key0 += kSimdgroups * run) {
    const int key = key0 + member;
    const bool there = key < end;
    float x[8], exponents[ROWS];
    float2 grid = load_x<X, K_BITS, K_GROUP, DIM>(keys, key, there && column < DIM, column, x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x[i] *= place<K_BITS, EXACT>(i);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        dot = fma(float(q[r][i]), x[i], dot);
      }
      if constexpr (coded<K_BITS, EXACT>()) {
        dot = fma(grid.x, dot, grid.y * q_sum[r]);
      }
      dot = sum_of_lanes<lanes>(dot) * scale;
      exponents[r] = !there  ? -INFINITY
                     : PLAIN ? dot
                             : exponent(dot, shape, query[r], key, seen, added);
    }
    grid =
        load_x<X, V_BITS, V_GROUP, VALUE_DIM>(values, key, there && column < VALUE_DIM, column, x);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float most = max(rows[r].softmax.most, exponents[r]);
      const float before = fast::exp2(rows[r].softmax.most - removed(most));
      const float p = fast::exp2(exponents[r] - removed(most));
      rows[r].softmax = {most, fma(rows[r].softmax.sum, before, p)};
      bias_sum[r] = fma(bias_sum[r], before, p * grid.y);
      const float times = coded<V_BITS, EXACT>() ? p * grid.x : p;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        rows[r].out[i] = fma(times, x[i], rows[r].out[i] * before);
      }
    }
  }
  if constexpr (coded<V_BITS, EXACT>()) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        rows[r].out[i] = fma(rows[r].out[i], place<V_BITS, EXACT>(i), bias_sum[r]);
      }
    }
  }

  // The lanes of a column meet in the first of them, then its simdgroups in the first.
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int mask = lanes; mask < 32; mask *= 2) {
      float out[8];
      const Softmax other = {simd_shuffle_xor(rows[r].softmax.most, ushort(mask)),
          simd_shuffle_xor(rows[r].softmax.sum, ushort(mask))};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        out[i] = simd_shuffle_xor(rows[r].out[i], ushort(mask));
      }
      merge_rows(rows[r], other, out);
    }
  }
  for (int other = 1; other < kSimdgroups; other++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      threadgroup float* slot = shared + r * 10 * lanes + int(lane) % lanes;
      if (int(simdgroup) == other && member == 0) {
        slot[8 * lanes] = rows[r].softmax.most;
        slot[9 * lanes] = rows[r].softmax.sum;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          slot[i * lanes] = rows[r].out[i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && member == 0) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const threadgroup float* slot = shared + r * 10 * lanes + int(lane) % lanes;
        float out[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          out[i] = slot[i * lanes];
        }
        const Softmax theirs = {slot[8 * lanes], slot[9 * lanes]};
        merge_rows(rows[r], theirs, out);
      }
    }
  }
  if (simdgroup != 0 || member != 0 || column >= VALUE_DIM) {
    return;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64_t head = batch * shape.heads + query[r].head;
    const int64_t result = head * shape.rows + query[r].index;
    if constexpr (SPLIT) {
      const int64_t slot = result * shape.splits + at.x;
      if (column == 0) {
        states[slot] = float2(rows[r].softmax.most, rows[r].softmax.sum);
      }
      if (begin < end) { // the merge does not look at values of an empty split
#pragma unroll
        for (int i = 0; i < 8; i++) {
          parts[slot * VALUE_DIM + column + i] = rows[r].out[i];
        }
      }
    } else {
      const float by = normalizer(rows[r].softmax, shape.sinks ? sinks[query[r].head] : -INFINITY);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        y[result * VALUE_DIM + column + i] = X(rows[r].out[i] * by);
      }
    }
  }
}
