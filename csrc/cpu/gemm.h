// Many rows of x: an outer-product micro-kernel over packed panels (the GotoBLAS scheme, Goto
// and van de Geijn 2008). Decoding a weight happens in the packing, so each weight tile is
// decoded once for all rows of x.
#pragma once

#include "decode.h"
#include "pool.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

// The micro-kernel keeps kRows x 2 wide vectors of C in registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kWide; // columns of C in one panel
constexpr int kDepth = 256;       // of a panel; a multiple of every group size

// c[i, 0:kPanel] (+)= sum_k a[i, k] b[k, 0:kPanel]; only `cols` columns are stored.
template <int ROWS>
void micro_kernel(const float* a, size_t lda, const float* b, size_t ldb, int depth, float* c,
    size_t ldc, int cols, bool accumulate) {
  fw acc[ROWS][2] = {};
  for (int k = 0; k < depth; k++) {
    fw b0 = load<fw>(b + k * ldb);
    fw b1 = load<fw>(b + k * ldb + kWide);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      float x = a[i * lda + k];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  for (int i = 0; i < ROWS; i++) {
    float* ci = c + i * ldc;
    if (cols == kPanel) {
      if (accumulate) {
        acc[i][0] += load<fw>(ci);
        acc[i][1] += load<fw>(ci + kWide);
      }
      store(ci, acc[i][0]);
      store(ci + kWide, acc[i][1]);
    } else {
      float row[kPanel];
      store(row, acc[i][0]);
      store(row + kWide, acc[i][1]);
      for (int j = 0; j < cols; j++) {
        ci[j] = accumulate ? ci[j] + row[j] : row[j];
      }
    }
  }
}

template <int ROWS = kRows>
OPTIQ_INLINE void micro_kernel_edge(int rows, const float* a, size_t lda, const float* b,
    size_t ldb, int depth, float* c, size_t ldc, int cols, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      return micro_kernel<ROWS>(a, lda, b, ldb, depth, c, ldc, cols, accumulate);
    }
    micro_kernel_edge<ROWS - 1>(rows, a, lda, b, ldb, depth, c, ldc, cols, accumulate);
  }
}

// Values of a weight as floats; lanes past the last column are zero.
template <int BITS>
struct Reader {
  const Weight& w;

  // W[row, col..col+8)
  OPTIQ_INLINE f32x8 operator()(int row, int col) const {
    if constexpr (BITS == 0) {
      const char* p = static_cast<const char*>(w.data) + row * w.row_bytes();
      return col + 8 <= w.cols ? load_float(p, w.type, col)
                               : load_tail(p, w.type, col, w.cols - col);
    } else {
      size_t g = group(row, col);
      return codes(row, col) * scalar(w.scales, g) + scalar(w.biases, g);
    }
  }

  // The same of kPanel columns, of which the first `cols` are there; they are in one group.
  OPTIQ_INLINE void panel_row(int row, int col, int cols, float* out) const {
    float scale = 1, bias = 0;
    if constexpr (BITS != 0) {
      size_t g = group(row, col);
      scale = scalar(w.scales, g), bias = scalar(w.biases, g);
    }
    for (int j = 0; j < kPanel; j += 8) {
      f32x8 v{};
      if (j < cols) {
        if constexpr (BITS == 0) {
          v = (*this)(row, col + j);
        } else {
          v = codes(row, col + j) * scale + bias;
        }
      }
      store(out + j, v);
    }
  }

 private:
  OPTIQ_INLINE f32x8 codes(int row, int col) const {
    const char* p = static_cast<const char*>(w.data) + row * w.row_bytes();
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(p) + col / 8 * BITS;
    bool last = row == w.rows - 1 && col + 16 > w.cols; // decoding would read past the end
    return last ? decode_last_codes<BITS>(codes) : decode_codes<BITS>(codes);
  }

  OPTIQ_INLINE size_t group(int row, int col) const {
    return size_t(row) * w.groups() + col / w.format.group_size;
  }

