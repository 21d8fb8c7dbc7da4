// One tile of the product for many rows of x: the body of the kernels in qmm.metal.
#pragma once

#include <metal_simdgroup_matrix>

#include "affine.h"
#include "parts.h"
#include "types.h"

// Columns of the reduction that are in threadgroup memory at a time: the smallest group size, so
// a piece lies in one group, and `k` is a multiple of it.
constant constexpr int kDepth = 32;

// Threadgroup memory, in elements. Rows are padded by 16 bytes against bank conflicts.
template <typename X, int BM>
constexpr int x_tile_size() {
  return BM * (kDepth + 16 / sizeof(X));
}
template <int BN, bool TRANSPOSE>
constexpr int w_tile_size() {
  return TRANSPOSE ? BN * (kDepth + 4) : kDepth * (BN + 4);
}

// A tile of x, zeros outside of it: 128 threads, each a run of one row.
template <typename X, int BM>
METAL_FUNC void load_x(
    const device X* x, int m0, int m, int k0, int k, int index, threadgroup X* tile) {
  constexpr int run = BM * kDepth / 128;
  const int row = index * run / kDepth, col = index * run % kDepth;
  const device X* from = x + size_t(m0 + row) * k + k0 + col;
  threadgroup X* to = tile + row * (kDepth + 16 / sizeof(X)) + col;
#pragma unroll
  for (int i = 0; i < run; i++) {
    to[i] = m0 + row < m && k0 + col + i < k ? from[i] : X(0);
  }
}

// A tile of the weight, decoded once for all rows of x and kept in float32, so the product sees
// the same weights as in qmv. TRANSPOSE: w is [n, k] and the tile [BN, kDepth]; otherwise w is
// [k, n] and the tile [kDepth, BN].
template <typename S, int BITS, int BN, bool TRANSPOSE>
METAL_FUNC void load_w(const device uint* w, const device S* scales, const device S* biases,
    const constant QuantizedPart& part, int n0, int k0, int k, int index, threadgroup float* tile) {
  constexpr int width = TRANSPOSE ? kDepth : BN;
  constexpr int height = TRANSPOSE ? BN : kDepth;
  constexpr int runs = width / 16;
  if (index >= height * runs) {
    return;
  }
  const int row = index / runs, col = index % runs * 16;
  const int rows = TRANSPOSE ? part.n : k, cols = TRANSPOSE ? k : part.n;
  const int row0 = TRANSPOSE ? n0 : k0, col0 = TRANSPOSE ? k0 : n0;
  threadgroup float* to = tile + row * (width + 4) + col;
  if (row0 + row >= rows || col0 + col >= cols) { // cols is a multiple of 16
#pragma unroll
    for (int i = 0; i < 16; i++) {
      to[i] = 0;
    }
    return;
  }
  const int at = (row0 + row) * (cols >> part.group_shift) + ((col0 + col) >> part.group_shift);
  const float scale = float(scales[at]), bias = float(biases[at]);
  uint words[(BITS + 1) / 2];
  load_codes<BITS>(w + size_t(row0 + row) * (cols / 32 * BITS), col0 + col, words);
#pragma unroll
  for (int eighth = 0; eighth < 2; eighth++) {
    float weights[8];
    decode8<BITS>(words, eighth, scale, bias, weights);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      to[8 * eighth + i] = weights[i];
    }
  }
}

// The tile of a part that a threadgroup works on.
struct Tile {
  int m0, n0;   // its first row and output
  int from, to; // columns of x
};

// Tile `at` of the part, counted split by split, and the rows of group row `y`.
template <int BM, int BN>
METAL_FUNC Tile tile_of(const constant QuantizedPart& part, int k, int at, int y) {
  const int tiles = (part.n + BN - 1) / BN, from = at / tiles * part.columns;
  return {y * BM, at % tiles * BN, from, min(k, from + part.columns)};
}

