// Codes, scale and bias for each group of a weight; the launches are planned in
// csrc/launch/quantize.cpp. The search is that of csrc/cpu/quantize*.h, min/max that of MLX's own
// GPU kernel, which is not that of its CPU.
//
// A thread holds eight consecutive weights, whose codes fill as many bytes as a code has bits.
// A group is GROUP / 8 neighbouring lanes, which share its sums by shuffles; all of them are in
// the array or none.
#include <metal_stdlib>

#include "quantize_shape.h"

using namespace metal;

constant constexpr int kSteps = 36; // grids tried, as in csrc/cpu/quantize.h
constant constexpr float kStep = 0.05f;
constant constexpr int kRefits = 3;

struct Grid {
  float scale;
  float bias;
};

// The same sum in every lane of a group, bit for bit: each step adds two numbers that both of
// its lanes have.
template <int GROUP>
METAL_FUNC float group_sum(float x) {
#pragma unroll
  for (ushort step = 1; step < GROUP / 8; step *= 2) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
}

template <int GROUP>
METAL_FUNC float group_least(float x) {
#pragma unroll
  for (ushort step = 1; step < GROUP / 8; step *= 2) {
    x = min(x, simd_shuffle_xor(x, step));
  }
  return x;
}

// Scale and bias of mx.quantize, operation by operation: the edge of larger magnitude is hit
// exactly, and zero is a code. On a GPU MLX rounds half away from zero, on a CPU half to even.
METAL_FUNC Grid stock_grid(float least, float most, float top) {
  const bool negative = fabs(least) > fabs(most);
  float scale = (most - least) / top;
  scale = scale < 1e-7f ? 1e-7f : scale;
  scale = negative ? scale : -scale;
  const float edge = negative ? least : most;
  const float steps = round(edge / scale);
  Grid grid = {scale, 0.0f};
  if (steps != 0) {
    grid.scale = edge / steps;
    grid.bias = edge;
  }
  return grid;
}

// Eight weights and the range of their group; NaN is in no range, as in MLX.
template <typename T, int GROUP>
METAL_FUNC float2 load_group(const device T* w, bool inside, thread float* x) {
  float least = INFINITY, most = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    x[i] = inside ? float(w[i]) : 0.0f;
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  return float2(group_least<GROUP>(least), -group_least<GROUP>(-most));
}

METAL_FUNC float clamp_code(float code, float top) {
  return code > 0 ? (code < top ? code : top) : 0.0f; // NaN becomes 0
}

template <typename T, int BITS, int GROUP>
METAL_FUNC void write_group(uint octet, thread const float* codes, Grid grid, device uchar* out,
    device T* scales, device T* biases) {
  uint low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    low |= uint(codes[i]) << (i * BITS);
    high |= uint(codes[i + 4]) << (i * BITS);
  }
  const ulong word = ulong(low) | ulong(high) << (4 * BITS);
  device uchar* to = out + size_t(octet) * BITS;
#pragma unroll
  for (int i = 0; i < BITS; i++) {
    to[i] = uchar(word >> (8 * i));
  }
  if (octet % (GROUP / 8) == 0) {
    scales[octet / (GROUP / 8)] = T(grid.scale);
    biases[octet / (GROUP / 8)] = T(grid.bias);
  }
}

// mx.quantize as MLX's GPU kernel does it: the range of a group holds zero where all its weights
// are negative. Threads: 256, each eight weights.
template <typename T, int BITS, int GROUP>
[[kernel]] void quantize_minmax(const device T* w [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device T* scales [[buffer(2)]], device T* biases [[buffer(3)]],
    constant QuantizeShape& shape [[buffer(4)]], uint octet [[thread_position_in_grid]]) {
  const float top = float((1 << BITS) - 1);
  const bool inside = octet < shape.octets;
  float x[8];
  const float2 range = load_group<T, GROUP>(w + size_t(octet) * 8, inside, x);
  const Grid grid = stock_grid(range.x, max(range.y, 0.0f), top);
  if (inside) {
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      q[i] = clamp_code(round((x[i] - grid.bias) / grid.scale), top);
    }
    write_group<T, BITS, GROUP>(octet, q, grid, codes, scales, biases);
  }
}

// One group's weights, the importance of their errors, and the sums that no grid changes.
struct Group {
  float x[8];
  float c[8];
  float sum_c;
  float sum_cx;
};

