// Panels of a matrix: a few of its columns, row after row, as floats. Codes are decoded on the way.
#pragma once

#include "decode.h"
#include "pool.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kPanel = 2 * kWide; // columns
constexpr int kDepth = 256;       // rows at most; a multiple of every group size

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
  static constexpr bool kDense = BITS == 0;
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
  static constexpr bool kDense = BITS == 0;
  Reader<BITS> read;

  void operator()(int n0, int cols, int k0, int depth, float* panel) const {
    for (int k = 0; k < depth; k++) {
      read.panel_row(k0 + k, n0, cols, panel + k * kPanel);
    }
  }
};

// Of C (+)= A B: the columns [left, right) of the rows [top, bottom), which begin at `c`. `pack`
// gives panels of B, which has k rows.
template <class Pack>
struct PartOfProduct {
  int top, bottom, left, right, k;
  float* c;
  size_t ldc;
  bool accumulate;
  Pack pack;
};

} // namespace optiq::cpu::OPTIQ_ISA
