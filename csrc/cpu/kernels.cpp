// Compiled once per instruction set with OPTIQ_ISA set to its name (see CMakeLists.txt).
#include "attention.h"
#include "dequantize.h"
#include "descent_together.h"
#include "elementwise.h"
#include "gemm.h"
#include "group_gradient.h"
#include "kl.h"
#include "kl_gradient.h"
#include "kl_stream.h"
#include "kv_records.h"
#include "low_rank.h"
#include "products.h"
#include "quantize.h"
#include "rows.h"
#include "training.h"

#define OPTIQ_STRING_(x) #x
#define OPTIQ_STRING(x) OPTIQ_STRING_(x)

namespace optiq::cpu::OPTIQ_ISA {
namespace {

void matmul(const Matmul& a) {
  if (!a.transpose) {
    tiled_matmul(a);
  } else if (!a.w.dense()) {
    Part part{a.w, a.y};
    affine_products(a.x, a.m, &part, 1);
  } else if (a.m <= kMaxDotRows) {
    dense_dots(a);
  } else {
    tiled_matmul(a);
  }
}

void products(const Products& p) {
  bool affine = true;
  for (int i = 0; i < p.count; i++) {
    affine &= !p.parts[i].w.dense();
  }
  if (affine) {
    return affine_products(p.x, p.m, p.parts, p.count);
  }
  for (int i = 0; i < p.count; i++) {
    matmul({p.x, p.parts[i].w, p.parts[i].y, p.m, true});
  }
}

void sgemm(const Sgemm& g) {
  // A few rows, as matmul() does: dot products need no packing, and a row of a batch has the bits
  // that it has alone. (Convolutions are many products with one column and wide strides.)
  bool packed = g.m == 1 || (g.m <= kMaxDotRows && g.lda == g.k && g.ldc == g.n);
  if (packed && g.n >= kPanel && g.trans_b && !g.trans_a && g.alpha == 1 && g.beta == 0) {
    Weight b{.data = g.b, .type = Float::f32, .rows = g.n, .cols = g.k, .stride = g.ldb};
    return dense_dots({g.a, b, g.c, g.m, true});
  }
  bool empty = g.alpha == 0 || g.k == 0;
  if (g.beta != 1 && (g.beta != 0 || empty)) {
    for (int i = 0; i < g.m; i++) {
      for (int j = 0; j < g.n; j++) {
        float& c = g.c[size_t(i) * g.ldc + j];
        c = g.beta == 0 ? 0 : g.beta * c;
      }
    }
  }
  if (empty) {
    return;
  }
  // A is read in rows; a transposed or scaled one is rewritten so.
  bool rewrite = g.trans_a || g.alpha != 1;
  Scratch<float> rows(rewrite ? size_t(g.m) * g.k : 1);
  if (rewrite) {
    auto some = [&](int block) {
      int begin = block * kWide, end = begin + kWide < g.m ? begin + kWide : g.m;
      for (int k = 0; k < g.k; k++) {
        for (int i = begin; i < end; i++) {
          float x = g.trans_a ? g.a[size_t(k) * g.lda + i] : g.a[size_t(i) * g.lda + k];
          rows[size_t(i) * g.k + k] = g.alpha * x;
        }
      }
    };
    for_rows((g.m + kWide - 1) / kWide, size_t(g.k) * kWide, some);
  }
  const float* a = rewrite ? rows : g.a;
  size_t lda = rewrite ? g.k : g.lda;
  bool accumulate = g.beta != 0;
  Weight b{.data = g.b, .type = Float::f32, .stride = g.ldb};
  b.rows = g.trans_b ? g.n : g.k;
  b.cols = g.trans_b ? g.k : g.n;
  if (g.trans_b) {
    multiply<PackRows<0>>({a, lda, g.c, size_t(g.ldc), g.m, g.n, g.k, accumulate, {{b}}});
  } else {
    multiply<PackColumns<0>>({a, lda, g.c, size_t(g.ldc), g.m, g.n, g.k, accumulate, {{b}}});
  }
}

void to_f32(const void* in, Float type, float* out, size_t n) {
  widen(in, type, 0, n, out);
}

void from_f32(const float* in, Float type, void* out, size_t n) {
  narrow(in, n, out, type);
}

} // namespace

extern const Kernels table = {OPTIQ_STRING(OPTIQ_ISA), can_tile, tile, untile, matmul, products,
    low_rank, sgemm, kl_divergence, head_kl, head_kl_gradient, quantize, dequantize, descend,
    group_gradient, rms_norm, rms_norm_gradient, heads, rotary, attention, quantize_kv,
    dequantize_kv, gate, gate_gradient, cross_entropy, cross_entropy_gradient, causal_softmax,
    causal_softmax_gradient, low_rank_term, low_rank_term_gradient, adamw, to_f32, from_f32};

} // namespace optiq::cpu::OPTIQ_ISA
