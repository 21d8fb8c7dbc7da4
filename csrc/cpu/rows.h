// Few rows of x (decode, speculative and small batched decoding): dot products along the rows
// of W. Each weight is decoded once for all rows of x, and every output is summed in the same
// order whatever the number of rows, so batching does not move near-tie tokens.
#pragma once

#include "decode.h"
#include "pool.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kMaxDotRows = 16; // rows of x; beyond this the tiled product in gemm.h wins
constexpr int kTile = 8;        // rows of W in flight, enough to hide the latency of fma
constexpr int kTasksPerThread = 4;

// Rows of W a task works on; all of them where waking threads would cost more than it gains.
inline int rows_per_task(const Matmul& a) {
  if (2.0 * a.m * a.w.rows * a.w.cols < kSerialFlops) {
    return a.w.rows;
  }
  int tasks = num_threads() * kTasksPerThread;
  int tiles = (a.w.rows + kTile - 1) / kTile;
  return (tiles + tasks - 1) / tasks * kTile;
}

inline size_t padded(size_t n) {
  return (n + 7) / 8 * 8;
}

// y[m, n] = sum_g scale[n, g] * (sum_{k in g} x[m, k] code[n, k]) + sum_g bias[n, g] * xsum[m, g]
template <class Codes>
struct AffineDots {
  const Matmul& a;
  const float* x;    // [m, cols] swizzled
  const float* xsum; // [m, padded groups] sum of x over each group, then zeros
  int rows_each;

  void operator()(int task) {
    const Weight& w = a.w;
    int groups = w.cols / w.group_size;
    int end = min((task + 1) * rows_each, w.rows);
    // Zeros after the end: finish() multiplies whole vectors with the padded xsum.
    Scratch<float> scales(size_t(kTile) * groups + 8);
    Scratch<float> biases(size_t(kTile) * groups + 8);
    std::memset(scales, 0, (size_t(kTile) * groups + 8) * sizeof(float));
    std::memset(biases, 0, (size_t(kTile) * groups + 8) * sizeof(float));
    Scratch<float> codes(size_t(kTile) * w.group_size);
    Scratch<uint8_t> last(w.row_bytes() + 8); // for the last row, which decode() may read past
    for (int n = task * rows_each; n < end; n += kTile) {
      int tile = min(kTile, end - n);
      const uint8_t* row[kTile];
      for (int r = 0; r < kTile; r++) {
        int i = n + (r < tile ? r : 0);
        row[r] = static_cast<const uint8_t*>(w.data) + i * w.row_bytes();
        if (Codes::kOverread > 0 && i == w.rows - 1) {
          std::memcpy(last, row[r], w.row_bytes());
          row[r] = last;
        }
      }
      widen(w.scales, w.type, size_t(n) * groups, tile * groups, scales);
      widen(w.biases, w.type, size_t(n) * groups, tile * groups, biases);
      a.m == 1 ? one(row, n, tile, scales, biases) : several(row, n, tile, scales, biases, codes);
    }
  }

 private:
  static int min(int a, int b) {
    return a < b ? a : b;
  }

