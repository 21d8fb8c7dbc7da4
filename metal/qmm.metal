// y = x @ dequantize(w).T or x @ dequantize(w) for many rows of x; the launches are planned in
// csrc/launch/quantized_matmul.cpp.
#include <metal_stdlib>

#include "qmm.h"

using namespace metal;

// What is written: y, or the sums of each split, one after the other, which qmm_merge adds.
template <typename X, typename S, bool SPLIT>
struct Result {
  typedef typename Wider<X, S>::type type;
};
template <typename X, typename S>
struct Result<X, S, true> {
  typedef float type;
};

// Threads: 128. Grid: x over tiles of BN outputs, split by split, y over tiles of BM rows.
template <typename X, typename S, int WIDTHS, int BM, int BN, bool TRANSPOSE, bool SPLIT>
[[kernel]] void qmm(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    device typename Result<X, S, SPLIT>::type* y [[buffer(4)]],
    constant QuantizedShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, TRANSPOSE>()];
  const constant QuantizedPart& part = shape.part[0];
  const Tile tile = tile_of<BM, BN>(part, shape.k, group.x, group.y);
  y += size_t(tile.from / part.columns) * shape.m * part.n;
  qmm_any_width<X, S, typename Result<X, S, SPLIT>::type, WIDTHS, BM, BN, TRANSPOSE>(x, w, scales,
      biases, y, part, shape.m, shape.k, tile, index, simdgroup, lane, x_tile, w_tile);
}

