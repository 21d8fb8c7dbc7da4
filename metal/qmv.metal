// y = x @ dequantize(w).T for up to 16 rows of x; the launches are planned in
// csrc/launch/quantized_matmul.cpp.
#include <metal_stdlib>

#include "qmv.h"

using namespace metal;

// Threads: 32 * SIMDGROUPS. Grid: x over tiles of SIMDGROUPS * (32 / K_LANES) * RESULTS outputs, y
// over tiles of ROWS rows.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED>
[[kernel]] void qmv(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    device typename Wider<X, S>::type* y [[buffer(4)]],
    constant QuantizedShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 staged[STAGED ? ROWS * K_LANES * staged_chunk<false>() : 1];
  Position at = position(group.x, thread_index, simdgroup, lane);
  at.x_row = row_tile<ROWS>(group.y);
  const int m = min(ROWS, shape.m - at.x_row);
  Sums<ROWS, RESULTS> acc;
  qmv_any_width<X, S, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, false>(
      x, nullptr, w, scales, biases, shape.part[0], m, shape.k, at, staged, acc);
  const StoreRows<typename Wider<X, S>::type> store = {y, shape.part[0].n};
  finish_tile<ROWS, RESULTS, K_LANES, false>(acc, shape.k, 0);
  store_tile<ROWS, RESULTS, K_LANES, SIMDGROUPS>(acc, shape.part[0], m, at, store);
}

// Up to four weights of different widths that share x, such as q, k and v: their tiles lie one
// after the other in one grid.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED>
[[kernel]] void qmv_mixed(const device X* x [[buffer(0)]], const device uint* w0 [[buffer(1)]],
    const device S* scales0 [[buffer(2)]], const device S* biases0 [[buffer(3)]],
    const device uint* w1 [[buffer(4)]], const device S* scales1 [[buffer(5)]],
    const device S* biases1 [[buffer(6)]], const device uint* w2 [[buffer(7)]],
    const device S* scales2 [[buffer(8)]], const device S* biases2 [[buffer(9)]],
    const device uint* w3 [[buffer(10)]], const device S* scales3 [[buffer(11)]],
    const device S* biases3 [[buffer(12)]], device typename Wider<X, S>::type* y0 [[buffer(13)]],
    device typename Wider<X, S>::type* y1 [[buffer(14)]],
    device typename Wider<X, S>::type* y2 [[buffer(15)]],
    device typename Wider<X, S>::type* y3 [[buffer(16)]],
    constant QuantizedShape& shape [[buffer(17)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Wider<X, S>::type Y;
  threadgroup float4 staged[STAGED ? ROWS * K_LANES * staged_chunk<false>() : 1];
  const int p = find_part(shape, group.x);
  Position at = position(int(group.x) - shape.part[p].first_tile, thread_index, simdgroup, lane);
  at.x_row = row_tile<ROWS>(group.y);
  const int m = min(ROWS, shape.m - at.x_row);
  const device uint* w = p == 0 ? w0 : p == 1 ? w1 : p == 2 ? w2 : w3;
  const device S* scales = p == 0 ? scales0 : p == 1 ? scales1 : p == 2 ? scales2 : scales3;
  const device S* biases = p == 0 ? biases0 : p == 1 ? biases1 : p == 2 ? biases2 : biases3;
  Sums<ROWS, RESULTS> acc;
  qmv_any_width<X, S, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, false>(
      x, nullptr, w, scales, biases, shape.part[p], m, shape.k, at, staged, acc);
  const StoreRows<Y> store = {p == 0 ? y0 : p == 1 ? y1 : p == 2 ? y2 : y3, shape.part[p].n};
  finish_tile<ROWS, RESULTS, K_LANES, false>(acc, shape.k, 0);
  store_tile<ROWS, RESULTS, K_LANES, SIMDGROUPS>(acc, shape.part[p], m, at, store);
}

// Row i of x uses weight indices[i] of several stacked ones; grid y runs over the rows.
template <typename X, typename S, int WIDTHS, int RESULTS, int K_LANES, int SIMDGROUPS>
[[kernel]] void qmv_gather(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    const device uint* indices [[buffer(4)]], device typename Wider<X, S>::type* y [[buffer(5)]],
    constant QuantizedShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Wider<X, S>::type Y;
  threadgroup float4 staged[1];
  const constant QuantizedPart& part = shape.part[0];
  Position at = position(group.x, thread_index, simdgroup, lane);
  const uint expert = indices[group.y];
  at.x_row = group.y;
  at.w_row = int(expert) * part.n;
  if (expert >= uint(shape.experts)) { // not a crash, and visible in the result
    constexpr int tile = SIMDGROUPS * (32 / K_LANES) * RESULTS;
    for (int i = at.index; i < tile && at.tile * tile + i < part.n; i += SIMDGROUPS * 32) {
      y[at.x_row * part.n + at.tile * tile + i] = Y(NAN);
    }
    return;
  }
  Sums<1, RESULTS> acc;
  qmv_any_width<X, S, WIDTHS, 1, RESULTS, K_LANES, SIMDGROUPS, false, false>(
      x, nullptr, w, scales, biases, part, 1, shape.k, at, staged, acc);
  const StoreRows<Y> store = {y, part.n};
  finish_tile<1, RESULTS, K_LANES, false>(acc, shape.k, 0);
  store_tile<1, RESULTS, K_LANES, SIMDGROUPS>(acc, part, 1, at, store);
}
