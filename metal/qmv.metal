// y = x @ dequantize(w).T for up to 16 rows of x; the launches are planned in
// csrc/launch/quantized_matmul.cpp.
#include <metal_stdlib>

#include "qmv.h"

using namespace metal;

// Threads: 32 * SIMDGROUPS. Grid: one threadgroup per tile of SIMDGROUPS * (32 / K_LANES) *
// RESULTS outputs.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED>
[[kernel]] void qmv(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    device typename Wider<X, S>::type* y [[buffer(4)]],
    constant QuantizedShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup X staged[STAGED ? ROWS * K_LANES * (32 + 16 / sizeof(X)) : 1];
  Position at;
  at.tile = group.x;
  at.index = thread_index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  qmv_any_width<X, S, typename Wider<X, S>::type, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS,
      STAGED>(x, w, scales, biases, y, shape.part[0], shape.m, shape.k, at, staged);
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
  threadgroup X staged[STAGED ? ROWS * K_LANES * (32 + 16 / sizeof(X)) : 1];
  const int p = find_part(shape, group.x);
  Position at;
  at.tile = int(group.x) - shape.part[p].first_tile;
  at.index = thread_index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  const device uint* w = p == 0 ? w0 : p == 1 ? w1 : p == 2 ? w2 : w3;
  const device S* scales = p == 0 ? scales0 : p == 1 ? scales1 : p == 2 ? scales2 : scales3;
  const device S* biases = p == 0 ? biases0 : p == 1 ? biases1 : p == 2 ? biases2 : biases3;
  device Y* y = p == 0 ? y0 : p == 1 ? y1 : p == 2 ? y2 : y3;
  qmv_any_width<X, S, Y, WIDTHS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED>(
      x, w, scales, biases, y, shape.part[p], shape.m, shape.k, at, staged);
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
  threadgroup X staged[1];
  const constant QuantizedPart& part = shape.part[0];
  Position at;
  at.tile = group.x;
  at.index = thread_index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  const uint expert = indices[group.y];
  x += size_t(group.y) * shape.k;
  y += size_t(group.y) * part.n;
  if (expert >= uint(shape.experts)) { // not a crash, and visible in the result
    constexpr int tile = SIMDGROUPS * (32 / K_LANES) * RESULTS;
    for (int i = at.index; i < tile && at.tile * tile + i < part.n; i += SIMDGROUPS * 32) {
      y[at.tile * tile + i] = Y(NAN);
    }
    return;
  }
  w += size_t(expert) * part.n * (shape.k / 32 * part.bits);
  scales += size_t(expert) * part.n * (shape.k >> part.group_shift);
  biases += size_t(expert) * part.n * (shape.k >> part.group_shift);
  qmv_any_width<X, S, Y, WIDTHS, 1, RESULTS, K_LANES, SIMDGROUPS, false>(
      x, w, scales, biases, y, part, 1, shape.k, at, staged);
}