  static void widen(const void* in, Float type, size_t at, int n, float* out) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
      store(out + i, load_float(in, type, at + i));
    }
    if (i < n) {
      f32x8 tail = load_tail(in, type, at + i, n - i);
      std::memcpy(out + i, &tail, (n - i) * sizeof(float));
    }
  }

  void finish(int m, int n, int tile, f32x8* acc, const float* biases) {
    int groups = a.w.cols / a.w.group_size;
    const float* xs = xsum + size_t(m) * padded(groups);
    for (int g = 0; g < groups; g += 8) {
      f32x8 x8 = load<f32x8>(xs + g);
      for (int r = 0; r < kTile; r++) {
        acc[r] += load<f32x8>(biases + r * groups + g) * x8;
      }
    }
    transpose(acc); // now each lane holds one row, and eight rows are summed at once
    f32x8 y = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
    std::memcpy(a.y + size_t(m) * a.w.rows + n, &y, tile * sizeof(float));
  }

  // One row of x: codes go from register to fma.
  OPTIQ_INLINE void one(
      const uint8_t* const* row, int n, int tile, const float* scales, const float* biases) {
    const Weight& w = a.w;
    int groups = w.cols / w.group_size;
    int group_bytes = w.row_bytes() / groups;
    constexpr int step_vectors = Codes::kStep / 8;
    int step_bytes = group_bytes * Codes::kStep / w.group_size;
    f32x8 acc[kTile] = {};
    for (int g = 0; g < groups; g++) {
      f32x8 part[kTile] = {};
      for (int k = 0; k < w.group_size; k += Codes::kStep) {
        const float* xk = x + size_t(g) * w.group_size + k;
        size_t at = size_t(g) * group_bytes + size_t(k / Codes::kStep) * step_bytes;
        for (int r = 0; r < kTile; r++) {
          f32x8 q[step_vectors];
          Codes::decode(row[r] + at, q);
          for (int j = 0; j < step_vectors; j++) {
            part[r] += q[j] * load<f32x8>(xk + 8 * j);
          }
        }
      }
      for (int r = 0; r < kTile; r++) {
        acc[r] += part[r] * splat(scales[r * groups + g]);
      }
    }
    finish(0, n, tile, acc, biases);
  }

  // Several rows of x: a group of codes is decoded into the first-level cache once.
  void several(const uint8_t* const* row, int n, int tile, const float* scales, const float* biases,
      float* codes) {
    const Weight& w = a.w;
    int groups = w.cols / w.group_size;
    int group_bytes = w.row_bytes() / groups;
    constexpr int step_vectors = Codes::kStep / 8;
    int step_bytes = group_bytes * Codes::kStep / w.group_size;
    f32x8 acc[kMaxDotRows][kTile] = {};
    for (int g = 0; g < groups; g++) {
      for (int r = 0; r < kTile; r++) {
        const uint8_t* p = row[r] + size_t(g) * group_bytes;
        for (int k = 0; k < w.group_size; k += Codes::kStep, p += step_bytes) {
          f32x8 q[step_vectors];
          Codes::decode(p, q);
          for (int j = 0; j < step_vectors; j++) {
            store(codes + r * w.group_size + k + 8 * j, q[j]);
          }
        }
      }
      for (int m = 0; m < a.m; m++) {
        const float* xg = x + size_t(m) * w.cols + size_t(g) * w.group_size;
        f32x8 part[kTile] = {};
        for (int k = 0; k < w.group_size; k += 8) {
          f32x8 xk = load<f32x8>(xg + k);
          for (int r = 0; r < kTile; r++) {
            part[r] += load<f32x8>(codes + r * w.group_size + k) * xk;
          }
        }
        for (int r = 0; r < kTile; r++) {
          acc[m][r] += part[r] * splat(scales[r * groups + g]);
        }
      }
    }
    for (int m = 0; m < a.m; m++) {
      finish(m, n, tile, acc[m], biases);
    }
  }
};

template <class Codes>
void affine_dots(const Matmul& a) {
  const Weight& w = a.w;
  int groups = w.cols / w.group_size;
  Scratch<float> swizzled(size_t(a.m) * w.cols);
  Scratch<float> xsum(size_t(a.m) * padded(groups));
  std::memset(xsum, 0, size_t(a.m) * padded(groups) * sizeof(float));
  for (int m = 0; m < a.m; m++) {
    const float* x = a.x + size_t(m) * w.cols;
    Codes::swizzle(x, swizzled + size_t(m) * w.cols, w.cols);
    for (int g = 0; g < groups; g++) {
      f32x8 acc = {};
      for (int k = 0; k < w.group_size; k += 8) {
        acc += load<f32x8>(x + size_t(g) * w.group_size + k);
      }
      xsum[size_t(m) * padded(groups) + g] = sum(acc);
    }
  }
  int each = rows_per_task(a);
  AffineDots<Codes> body{a, swizzled, xsum, each};
  parallel_for((w.rows + each - 1) / each, body);
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

inline void dots(const Matmul& a) {
  const Weight& w = a.w;
  switch (w.bits) {
    case 0:
      switch (w.type) {
        case Float::f32:
          return dense_dots<Float::f32>(a);
        case Float::f16:
          return dense_dots<Float::f16>(a);
        default:
          return dense_dots<Float::bf16>(a);
      }
    case 2:
      return affine_dots<Natural<2>>(a);
    case 3:
      return affine_dots<Natural<3>>(a);
    case 4:
      return w.group_size % Strided4::kStep == 0 ? affine_dots<Strided4>(a)
                                                 : affine_dots<Natural<4>>(a);
    case 5:
      return affine_dots<Natural<5>>(a);
    case 6:
      return affine_dots<Natural<6>>(a);
    default:
      return affine_dots<Natural<8>>(a);
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
