// y = x @ dequantize(w).T or x @ dequantize(w) for many rows of x; the launches are planned in
// csrc/launch/quantized_matmul.cpp.
#include <metal_stdlib>

#include "qmm.h"

using namespace metal;

// Threads: 128. Grid: x over tiles of BN outputs, y over tiles of BM rows.
template <typename X, typename S, int WIDTHS, int BM, int BN, bool TRANSPOSE>
[[kernel]] void qmm(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    device typename Wider<X, S>::type* y [[buffer(4)]],
    constant QuantizedShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, TRANSPOSE>()];
  qmm_any_width<X, S, typename Wider<X, S>::type, WIDTHS, BM, BN, TRANSPOSE>(x, w, scales, biases,
      y, shape.part[0], shape.m, shape.k, group.y * BM, group.x * BN, index, simdgroup, lane,
      x_tile, w_tile);
}

// Up to four weights of different widths that share x: see qmv_mixed.
template <typename X, typename S, int WIDTHS, int BM, int BN>
[[kernel]] void qmm_mixed(const device X* x [[buffer(0)]], const device uint* w0 [[buffer(1)]],
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
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Wider<X, S>::type Y;
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, true>()];
  const int p = find_part(shape, group.x);
  const int n0 = (int(group.x) - shape.part[p].first_tile) * BN;
  const device uint* w = p == 0 ? w0 : p == 1 ? w1 : p == 2 ? w2 : w3;
  const device S* scales = p == 0 ? scales0 : p == 1 ? scales1 : p == 2 ? scales2 : scales3;
  const device S* biases = p == 0 ? biases0 : p == 1 ? biases1 : p == 2 ? biases2 : biases3;
  device Y* y = p == 0 ? y0 : p == 1 ? y1 : p == 2 ? y2 : y3;
  qmm_any_width<X, S, Y, WIDTHS, BM, BN, true>(x, w, scales, biases, y, shape.part[p], shape.m,
      shape.k, group.y * BM, n0, index, simdgroup, lane, x_tile, w_tile);
}

// Row i of x uses weight indices[i]; grid y runs over the rows, each a tile of its own. Simple,
// and only used where qmv_gather is not: for gradients.
template <typename X, typename S, int WIDTHS, int BM, int BN>
[[kernel]] void qmm_gather(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    const device uint* indices [[buffer(4)]], device typename Wider<X, S>::type* y [[buffer(5)]],
    constant QuantizedShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Wider<X, S>::type Y;
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, false>()];
  const constant QuantizedPart& part = shape.part[0];
  const uint expert = indices[group.y];
  const int n0 = group.x * BN;
  x += size_t(group.y) * shape.k;
  y += size_t(group.y) * part.n;
  if (expert >= uint(shape.experts)) { // not a crash, and visible in the result
    if (int(index) < BN && n0 + int(index) < part.n) {
      y[n0 + index] = Y(NAN);
    }
    return;
  }
  w += size_t(expert) * shape.k * (part.n / 32 * part.bits);
  scales += size_t(expert) * shape.k * (part.n >> part.group_shift);
  biases += size_t(expert) * shape.k * (part.n >> part.group_shift);
  qmm_any_width<X, S, Y, WIDTHS, BM, BN, false>(
      x, w, scales, biases, y, part, 1, shape.k, 0, n0, index, simdgroup, lane, x_tile, w_tile);
}