// The grid of least weighted error for given codes; false where the codes are all the same.
// Codes are counted from the middle, since float32 would lose digits to a large mean.
template <int GROUP>
METAL_FUNC bool least_squares(
    thread const Group& in, thread const float* codes, float top, thread Grid& grid) {
  float cq = 0, cqq = 0, cqx = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float u = codes[i] - 0.5f * top;
    cq += in.c[i] * u;
    cqq += in.c[i] * u * u;
    cqx += in.c[i] * u * in.x[i];
  }
  cq = group_sum<GROUP>(cq);
  cqq = group_sum<GROUP>(cqq);
  cqx = group_sum<GROUP>(cqx);
  const float determinant = in.sum_c * cqq - cq * cq;
  if (!(determinant > 0)) {
    return false;
  }
  grid.scale = (in.sum_c * cqx - in.sum_cx * cq) / determinant;
  grid.bias = (cqq * in.sum_cx - cq * cqx) / determinant - grid.scale * (0.5f * top);
  return true;
}

template <int GROUP>
METAL_FUNC float weighted_error(thread const Group& in, thread const float* codes, Grid grid) {
  float error = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float d = codes[i] * grid.scale + grid.bias - in.x[i];
    error += in.c[i] * d * d;
  }
  return group_sum<GROUP>(error);
}

// The grid as it is stored, the codes it gives, and their error.
template <typename T, int GROUP>
METAL_FUNC float derive(thread const Group& in, float top, thread Grid& grid, thread float* codes) {
  grid.scale = float(T(grid.scale));
  grid.bias = float(T(grid.bias));
  const float inverse = grid.scale != 0 ? 1 / grid.scale : 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    codes[i] = clamp_code(rint((in.x[i] - grid.bias) * inverse), top);
  }
  return weighted_error<GROUP>(in, codes, grid);
}

// The same by weighted search; importance is [rows / rows_per_importance, cols].
template <typename T, int BITS, int GROUP>
[[kernel]] void quantize_search(const device T* w [[buffer(0)]],
    const device float* importance [[buffer(1)]], device uchar* out [[buffer(2)]],
    device T* scales [[buffer(3)]], device T* biases [[buffer(4)]],
    constant QuantizeShape& shape [[buffer(5)]], uint octet [[thread_position_in_grid]]) {
  const float top = float((1 << BITS) - 1);
  const bool inside = octet < shape.octets;
  Group in;
  const float2 range = load_group<T, GROUP>(w + size_t(octet) * 8, inside, in.x);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    squares += in.x[i] * in.x[i];
  }
  squares = 2 * group_sum<GROUP>(squares) / float(GROUP);
  const uint row_octets = shape.cols / 8;
  const uint row = octet / row_octets, col = octet % row_octets * 8;
  const device float* weight =
      importance + size_t(row / shape.rows_per_importance) * shape.cols + col;
  in.sum_c = 0;
  in.sum_cx = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    in.c[i] = inside ? weight[i] * sqrt(squares + in.x[i] * in.x[i]) : 0.0f;
    in.sum_c += in.c[i];
    in.sum_cx += in.c[i] * in.x[i];
  }
  in.sum_c = group_sum<GROUP>(in.sum_c);
  in.sum_cx = group_sum<GROUP>(in.sum_cx);

  float best_codes[8], codes[8];
  Grid best = stock_grid(range.x, range.y, top);
  float best_error = derive<T, GROUP>(in, top, best, best_codes);
  const float width = range.y - range.x;
  // No lane leaves the loops early: the others of its simdgroup would wait for it in shuffles.
  const bool search = width > 0 && in.sum_c > 0;
  Grid found = best;
  float error = best_error;
  for (int s = 0; s <= kSteps; s++) {
    const float inverse = (top - 0.9f + kStep * float(s)) / width;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      codes[i] = clamp_code(rint((in.x[i] - range.x) * inverse), top);
    }
    Grid grid = found;
    const bool fits = least_squares<GROUP>(in, codes, top, grid);
    const float e = weighted_error<GROUP>(in, codes, grid);
    if (search && fits && e < error) {
      error = e;
      found = grid;
    }
  }
  float e = derive<T, GROUP>(in, top, found, codes);
  for (int refit = 0; refit <= kRefits; refit++) {
    if (search && e < best_error) {
      best_error = e;
      best = found;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        best_codes[i] = codes[i];
      }
    }
    least_squares<GROUP>(in, codes, top, found);
    e = derive<T, GROUP>(in, top, found, codes);
  }
  if (inside) {
    write_group<T, BITS, GROUP>(octet, best_codes, best, out, scales, biases);
  }
}
