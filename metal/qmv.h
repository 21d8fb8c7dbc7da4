// One tile of the product for few rows of x: the body of the kernels in qmv.metal.
#pragma once

#include "affine.h"
#include "parts.h"
#include "types.h"

struct Position {
  int tile;  // of the weight
  int index; // of the thread in its threadgroup
  int simdgroup;
  int lane;
  int x_row; // the first, of x and of the result
  int w_row; // the first, of the weight
};

METAL_FUNC Position position(int tile, uint index, uint simdgroup, uint lane) {
  Position at;
  at.tile = tile;
  at.index = index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  at.x_row = 0;
  at.w_row = 0;
  return at;
}

// The first row of a tile. Only kernels for 8 rows have several; in others it is known to be none.
template <int ROWS>
METAL_FUNC int row_tile(uint tile) {
  return ROWS == 8 ? int(tile) * ROWS : 0;
}

// 32 staged values of x and four sums of 8 of them, in float4; of values to be normalized also four
// sums of squares. An odd number, so that lanes read different memory banks.
template <bool NORM>
constexpr int staged_chunk() {
  return NORM ? 11 : 9;
}

// 32 codes of a row. Where they begin is an index of 32 bits: addresses have 64, which cost several
// operations each.
template <int BITS>
struct Codes32 {
  uint words[BITS];

  void load(const device uint* w, uint first) thread {
#pragma unroll
    for (int i = 0; i < BITS; i++) {
      words[i] = (w + first)[i];
    }
  }
  void eighth(int at, thread float* codes) thread {
    codes8<BITS>(words, at, codes);
  }
  static float placed(float x, int i) {
    return at_place<BITS>(x, i);
  }
};
// Bytes are loaded as such, when they are used, so they need neither masks nor registers before.
template <>
struct Codes32<8> {
  const device uchar4* quads;
  uint first;

  void load(const device uint* w, uint at) thread {
    quads = (const device uchar4*)w;
    first = at;
  }
  void eighth(int at, thread float* codes) thread {
#pragma unroll
    for (int quad = 0; quad < 2; quad++) {
      const uchar4 four = quads[first + uint(2 * at + quad)];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        codes[4 * quad + i] = float(four[i]);
      }
    }
  }
  static float placed(float x, int i) {
    return x;
  }
};

// What a lane holds: of ROWS rows of x with RESULTS rows of the weight.
template <int ROWS, int RESULTS>
struct Sums {
  float of[ROWS][RESULTS];
  float squares[ROWS]; // of x, where it is to be normalized
};

// Eight values of x from `from` on, each in the place that a code asks for; their sum; and with
// NORM the sum of their squares, the values being times their gains. Staged or not, the same
// operations.
template <typename X, int BITS, bool NORM>
METAL_FUNC void eight_of_x(const device X* from, const device float* gains, bool there,
    thread float* values, thread float& sum, thread float& squares) {
  sum = squares = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float value = there ? float(from[i]) : 0.0f;
    if constexpr (NORM) {
      squares = fma(value, value, squares);
      sum = fma(value, gains[i], sum);
      value *= gains[i];
    } else {
      sum += value;
    }
    values[i] = Codes32<BITS>::placed(value, i);
  }
}