// Up to four weights of different widths that share x: see qmv_mixed.
template <typename X, typename S, int WIDTHS, int BM, int BN, bool SPLIT>
[[kernel]] void qmm_mixed(const device X* x [[buffer(0)]], const device uint* w0 [[buffer(1)]],
    const device S* scales0 [[buffer(2)]], const device S* biases0 [[buffer(3)]],
    const device uint* w1 [[buffer(4)]], const device S* scales1 [[buffer(5)]],
    const device S* biases1 [[buffer(6)]], const device uint* w2 [[buffer(7)]],
    const device S* scales2 [[buffer(8)]], const device S* biases2 [[buffer(9)]],
    const device uint* w3 [[buffer(10)]], const device S* scales3 [[buffer(11)]],
    const device S* biases3 [[buffer(12)]],
    device typename Result<X, S, SPLIT>::type* y0 [[buffer(13)]],
    device typename Result<X, S, SPLIT>::type* y1 [[buffer(14)]],
    device typename Result<X, S, SPLIT>::type* y2 [[buffer(15)]],
    device typename Result<X, S, SPLIT>::type* y3 [[buffer(16)]],
    constant QuantizedShape& shape [[buffer(17)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Result<X, S, SPLIT>::type Y;
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, true>()];
  const int p = find_part(shape, group.x);
  const constant QuantizedPart& part = shape.part[p];
  const Tile tile = tile_of<BM, BN>(part, shape.k, int(group.x) - part.first_tile, group.y);
  const device uint* w = p == 0 ? w0 : p == 1 ? w1 : p == 2 ? w2 : w3;
  const device S* scales = p == 0 ? scales0 : p == 1 ? scales1 : p == 2 ? scales2 : scales3;
  const device S* biases = p == 0 ? biases0 : p == 1 ? biases1 : p == 2 ? biases2 : biases3;
  device Y* y = p == 0 ? y0 : p == 1 ? y1 : p == 2 ? y2 : y3;
  y += size_t(tile.from / part.columns) * shape.m * part.n;
  qmm_any_width<X, S, Y, WIDTHS, BM, BN, true>(x, w, scales, biases, y, part, shape.m, shape.k,
      tile, index, simdgroup, lane, x_tile, w_tile);
}

// Adds the splits of each part, in order. Grid: x over tiles of 256 outputs, a thread for each, y
// over rows.
template <typename X, typename S>
[[kernel]] void qmm_merge(const device float* sums0 [[buffer(0)]],
    const device float* sums1 [[buffer(1)]], const device float* sums2 [[buffer(2)]],
    const device float* sums3 [[buffer(3)]], device typename Wider<X, S>::type* y0 [[buffer(4)]],
    device typename Wider<X, S>::type* y1 [[buffer(5)]],
    device typename Wider<X, S>::type* y2 [[buffer(6)]],
    device typename Wider<X, S>::type* y3 [[buffer(7)]],
    constant QuantizedShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const int p = find_part(shape, group.x);
  const constant QuantizedPart& part = shape.part[p];
  const int column = (int(group.x) - part.first_tile) * 256 + int(index);
  if (column >= part.n) {
    return;
  }
  const size_t at = size_t(group.y) * part.n + column;
  const device float* sums = (p == 0 ? sums0 : p == 1 ? sums1 : p == 2 ? sums2 : sums3) + at;
  float sum = *sums;
  for (int from = part.columns; from < shape.k; from += part.columns) {
    sums += size_t(shape.m) * part.n;
    sum += *sums;
  }
  (p == 0 ? y0 : p == 1 ? y1 : p == 2 ? y2 : y3)[at] = typename Wider<X, S>::type(sum);
}

// The first row of each expert where the indices ascend, then of those that name no expert, and the
// end of all. Threads: 128. Grid: x over these, a thread for each.
template <typename I>
[[kernel]] void expert_rows(const device I* indices [[buffer(0)]], device int* first [[buffer(1)]],
    constant QuantizedShape& shape [[buffer(2)]], uint expert [[thread_position_in_grid]]) {
  if (int(expert) > shape.experts + 1) {
    return;
  }
  int from = int(expert) > shape.experts ? shape.m : 0, to = shape.m;
  while (from < to) {
    const int middle = (from + to) / 2;
    if (indices[middle] < expert) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  first[expert] = from;
}

// Rows of x, up to `to`, that use one weight.
struct ExpertRows {
  int expert, from, to;
};

// Those of tile `at`, where the rows of each expert are cut into tiles of BM; none if there are
// fewer tiles. The lanes of a simdgroup take an expert each.
template <int BM>
METAL_FUNC ExpertRows expert_tile(const device int* first, int experts, int m, int at, int lane) {
  for (int e = 0, before = 0; e <= experts; e += 32) {
    const int mine = min(e + lane, experts + 1);
    const int from = first[mine], to = first[min(mine + 1, experts + 1)];
    const int tiles = max(0, to - from + BM - 1) / BM; // also if indices do not ascend
    const int upto = before + simd_prefix_inclusive_sum(tiles);
    const ushort owner = ushort(simd_sum(int(upto <= at)));
    if (owner < 32) {
      const int skipped = at - simd_shuffle(upto - tiles, owner);
      return {e + owner, simd_shuffle(from, owner) + skipped * BM, simd_shuffle(to, owner)};
    }
    before = simd_shuffle(upto, 31);
  }
  return {experts, m, m};
}

// Many rows of x in the order of their experts. Threads: 128. Grid: x over tiles of BN outputs, y
// over tiles of rows, as many as there may be.
template <typename X, typename S, int WIDTHS, int BM, int BN>
[[kernel]] void qmm_experts(const device X* x [[buffer(0)]], const device uint* w [[buffer(1)]],
    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
    const device int* first [[buffer(4)]], device typename Wider<X, S>::type* y [[buffer(5)]],
    constant QuantizedShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Wider<X, S>::type Y;
  threadgroup X x_tile[x_tile_size<X, BM>()];
  threadgroup float w_tile[w_tile_size<BN, true>()];
  const constant QuantizedPart& part = shape.part[0];
  const ExpertRows rows = expert_tile<BM>(first, shape.experts, shape.m, group.y, lane);
  const Tile tile = {rows.from, int(group.x) * BN, 0, shape.k};
  if (rows.expert >= shape.experts) { // not a crash, and visible in the result
    const int end = min(rows.to, rows.from + BM);
    for (int i = int(index); i < BN * (end - rows.from); i += 128) {
      const int n = tile.n0 + i % BN;
      if (n < part.n) {
        y[size_t(rows.from + i / BN) * part.n + n] = Y(NAN);
      }
    }
    return;
  }
  const size_t at = size_t(rows.expert) * part.n;
  w += at * (shape.k / 32 * part.bits);
  scales += at * (shape.k >> part.group_shift);
  biases += at * (shape.k >> part.group_shift);
  qmm_any_width<X, S, Y, WIDTHS, BM, BN, true>(x, w, scales, biases, y, part, rows.to, shape.k,
      tile, index, simdgroup, lane, x_tile, w_tile);
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
  const Tile tile = {0, int(group.x) * BN, 0, shape.k};
  x += size_t(group.y) * shape.k;
  y += size_t(group.y) * part.n;
  if (expert >= uint(shape.experts)) { // not a crash, and visible in the result
    if (int(index) < BN && tile.n0 + int(index) < part.n) {
      y[tile.n0 + index] = Y(NAN);
    }
    return;
  }
  w += size_t(expert) * shape.k * (part.n / 32 * part.bits);
  scales += size_t(expert) * shape.k * (part.n >> part.group_shift);
  biases += size_t(expert) * shape.k * (part.n >> part.group_shift);
  qmm_any_width<X, S, Y, WIDTHS, BM, BN, false>(
      x, w, scales, biases, y, part, 1, shape.k, tile, index, simdgroup, lane, x_tile, w_tile);
}
