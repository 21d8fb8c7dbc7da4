// Plain data shared by the CPU kernels and their callers. No MLX types here.
#pragma once

#include <cstddef>
#include <cstdint>

// The few symbols the extension takes from the kernel library; all others are hidden.
#define OPTIQ_API __attribute__((visibility("default")))

namespace optiq::cpu {

enum class Float : uint8_t { f32, f16, bf16 };

inline constexpr size_t size_of(Float t) {
  return t == Float::f32 ? 4 : 2;
}

// A row-major weight W[rows, cols]: dense, or MLX affine codes
// (w = scale * code + bias per group, codes a little-endian bit stream per row).
struct Weight {
  const void* data = nullptr;   // dense values or packed codes
  const void* scales = nullptr; // [rows, cols / group_size]
  const void* biases = nullptr;
  Float type = Float::f32; // of the dense values, or of scales and biases
  int bits = 0;            // 0: dense
  int group_size = 0;
  int rows = 0;
  int cols = 0;
  int stride = 0; // elements from one dense row to the next; 0: cols

  bool dense() const {
    return bits == 0;
  }
  size_t row_bytes() const {
    return dense() ? (stride ? stride : cols) * size_of(type) : size_t(cols) * bits / 8;
  }
  size_t groups() const {
    return dense() ? 0 : cols / group_size;
  }
  // The e-th of several equal matrices stored back to back.
  Weight expert(size_t e) const {
    Weight w = *this;
    w.data = static_cast<const char*>(data) + e * rows * row_bytes();
    if (!dense()) {
      size_t step = e * rows * groups() * size_of(type);
      w.scales = static_cast<const char*>(scales) + step;
      w.biases = static_cast<const char*>(biases) + step;
    }
    return w;
  }
};

// y[m, :] = x[m, :] @ W.T   (transpose)   x: [m, cols], y: [m, rows]
// y[m, :] = x[m, :] @ W     (otherwise)   x: [m, rows], y: [m, cols]
struct Matmul {
  const float* x;
  Weight w;
  float* y;
  int m;
  bool transpose;
};

// y[m, :] = x[m, :] @ W.T for several weights with the same number of columns.
struct Part {
  Weight w;
  float* y; // [m, w.rows]
};
struct Products {
  const float* x; // [m, cols]
  int m;
  const Part* parts;
  int count;
};

// C = alpha * op(A) @ op(B) + beta * C, row-major, leading dimensions as in CBLAS.
struct Sgemm {
  int m, n, k;
  const float *a, *b;
  float* c;
  int lda, ldb, ldc;
  bool trans_a, trans_b;
  float alpha, beta;
};

// Per row of two [rows, vocab] logits: KL(softmax(p) || softmax(q)) in nats, whether both rows
// have the same first maximum, and both log-sum-exps.
struct KlDivergence {
  const float *p, *q;
  float* kl;
  bool* agree;
  float *lse_p, *lse_q;
  size_t rows, vocab;
};

// The same of the logits cap * tanh(h @ w.T / cap), or h @ w.T where cap is 0, which are never
// stored: h[rows, w.cols], and two heads w with the same number of rows, the vocabulary.
struct HeadKl {
  const float *h_p, *h_q;
  Weight w_p, w_q;
  float cap;
  float* kl;
  bool* agree;
  float *lse_p, *lse_q;
  int rows;
};

// d_h[rows, w_q.cols] = the gradient at h_q of sum(d_kl * kl + d_lse * lse_q), given the
// log-sum-exps that HeadKl found.
struct HeadKlGradient {
  const float *h_p, *h_q;
  Weight w_p, w_q;
  float cap;
  const float *lse_p, *lse_q, *d_kl, *d_lse;
  float* d_h;
  int rows;
};

// Codes, scales and biases of w[rows, cols], all floats of one type. With importance by weighted
// search, row r using importance[r / rows_per_importance, :]; without as mx.quantize.
struct Quantize {
  const void* w;
  const float* importance;
  uint8_t* codes;
  void *scales, *biases;
  size_t rows, cols, rows_per_importance;
  int group_size, bits;
  Float type;
};

// One set of kernels per instruction set, compiled from the same source.
struct Kernels {
  const char* isa;
  void (*matmul)(const Matmul&);
  void (*products)(const Products&);
  void (*sgemm)(const Sgemm&);
  void (*kl_divergence)(const KlDivergence&);
  void (*head_kl)(const HeadKl&);
  void (*head_kl_gradient)(const HeadKlGradient&);
  void (*quantize)(const Quantize&);
  void (*to_f32)(const void* in, Float type, float* out, size_t n);
  void (*from_f32)(const float* in, Float type, void* out, size_t n);
};

// The fastest set this processor runs; OPTIQ_ISA=scalar|avx2|avx512|neon overrides it.
OPTIQ_API const Kernels& kernels();

} // namespace optiq::cpu