// y[m0 ... + BM, n0 ... + BN] by 4 simdgroups, two by two. Lane l of a simdgroup holds elements
// [row, col] and [row, col + 1] of each 8x8 matrix, as in MLX's steel/gemm/mma.h.
template <typename X, typename S, typename Y, int BITS, int BM, int BN, bool TRANSPOSE>
METAL_FUNC void qmm_tile(const device X* x, const device uint* w, const device S* scales,
    const device S* biases, device Y* y, const constant QuantizedPart& part, int m, int k,
    Tile tile, int index, int simdgroup, int lane, threadgroup X* x_tile,
    threadgroup float* w_tile) {
  const int m0 = tile.m0, n0 = tile.n0;
  constexpr int x_stride = kDepth + 16 / sizeof(X);
  constexpr int w_stride = TRANSPOSE ? kDepth + 4 : BN + 4;
  constexpr int tm = BM / 16, tn = BN / 16; // matrices of a simdgroup
  const int row = (lane / 16) * 4 + lane / 2 % 4;
  const int col = lane / 8 % 2 * 4 + lane % 2 * 2;
  const int m1 = simdgroup / 2 * (BM / 2) + row, n1 = simdgroup % 2 * (BN / 2);

  simdgroup_matrix<float, 8, 8> acc[tm][tn];
#pragma unroll
  for (int i = 0; i < tm; i++) {
#pragma unroll
    for (int j = 0; j < tn; j++) {
      acc[i][j].thread_elements()[0] = 0;
      acc[i][j].thread_elements()[1] = 0;
    }
  }
  for (int k0 = tile.from; k0 < tile.to; k0 += kDepth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_x<X, BM>(x, m0, m, k0, k, index, x_tile);
    load_w<S, BITS, BN, TRANSPOSE>(w, scales, biases, part, n0, k0, k, index, w_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int kk = 0; kk < kDepth; kk += 8) {
      simdgroup_matrix<float, 8, 8> a[tm], b[tn];
#pragma unroll
      for (int i = 0; i < tm; i++) {
        const threadgroup X* from = x_tile + (m1 + 8 * i) * x_stride + kk + col;
        a[i].thread_elements()[0] = float(from[0]);
        a[i].thread_elements()[1] = float(from[1]);
      }
#pragma unroll
      for (int j = 0; j < tn; j++) {
        const int n = n1 + 8 * j + col;
        const threadgroup float* from =
            w_tile + (TRANSPOSE ? n * w_stride + kk + row : (kk + row) * w_stride + n);
        b[j].thread_elements()[0] = from[0];
        b[j].thread_elements()[1] = from[TRANSPOSE ? w_stride : 1];
      }
#pragma unroll
      for (int i = 0; i < tm; i++) {
#pragma unroll
        for (int j = 0; j < tn; j++) {
          simdgroup_multiply_accumulate(acc[i][j], a[i], b[j], acc[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < tm; i++) {
    if (m0 + m1 + 8 * i < m) {
      device Y* to = y + size_t(m0 + m1 + 8 * i) * part.n;
#pragma unroll
      for (int j = 0; j < tn; j++) {
        const int n = n0 + n1 + 8 * j + col;
        if (n < part.n) {
          to[n] = Y(acc[i][j].thread_elements()[0]);
        }
        if (n + 1 < part.n) {
          to[n + 1] = Y(acc[i][j].thread_elements()[1]);
        }
      }
    }
  }
}

// The same for a width known only at run time.
template <typename X, typename S, typename Y, int WIDTHS, int BM, int BN, bool TRANSPOSE>
METAL_FUNC void qmm_any_width(const device X* x, const device uint* w, const device S* scales,
    const device S* biases, device Y* y, const constant QuantizedPart& part, int m, int k,
    Tile tile, int index, int simdgroup, int lane, threadgroup X* x_tile,
    threadgroup float* w_tile) {
#define OPTIQ_TILE(BITS)                      \
  qmm_tile<X, S, Y, BITS, BM, BN, TRANSPOSE>( \
      x, w, scales, biases, y, part, m, k, tile, index, simdgroup, lane, x_tile, w_tile)
  OPTIQ_AT_WIDTH(WIDTHS, part.bits, OPTIQ_TILE)
#undef OPTIQ_TILE
}
