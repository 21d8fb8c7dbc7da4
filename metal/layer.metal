// A decoder layer for one new token of each batch entry, around attention (attention.metal); the
// launches are planned in csrc/launch/layer.cpp. What a kernel hands to the next is in the type of
// the activations; what it holds itself is in float32.
#include <metal_stdlib>

#include "layer_shape.h"
#include "qmv.h"
#include "records.h"

using namespace metal;

// Results among others in rows of `width`.
template <typename Y>
struct StoreColumns {
  device Y* y;
  int width, first;

  void operator()(int row, int n, float sum) const thread {
    y[uint(row * width + first + n)] = Y(sum);
  }
};

// Queries, keys and values of the normalized x, in one array. Grid and threads as in qmv_mixed.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED>
[[kernel]] void layer_in(const device X* x [[buffer(0)]], const device float* gains [[buffer(1)]],
    const device uint* w0 [[buffer(2)]], const device S* scales0 [[buffer(3)]],
    const device S* biases0 [[buffer(4)]], const device uint* w1 [[buffer(5)]],
    const device S* scales1 [[buffer(6)]], const device S* biases1 [[buffer(7)]],
    const device uint* w2 [[buffer(8)]], const device S* scales2 [[buffer(9)]],
    const device S* biases2 [[buffer(10)]], device X* y [[buffer(11)]],
    constant NormedShape& shape [[buffer(12)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 staged[STAGED ? ROWS * K_LANES * staged_chunk<true>() : 1];
  const int p = find_part(shape.product, group.x);
  const constant QuantizedPart& part = shape.product.part[p];
  Position at = position(int(group.x) - part.first_tile, thread_index, simdgroup, lane);
  at.x_row = row_tile<ROWS>(group.y);
  const int m = min(ROWS, shape.product.m - at.x_row), k = shape.product.k;
  const device uint* w = p == 0 ? w0 : p == 1 ? w1 : w2;
  const device S* scales = p == 0 ? scales0 : p == 1 ? scales1 : scales2;
  const device S* biases = p == 0 ? biases0 : p == 1 ? biases1 : biases2;
  Sums<ROWS, RESULTS> acc;
  qmv_any_width<X, S, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, true>(
      x, gains, w, scales, biases, part, m, k, at, staged, acc);
  const StoreColumns<X> store = {y, shape.width, shape.first[p]};
  finish_tile<ROWS, RESULTS, K_LANES, true>(acc, k, shape.eps);
  store_tile<ROWS, RESULTS, K_LANES, SIMDGROUPS>(acc, part, m, at, store);
}

// One vector in memory of the simdgroup, its lanes taking every 32nd value: over the root of its
// mean square, and times `gains` where there are any.
METAL_FUNC void normalize(
    threadgroup float* x, int dim, float eps, int gained, const device float* gains, int lane) {
  float squares = 0;
  for (int i = lane; i < dim; i += 32) {
    squares = fma(x[i], x[i], squares);
  }
  const float by = rsqrt(simd_sum(squares) / float(dim) + eps);
  for (int i = lane; i < dim; i += 32) {
    x[i] *= gained ? by * gains[i] : by;
  }
}

METAL_FUNC void rotate(
    threadgroup float* x, constant HeadsShape& shape, const device float* frequencies, int lane) {
  const int pairs = shape.rotated / 2;
  for (int i = lane; i < pairs; i += 32) {
    const float angle = float(shape.position) * frequencies[i];
    const float c = cos(angle) * shape.magnitude, s = sin(angle) * shape.magnitude;
    const int a = shape.traditional ? 2 * i : i, b = shape.traditional ? a + 1 : i + pairs;
    const float p = x[a], q = x[b];
    x[a] = p * c - q * s;
    x[b] = p * s + q * c;
  }
}

// Where a vector goes in a cache: as it is, or as a record.
template <typename X, int BITS, int GROUP>
METAL_FUNC void write_token(threadgroup float* x, int dim,
    device typename Stored<X, BITS>::type* cache, const constant int64_t* strides, int batch,
    int head, int token, int lane) {
  device typename Stored<X, BITS>::type* to =
      cache + batch * strides[0] + head * strides[1] + token * strides[2];
  if constexpr (BITS == kDense) {
    for (int i = lane; i < dim; i += 32) {
      to[i] = X(x[i]);
    }
  } else {
    const int groups = (dim + GROUP - 1) / GROUP;
    for (int i = lane; i < dim; i += 32) {
      x[i] = float(X(x[i])); // a record is that of a vector
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (lane < groups) {
      write_group<BITS, GROUP>(x + lane * GROUP, dim, lane, to);
    }
  }
}

// Norms and rotation of each head, and keys and values into their caches. Threads: 32. Grid: x over
// queries, keys and values, y over batch entries.
template <typename X, int K_BITS, int K_GROUP, int V_BITS, int V_GROUP>
[[kernel]] void layer_heads(const device X* y [[buffer(0)]], const device float* bias [[buffer(1)]],
    const device float* q_gains [[buffer(2)]], const device float* k_gains [[buffer(3)]],
    const device float* frequencies [[buffer(4)]], device X* queries [[buffer(5)]],
    device typename Stored<X, K_BITS>::type* k [[buffer(6)]],
    device typename Stored<X, V_BITS>::type* v [[buffer(7)]],
    constant HeadsShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float x[256];
  const int dim = shape.dim, batch = group.y;
  const bool is_q = int(group.x) < shape.heads;
  const bool is_k = !is_q && int(group.x) < shape.heads + shape.kv_heads;
  const int head = int(group.x) - (is_q ? 0 : shape.heads) - (is_q || is_k ? 0 : shape.kv_heads);
  const int column = (is_q ? 0 : is_k ? shape.k_first : shape.v_first) + head * dim;
  for (int i = lane; i < dim; i += 32) {
    const float value = float(y[batch * shape.width + column + i]);
    x[i] = shape.bias ? value + bias[column + i] : value;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (is_q ? shape.norm_q : is_k ? shape.norm_k : shape.norm_v) {
    normalize(x, dim,
        is_q   ? shape.eps_q
        : is_k ? shape.eps_k
               : shape.eps_v,
        is_q || is_k, is_q ? q_gains : k_gains, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (is_q || is_k) {
    rotate(x, shape, frequencies, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (is_q) {
    for (int i = lane; i < dim; i += 32) {
      queries[(batch * shape.heads + head) * dim + i] = X(x[i]);
    }
  } else if (is_k) {
    write_token<X, K_BITS, K_GROUP>(x, dim, k, shape.k_strides, batch, head, shape.token, lane);
  } else {
    write_token<X, V_BITS, V_GROUP>(x, dim, v, shape.v_strides, batch, head, shape.token, lane);
  }
}

// Added to what goes past the layer.
template <typename Y>
struct StoreSum {
  const device Y* h;
  device Y* y;
  int width, added;
  float gain;

  void operator()(int row, int n, float sum) const thread {
    const uint i = uint(row * width + n);
    y[i] = Y(added ? fma(gain, sum, float(h[i])) : sum);
  }
};

// h + gain * (x @ w.T). Grid and threads as in qmv.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED>
[[kernel]] void layer_out(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    const device X* h [[buffer(4)]], device X* y [[buffer(5)]],
    constant ResidualShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 staged[STAGED ? ROWS * K_LANES * staged_chunk<false>() : 1];
  const constant QuantizedPart& part = shape.product.part[0];
  Position at = position(group.x, thread_index, simdgroup, lane);
  at.x_row = row_tile<ROWS>(group.y);
  const int m = min(ROWS, shape.product.m - at.x_row), k = shape.product.k;
  Sums<ROWS, RESULTS> acc;
  qmv_any_width<X, S, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, false>(
      x, nullptr, w, scales, biases, part, m, k, at, staged, acc);
  const StoreSum<X> store = {h, y, part.n, shape.added, shape.gain};
  finish_tile<ROWS, RESULTS, K_LANES, false>(acc, k, 0);
  store_tile<ROWS, RESULTS, K_LANES, SIMDGROUPS>(acc, part, m, at, store);
}

// h + gain * x, each row of x over the root of its mean square and times `gains`. Threads: 256, a
// row.
template <typename X>
[[kernel]] void layer_post(const device X* x [[buffer(0)]], const device float* gains [[buffer(1)]],
    const device X* h [[buffer(2)]], device X* y [[buffer(3)]],
    constant PostShape& shape [[buffer(4)]], uint row [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[8];
  x += row * shape.width;
  h += row * shape.width;
  y += row * shape.width;
  float squares = 0;
  for (int i = index; i < shape.width; i += 256) {
    squares = fma(float(x[i]), float(x[i]), squares);
  }
  squares = simd_sum(squares);
  if (lane == 0) {
    sums[simdgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0;
  for (int i = 0; i < 8; i++) {
    all += sums[i];
  }
  const float by = shape.gain * rsqrt(all / float(shape.width) + shape.eps);
  for (int i = index; i < shape.width; i += 256) {
    y[i] = X(fma(float(x[i]) * by, gains[i], float(h[i])));
  }
}

// SiLU, or GELU by tanh: (1 + tanh(z)) / 2 is the sigmoid of 2 z.
METAL_FUNC float activated(float x, int gelu) {
  const float z = gelu ? 1.5957691216f * fma(0.044715f * x * x, x, x) : x;
  return x / (1 + exp(-z));
}

// act(gate) * up of the normalized x: both rows of a result in one threadgroup, written once. Grid
// and threads as in qmv.
template <typename X, typename S, int GATE_BITS, int UP_BITS, int ROWS, int RESULTS, int K_LANES,
    int SIMDGROUPS, bool STAGED>
[[kernel]] void layer_gated(const device X* x [[buffer(0)]],
    const device float* gains [[buffer(1)]], const device uint* w0 [[buffer(2)]],
    const device S* scales0 [[buffer(3)]], const device S* biases0 [[buffer(4)]],
    const device uint* w1 [[buffer(5)]], const device S* scales1 [[buffer(6)]],
    const device S* biases1 [[buffer(7)]], device X* y [[buffer(8)]],
    constant GatedShape& shape [[buffer(9)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 staged[STAGED ? ROWS * K_LANES * staged_chunk<true>() : 1];
  const constant QuantizedPart& part = shape.product.part[0];
  Position at = position(group.x, thread_index, simdgroup, lane);
  at.x_row = row_tile<ROWS>(group.y);
  const int m = min(ROWS, shape.product.m - at.x_row), k = shape.product.k;
  Sums<ROWS, RESULTS> gate, up;
  qmv_tile<X, S, GATE_BITS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, true>(
      x, gains, w0, scales0, biases0, part, m, k, at, staged, gate);
  finish_tile<ROWS, RESULTS, K_LANES, true>(gate, k, shape.eps);
  at.w_row = shape.up_row;
  qmv_tile<X, S, UP_BITS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, true>(
      x, gains, w1, scales1, biases1, shape.product.part[1], m, k, at, staged, up);
  finish_tile<ROWS, RESULTS, K_LANES, true>(up, k, shape.eps);
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
#pragma unroll
    for (int r = 0; r < RESULTS; r++) {
      up.of[row][r] *= activated(gate.of[row][r], shape.gelu);
    }
  }
  const StoreRows<X> store = {y, part.n};
  store_tile<ROWS, RESULTS, K_LANES, SIMDGROUPS>(up, part, m, at, store);
}