// The tile's block of x from column k0 on, for all simdgroups of the threadgroup.
template <typename X, int BITS, int ROWS, int K_LANES, int SIMDGROUPS, bool NORM>
METAL_FUNC void stage(const device X* x, const device float* gains, int m, int k, int k0,
    Position at, threadgroup float4* staged) {
  constexpr int block = 32 * K_LANES;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = at.index * 8; i < ROWS * block; i += SIMDGROUPS * 32 * 8) {
    const int row = i / block, col = i % block;
    if (k0 + col < k) {
      float values[8], sum, squares;
      eight_of_x<X, BITS, NORM>(x + uint((at.x_row + row) * k + k0 + col), gains + k0 + col,
          row < m, values, sum, squares);
      threadgroup float4* to = staged + (row * K_LANES + col / 32) * staged_chunk<NORM>();
      to[col % 32 / 4] = float4(values[0], values[1], values[2], values[3]);
      to[col % 32 / 4 + 1] = float4(values[4], values[5], values[6], values[7]);
      ((threadgroup float*)(to + 8))[col % 32 / 8] = sum;
      if constexpr (NORM) {
        ((threadgroup float*)(to + 9))[col % 32 / 8] = squares;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

METAL_FUNC float in_order(float4 four) {
  return ((four[0] + four[1]) + four[2]) + four[3];
}

// K_LANES lanes share a row of weights, each taking 32 codes at a time; the other 32 / K_LANES
// lanes do the same for other rows, so that their reads of x coincide. A lane holds RESULTS rows.
// Every code is unpacked once and used for all ROWS rows of x.
//
// sum of x (scale code + bias) = scale (sum of x code) + bias (sum of x), so scales and biases are
// not in the inner sums. What the place of a code asks for is in x (affine.h), once for all weights
// where x is staged.
//
// The order of summation depends on K_LANES alone: lane l takes, in order, the codes 32 (l + i
// K_LANES) ... + 31 for i = 0, 1, ... by eights, in each from the first to the last; then the lanes
// are added by halves. So a row of the result has the same bits however many rows stand beside it.
// All sums of products are explicit fma, because what the compiler contracts by itself could differ
// between instantiations.
//
// STAGED: the threadgroup copies its block of x into `staged` once, instead of every simdgroup
// reading it. NORM: of x times gains.
template <typename X, typename S, int BITS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED, bool NORM>
METAL_FUNC void qmv_tile(const device X* x, const device float* gains, const device uint* w,
    const device S* scales, const device S* biases, const constant QuantizedPart& part, int m,
    int k, Position at, threadgroup float4* staged, thread Sums<ROWS, RESULTS>& acc) {
  constexpr int row_lanes = 32 / K_LANES;
  const int k_lane = at.lane % K_LANES;
  const int simdgroup_first = (at.tile * SIMDGROUPS + at.simdgroup) * row_lanes * RESULTS;
  const int first = simdgroup_first + at.lane / K_LANES;
  const bool busy = simdgroup_first < part.n;

#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    acc.squares[row] = 0;
#pragma unroll
    for (int r = 0; r < RESULTS; r++) {
      acc.of[row][r] = 0;
    }
  }
  for (int k0 = 0; k0 < k; k0 += 32 * K_LANES) {
    if constexpr (STAGED) {
      stage<X, BITS, ROWS, K_LANES, SIMDGROUPS, NORM>(x, gains, m, k, k0, at, staged);
    }
    const int at_k = k0 + 32 * k_lane;
    if (busy && at_k < k) {
      Codes32<BITS> words[RESULTS];
      float scale[RESULTS], bias[RESULTS];
#pragma unroll
      for (int r = 0; r < RESULTS; r++) {
        const uint row = uint(at.w_row + min(first + r * row_lanes, part.n - 1));
        const uint run = row * uint(k / 32) + uint(at_k / 32); // of 32 codes, in the whole weight
        words[r].load(w, run * BITS);
        const uint group = run >> (part.group_shift - 5);
        scale[r] = float(scales[group]);
        bias[r] = float(biases[group]);
      }
      float sums[ROWS] = {}, squares[ROWS] = {}; // of x
#pragma unroll
      for (int eighth = 0; eighth < 4; eighth++) {
        float codes[RESULTS][8];
#pragma unroll
        for (int r = 0; r < RESULTS; r++) {
          words[r].eighth(eighth, codes[r]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          float xs[8];
          if constexpr (STAGED) {
            const threadgroup float4* from =
                staged + (row * K_LANES + k_lane) * staged_chunk<NORM>();
            const float4 low = from[2 * eighth], high = from[2 * eighth + 1];
            xs[0] = low[0], xs[1] = low[1], xs[2] = low[2], xs[3] = low[3];
            xs[4] = high[0], xs[5] = high[1], xs[6] = high[2], xs[7] = high[3];
          } else {
            float sum, square;
            eight_of_x<X, BITS, NORM>(
                x + uint((at.x_row + min(row, m - 1)) * k + at_k) + 8 * eighth,
                gains + at_k + 8 * eighth, true, xs, sum, square);
            sums[row] += sum;
            squares[row] += square;
          }
#pragma unroll
          for (int r = 0; r < RESULTS; r++) {
            float dot = xs[0] * codes[r][0];
#pragma unroll
            for (int i = 1; i < 8; i++) {
              dot = fma(xs[i], codes[r][i], dot);
            }
            acc.of[row][r] = fma(scale[r], dot, acc.of[row][r]);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        if constexpr (STAGED) {
          const threadgroup float4* from =
              staged + (row * K_LANES + k_lane) * staged_chunk<NORM>() + 8;
          sums[row] = in_order(from[0]);
          if constexpr (NORM) {
            squares[row] = in_order(from[1]);
          }
        }
        if constexpr (NORM) {
          acc.squares[row] += squares[row];
        }
#pragma unroll
        for (int r = 0; r < RESULTS; r++) {
          acc.of[row][r] = fma(bias[r], sums[row], acc.of[row][r]);
        }
      }
    }
  }
}

// The lanes of a row, added by halves.
template <int K_LANES>
METAL_FUNC float over_lanes(float sum) {
#pragma unroll
  for (int step = K_LANES / 2; step > 0; step /= 2) {
    sum += simd_shuffle_xor(sum, ushort(step));
  }
  return sum;
}

// The lanes' sums added. NORM: and divided by the root of the mean square of x.
template <int ROWS, int RESULTS, int K_LANES, bool NORM>
METAL_FUNC void finish_tile(thread Sums<ROWS, RESULTS>& acc, int k, float eps) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float by = 1;
    if constexpr (NORM) {
      by = rsqrt(over_lanes<K_LANES>(acc.squares[row]) / float(k) + eps);
    }
#pragma unroll
    for (int r = 0; r < RESULTS; r++) {
      const float sum = over_lanes<K_LANES>(acc.of[row][r]);
      acc.of[row][r] = NORM ? sum * by : sum;
    }
  }
}

// Gives each result of the tile to `store(row of x, row of the weight, sum)`.
template <int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS, typename Store>
METAL_FUNC void store_tile(thread const Sums<ROWS, RESULTS>& acc,
    const constant QuantizedPart& part, int m, Position at, Store store) {
  constexpr int row_lanes = 32 / K_LANES;
  const int first = (at.tile * SIMDGROUPS + at.simdgroup) * row_lanes * RESULTS + at.lane / K_LANES;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
#pragma unroll
    for (int r = 0; r < RESULTS; r++) {
      const int n = first + r * row_lanes;
      if (at.lane % K_LANES == 0 && n < part.n && row < m) {
        store(at.x_row + row, n, acc.of[row][r]);
      }
    }
  }
}

// The same for a width known only at run time.
template <typename X, typename S, int WIDTHS, int ROWS, int RESULTS, int K_LANES, int SIMDGROUPS,
    bool STAGED, bool NORM>
METAL_FUNC void qmv_any_width(const device X* x, const device float* gains, const device uint* w,
    const device S* scales, const device S* biases, const constant QuantizedPart& part, int m,
    int k, Position at, threadgroup float4* staged, thread Sums<ROWS, RESULTS>& acc) {
#define OPTIQ_TILE(BITS)                                                  \
  qmv_tile<X, S, BITS, ROWS, RESULTS, K_LANES, SIMDGROUPS, STAGED, NORM>( \
      x, gains, w, scales, biases, part, m, k, at, staged, acc)
  OPTIQ_AT_WIDTH(WIDTHS, part.bits, OPTIQ_TILE)
#undef OPTIQ_TILE
}

// Results as they are, in rows of `width`.
template <typename Y>
struct StoreRows {
  device Y* y;
  int width;

  void operator()(int row, int n, float sum) const thread {
    y[uint(row * width + n)] = Y(sum);
  }
};