  OPTIQ_INLINE float scalar(const void* p, size_t i) const {
    switch (w.type) {
      case Float::f32:
        return static_cast<const float*>(p)[i];
      case Float::bf16:
        return bf16_to_f32(static_cast<const uint16_t*>(p)[i]);
      default:
        return f16_to_f32(static_cast<const uint16_t*>(p)[i]);
    }
  }
};

// panel[k, j] = W[n0 + j, k0 + k]: the columns of C are rows of W.
template <int BITS>
struct PackRows {
  Reader<BITS> read;

  void operator()(int n0, int cols, int k0, int depth, float* panel) const {
    for (int j = 0; j < kPanel; j += 8) {
      for (int k = 0; k < depth; k += 8) {
        f32x8 v[8];
        for (int i = 0; i < 8; i++) {
          v[i] = j + i < cols ? read(n0 + j + i, k0 + k) : f32x8{};
        }
        transpose(v);
        for (int i = 0; i < 8 && k + i < depth; i++) {
          store(panel + (k + i) * kPanel + j, v[i]);
        }
      }
    }
  }
};

// panel[k, j] = W[k0 + k, n0 + j]: the columns of C are columns of W.
template <int BITS>
struct PackColumns {
  Reader<BITS> read;

  void operator()(int n0, int cols, int k0, int depth, float* panel) const {
    for (int k = 0; k < depth; k++) {
      read.panel_row(k0 + k, n0, cols, panel + k * kPanel);
    }
  }
};

// C[m, n] (+)= A[m, k] B[k, n] where `pack` gives panels of B.
template <class Pack>
struct Product {
  const float* a;
  size_t lda;
  float* c;
  size_t ldc;
  int m, n, k;
  bool accumulate;
  Pack pack;
  int row_blocks; // the rows of A are cut too where there are fewer panels than threads

  void operator()(int task) {
    int n0 = task / row_blocks * kPanel;
    int cols = n - n0 < kPanel ? n - n0 : kPanel;
    int block = ((m + row_blocks - 1) / row_blocks + kRows - 1) / kRows * kRows;
    int begin = task % row_blocks * block;
    int end = begin + block < m ? begin + block : m;
    Scratch<float> panel(size_t(kDepth) * kPanel);
    for (int k0 = 0; k0 < k; k0 += kDepth) {
      int depth = k - k0 < kDepth ? k - k0 : kDepth;
      pack(n0, cols, k0, depth, panel);
      for (int i = begin; i < end; i += kRows) {
        int rows = end - i < kRows ? end - i : kRows;
        micro_kernel_edge(rows, a + i * lda + k0, lda, panel, kPanel, depth, c + i * ldc + n0, ldc,
            cols, accumulate || k0 > 0);
      }
    }
  }

  void run() {
    int panels = (n + kPanel - 1) / kPanel;
    row_blocks = 1;
    if (panels < 2 * num_threads() && m >= 8 * kRows) {
      row_blocks = (2 * num_threads() + panels - 1) / panels;
    }
    int tasks = panels * row_blocks;
    if (2.0 * m * n * k < kSerialFlops) {
      for (int i = 0; i < tasks; i++) {
        (*this)(i);
      }
    } else {
      parallel_for(tasks, *this);
    }
  }
};

template <int BITS>
void tiled(const Matmul& a) {
  const Weight& w = a.w;
  if (a.transpose) {
    Product<PackRows<BITS>>{
        a.x, size_t(w.cols), a.y, size_t(w.rows), a.m, w.rows, w.cols, false, {{w}}, 1}
        .run();
  } else {
    Product<PackColumns<BITS>>{
        a.x, size_t(w.rows), a.y, size_t(w.cols), a.m, w.cols, w.rows, false, {{w}}, 1}
        .run();
  }
}

inline void tiled_matmul(const Matmul& a) {
  at_width_or_dense(a.w.format.bits, [&]<int BITS>(Width<BITS>) { tiled<BITS>(a); });
}

} // namespace optiq::cpu::OPTIQ_ISA
