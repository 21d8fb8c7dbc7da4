// Many rows of x times a weight. Decoding a weight happens in the packing of panels, so each tile
// of it is decoded once for all rows of x.
//
// There are two ways to multiply, in gemm_simd.h and gemm_amx.h. Each has a class for the rows of A
// as it reads them, and multiply_part() for such rows.
#pragma once

#include "gemm_simd.h"
#include "widths.h"
#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace optiq::cpu::OPTIQ_ISA {

#if defined(__AMX_BF16__)
using Rows = SplitRows;
#else
using Rows = PlainRows;
#endif

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
};

// Of the rows of C that begin at `c`, some panels in each task, and where there are fewer panels
// than threads, some of the rows.
template <class Way, class Pack>
struct ProductTask {
  static constexpr int kOfBlock = Way::kOfBlock;
  const Product<Pack>& p;
  const Way& a;
  float* c;
  int m, panels, row_blocks;

  void operator()(int task) const {
    int left = task / row_blocks * panels * kPanel, right = left + panels * kPanel;
    int rows = ((m + row_blocks - 1) / row_blocks + kOfBlock - 1) / kOfBlock * kOfBlock;
    int top = task % row_blocks * rows, bottom = top + rows;
    multiply_part(
        a, PartOfProduct<Pack>{top, bottom < m ? bottom : m, left, right < p.n ? right : p.n, p.k,
               c + top * p.ldc + left, p.ldc, p.accumulate, p.pack});
  }
};

template <class Way, class Pack>
void multiply_by(const Product<Pack>& p) {
  int panels = (p.n + kPanel - 1) / kPanel, of_task = panels / (kTasksPerThread * num_threads());
  of_task = of_task < 1 ? 1 : of_task < Way::kPanelsTogether ? of_task : Way::kPanelsTogether;
  int columns = (panels + of_task - 1) / of_task;
  for (int begin = 0, most = Way::at_once(p.m, p.k); begin < p.m; begin += most) {
    int m = p.m - begin < most ? p.m - begin : most, row_blocks = 1;
    if (columns < 2 * num_threads() && m >= 8 * Way::kOfBlock) {
      row_blocks = (2 * num_threads() + columns - 1) / columns;
    }
    Way a(p.a + begin * p.lda, p.lda, m, p.k, false);
    ProductTask<Way, Pack> part{p, a, p.c + begin * p.ldc, m, of_task, row_blocks};
    int tasks = columns * row_blocks;
    if (2.0 * m * p.n * p.k < kSerialFlops) {
      for (int i = 0; i < tasks; i++) {
        part(i);
      }
    } else {
      parallel_for(tasks, part);
    }
  }
}

template <class Pack>
void multiply(const Product<Pack>& p) {
#if defined(__AMX_BF16__)
  constexpr int kFewRows = 64; // for which it does not pay to cut a weight into pieces
  if (p.m <= kFewRows && pieces_of(p.pack) > 1) {
    return multiply_by<PlainRows>(p);
  }
#endif
  multiply_by<Rows>(p);
}

template <int BITS>
void tiled(const Matmul& a) {
  const Weight& w = a.w;
  if (a.transpose) {
    multiply<PackRows<BITS>>(
        {a.x, size_t(w.cols), a.y, size_t(w.rows), a.m, w.rows, w.cols, false, {{w}}});
  } else {
    multiply<PackColumns<BITS>>(
        {a.x, size_t(w.rows), a.y, size_t(w.cols), a.m, w.cols, w.rows, false, {{w}}});
  }
}

inline void tiled_matmul(const Matmul& a) {
  at_width_or_dense(a.w.format.bits, [&]<int BITS>(Width<BITS>) { tiled<BITS>(a); });
}

} // namespace optiq::cpu::OPTIQ_ISA
