// Dense weights and few rows of x (decode, speculative and small batched decoding): dot products
// along the rows of W. Every output is summed in the same order whatever the number of rows, so
// batching does not move near-tie tokens.
#pragma once

#include "pool.h"
#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kMaxDotRows = 16; // rows of x; beyond this the tiled product in gemm.h wins
constexpr int kTile = 8;        // rows of W in flight, enough to hide the latency of fma

// Rows of W a task works on; all of them where waking threads would cost more than it gains.
inline int rows_per_task(const Matmul& a) {
  if (2.0 * a.m * a.w.rows * a.w.cols < kSerialFlops) {
    return a.w.rows;
  }
  int tasks = num_threads() * kTasksPerThread;
  int tiles = (a.w.rows + kTile - 1) / kTile;
  return (tiles + tasks - 1) / tasks * kTile;
}

// y[m, n] = sum_k x[m, k] w[n, k], dense weights.
template <Float TYPE>
struct DenseDots {
  const Matmul& a;
  int rows_each;

  void operator()(int task) {
    const Weight& w = a.w;
    int end = (task + 1) * rows_each < w.rows ? (task + 1) * rows_each : w.rows;
    for (int n = task * rows_each; n < end; n += kTile) {
      int tile = kTile < end - n ? kTile : end - n;
      const char* row[kTile];
      for (int r = 0; r < kTile; r++) {
        row[r] = static_cast<const char*>(w.data) + (n + (r < tile ? r : 0)) * w.row_bytes();
      }
      // Two rows of x at a time share each converted weight.
      int m = 0;
      for (; m + 2 <= a.m; m += 2) {
        dots<2>(row, m, n, tile);
      }
      if (m < a.m) {
        dots<1>(row, m, n, tile);
      }
    }
  }

 private:
  template <int ROWS>
  OPTIQ_INLINE void dots(const char* const* row, int m, int n, int tile) {
    int cols = a.w.cols;
    const float* x = a.x + size_t(m) * cols;
    for (int half = 0; half < kTile; half += kTile / ROWS) {
      f32x8 acc[ROWS][kTile / ROWS] = {};
      int k = 0;
      for (; k + 8 <= cols; k += 8) {
        step<ROWS>(row + half, acc, k, 8, x, cols);
      }
      if (k < cols) {
        step<ROWS>(row + half, acc, k, cols - k, x, cols);
      }
      for (int r = 0; r < kTile / ROWS && half + r < tile; r++) {
        for (int i = 0; i < ROWS; i++) {
          a.y[size_t(m + i) * a.w.rows + n + half + r] = sum(acc[i][r]);
        }
      }
    }
  }

  template <int ROWS>
  OPTIQ_INLINE void step(const char* const* row, f32x8 (*acc)[kTile / ROWS], int k, int width,
      const float* x, int cols) {
    f32x8 xk[ROWS];
    for (int i = 0; i < ROWS; i++) {
      xk[i] = width == 8 ? load<f32x8>(x + size_t(i) * cols + k)
                         : load_tail(x + size_t(i) * cols, Float::f32, k, width);
    }
    for (int r = 0; r < kTile / ROWS; r++) {
      f32x8 wk = width == 8 ? load_float(row[r], TYPE, k) : load_tail(row[r], TYPE, k, width);
      for (int i = 0; i < ROWS; i++) {
        acc[i][r] += wk * xk[i];
      }
    }
  }
};

template <Float TYPE>
void dense_dots(const Matmul& a) {
  int each = rows_per_task(a);
  DenseDots<TYPE> body{a, each};
  parallel_for((a.w.rows + each - 1) / each, body);
}

inline void dense_dots(const Matmul& a) {
  switch (a.w.type) {
    case Float::f32:
      return dense_dots<Float::f32>(a);
    case Float::f16:
      return dense_dots<Float::f16>(a);
    default:
      return dense_dots<Float::bf16>(a);
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
