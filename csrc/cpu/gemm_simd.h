// Products by an outer-product micro-kernel over packed panels (the GotoBLAS scheme, Goto and van
// de Geijn 2008).
#pragma once

#include "panels.h"

namespace optiq::cpu::OPTIQ_ISA {

// The micro-kernel keeps kRows x 2 wide vectors of C in registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

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

// A[m, k] as `multiply_part` reads it. Where many products will, its rows are copied an odd number
// of cache lines apart: rows a power of two apart would share cache sets.
class PlainRows {
 public:
  static constexpr int kOfBlock = kRows;    // that share what is read of a panel
  static constexpr int kPanelsTogether = 1; // that share what is read of A

  static int at_once(int m, int) {
    return m;
  }

  PlainRows(const float* a, size_t lda, int m, int k, bool often)
      : stride_(often ? ((k + 15) / 16 | 1) * 16 : lda), copy_(often ? m * stride_ : 0), a_(a) {
    for (int i = 0; often && i < m; i++) {
      std::memcpy(copy_ + i * stride_, a + i * lda, k * sizeof(float));
    }
    a_ = often ? copy_ : a;
  }

  const float* at(int row, int depth) const {
    return a_ + row * stride_ + depth;
  }

  size_t stride() const {
    return stride_;
  }

 private:
  size_t stride_;
  Scratch<float> copy_;
  const float* a_;
};

template <class Pack>
void multiply_part(const PlainRows& a, const PartOfProduct<Pack>& p) {
  Scratch<float> panel(size_t(kDepth) * kPanel);
  for (int n0 = p.left; n0 < p.right; n0 += kPanel) {
    int cols = p.right - n0 < kPanel ? p.right - n0 : kPanel;
    for (int k0 = 0; k0 < p.k; k0 += kDepth) {
      int depth = p.k - k0 < kDepth ? p.k - k0 : kDepth;
      p.pack(n0, cols, k0, depth, panel);
      for (int i = p.top; i < p.bottom; i += kRows) {
        int rows = p.bottom - i < kRows ? p.bottom - i : kRows;
        micro_kernel_edge(rows, a.at(i, k0), a.stride(), panel, kPanel, depth,
            p.c + (i - p.top) * p.ldc + (n0 - p.left), p.ldc, cols, p.accumulate || k0 > 0);
      }
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
