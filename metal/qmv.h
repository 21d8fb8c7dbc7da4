// One tile of outputs for up to 16 rows of x: the body of the kernels in qmv.metal.
#pragma once

#include "affine.h"
#include "parts.h"
#include "types.h"

// Where a thread stands.
struct Position {
  int tile;  // of the part
  int index; // in the threadgroup
  int simdgroup;
  int lane;
};

// K_LANES lanes share a row of weights, each decoding 32 codes at a time; the other 32 / K_LANES
// lanes do the same for other rows, so that their reads of x coincide. A lane holds RESULTS rows.
// Every weight is decoded once and used for all ROWS rows of x.
//
// The order of summation depends on K_LANES alone: lane l sums, in order, the codes 32 (l + i
// K_LANES) ... + 31 for i = 0, 1, ...; then the lanes are added by halves. So a row of the result
// has the same bits however many rows stand beside it. All products are explicit fma, because
// what the compiler contracts by itself could differ between instantiations.
//
// STAGED: the threadgroup copies its block of x into `staged` once, instead of every simdgroup
// reading it.
template <typename X, typename S, typename Y, int BITS, int ROWS, int RESULTS, int K_LANES,
    int SIMDGROUPS, bool STAGED>
METAL_FUNC void qmv_tile(const device X* x, const device uint* w, const device S* scales,
    const device S* biases, device Y* y, constant QuantizedPart& part, int m, int k, Position at,
    threadgroup X* staged) {
  constexpr int row_lanes = 32 / K_LANES;
  constexpr int block = 32 * K_LANES;
  constexpr int chunk = 32 + 16 / sizeof(X); // padded: lanes read different memory banks
  const int k_lane = at.lane % K_LANES;
  const int simdgroup_first = (at.tile * SIMDGROUPS + at.simdgroup) * row_lanes * RESULTS;
  const int first = simdgroup_first + at.lane / K_LANES;
  const bool busy = simdgroup_first < part.n;
  const int row_words = k / 32 * part.bits;
  const int groups = k >> part.group_shift;

  float acc[ROWS][RESULTS] = {};
  for (int k0 = 0; k0 < k; k0 += block) {
    if constexpr (STAGED) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = at.index * 8; i < ROWS * block; i += SIMDGROUPS * 32 * 8) {
        const int row = i / block, col = i % block;
        if (k0 + col < k) {
          const device X* from = x + row * k + k0 + col;
          threadgroup X* to = staged + (row * K_LANES + col / 32) * chunk + col % 32;
          for (int j = 0; j < 8; j++) {
            to[j] = row < m ? from[j] : X(0);
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int at_k = k0 + 32 * k_lane;
    if (busy && at_k < k) {
      uint words[RESULTS][BITS];
      float scale[RESULTS], bias[RESULTS];
#pragma unroll
      for (int r = 0; r < RESULTS; r++) {
        const int row = min(first + r * row_lanes, part.n - 1);
        load_codes<BITS, 32>(w + row * row_words, at_k, words[r]);
        scale[r] = float(scales[row * groups + (at_k >> part.group_shift)]);
        bias[r] = float(biases[row * groups + (at_k >> part.group_shift)]);
      }
#pragma unroll
      for (int eighth = 0; eighth < 4; eighth++) {
        float weights[RESULTS][8];
#pragma unroll
        for (int r = 0; r < RESULTS; r++) {
          decode8<BITS>(words[r], eighth, scale[r], bias[r], weights[r]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          float xs[8];
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if constexpr (STAGED) {
              xs[i] = float(staged[(row * K_LANES + k_lane) * chunk + 8 * eighth + i]);
            } else {
              xs[i] = float(x[min(row, m - 1) * k + at_k + 8 * eighth + i]);
            }
          }
#pragma unroll
          for (int r = 0; r < RESULTS; r++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
              acc[row][r] = fma(xs[i], weights[r][i], acc[row][r]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
#pragma unroll
    for (int r = 0; r < RESULTS; r++) {
      float sum = acc[row][r];
#pragma unroll
      for (int step = K_LANES / 2; step > 0; step /= 2) {
        sum += simd_shuffle_xor(sum, ushort(step));
      }
      const int n = first + r * row_lanes;
      if (k_lane == 0 && n < part.n && row < m) {
        y[row * part.n + n] = Y(sum);
      }
    }
  }
}

// The same for a width known only at run time.
template <typename X, typename S, typename Y, int WIDTHS, int ROWS, int RESULTS, int K_LANES,
    int SIMDGROUPS, bool STAGED>
METAL_FUNC void qmv_any_width(const device X* x, const device uint* w, const device S* scales,
    const device S* biases, device Y* y, constant QuantizedPart& part, int m, int k, Position at,
    threadgroup X* staged) {
#define OPTIQ_TILE(BITS)                                               \
  qmv_tile<X, S, Y, BITS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED>( \
      x, w, scales, biases, y, part, m, k, at, staged)
  OPTIQ_AT_WIDTH(WIDTHS, part.bits, OPTIQ_TILE)
#undef OPTIQ_TILE
}
