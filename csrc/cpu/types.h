// Plain data shared by the CPU kernels and their callers. No MLX types here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// The few symbols the extension takes from the kernel library; all others are hidden.
#define OPTIQ_API __attribute__((visibility("default")))

namespace optiq {

// Codes of so many bits, with a scale and a bias for each group of them; 0 bits: not quantized.
struct AffineFormat {
  int bits = 0, group_size = 0;

  bool dense() const {
    return bits == 0;
  }
  bool operator==(const AffineFormat&) const = default;
};

namespace cpu {

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
  AffineFormat format = {};
  int rows = 0;
  int cols = 0;
  int stride = 0; // elements from one dense row to the next; 0: cols
  // Of codes, in transposed products: x is read in 24 bits and not in 16, see fixed.h.
  bool exact = false;
  // `data` holds codes, scales and biases in the order of one instruction set, see tiled.h. It is
  // aligned to a cache line. Only transposed products take such weights.
  bool tiled = false;

  bool dense() const {
    return format.dense();
  }
  size_t row_bytes() const {
    return dense() ? (stride ? stride : cols) * size_of(type) : size_t(cols) * format.bits / 8;
  }
  size_t nbytes() const {
    return rows * (row_bytes() + 2 * groups() * (dense() ? 0 : size_of(type)));
  }
  size_t groups() const {
    return dense() ? 0 : cols / format.group_size;
  }
  // Without the rows before.
  Weight from_row(size_t row) const {
    Weight w = *this;
    w.data = static_cast<const char*>(data) + row * row_bytes();
    w.rows -= int(row);
    if (!dense()) {
      size_t step = row * groups() * size_of(type);
      w.scales = static_cast<const char*>(scales) + step;
      w.biases = static_cast<const char*>(biases) + step;
    }
    return w;
  }
  // The e-th of several equal matrices stored back to back.
  Weight expert(size_t e) const {
    Weight w = from_row(e * rows);
    w.rows = rows;
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

// x @ a @ b: a term of low rank beside a product. a [in, rank] and b [rank, out] are contiguous, in
// float32 or float16; the rank is a multiple of 8, or 0 for none. With a gain [out] the product is
// multiplied with it before.
struct LowRank {
  const void *a, *b;
  Float type;
  int rank;
  const float* gain = nullptr;
};

// y[i, :] = gain * y[i, :] + x[i, :] @ a @ b, with the term in the slot of row i, for several
// products of x[m, in].
struct LowRankPart {
  const LowRank* terms; // by slot
  float* y;             // [m, out]
  int out;
};
struct LowRankProducts {
  const float* x;
  int m, in;
  const int* slots; // [m]
  const LowRankPart* parts;
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
  AffineFormat format;
  Float type;
};

// Improves a rounding of w[rows, cols] in place: sweeps of coordinate descent on the output error
// (v - w) hessian (v - w)' of each row, which none of them raises. hessian[cols, cols] is
// symmetric. With samples[sampled, cols] it is samples' samples + diag(hessian[cols]). With
// outputs[rows, rows], symmetric with a positive diagonal, the error is tr(outputs (v - w) hessian
// (v - w)').
struct Descent {
  const void* w;
  const float *hessian, *samples, *outputs;
  uint8_t* codes;
  void *scales, *biases;
  size_t rows, cols, sampled;
  AffineFormat format;
  int sweeps;
  Float type;
};

// With G = out.T @ in, the gradient at a weight[rows, cols] that takes in[m, cols] to results whose
// gradient is out[m, rows]: per group of the weight, sum of G * code and sum of G.
struct GroupGradient {
  const float *out, *in;
  const uint8_t* codes;
  float *scales, *biases; // [rows, cols / group_size]
  int m, rows, cols;
  AffineFormat format;
};

// y[r, :] = add[r, :] + gain * weight * x[r, :] / sqrt(mean(x[r, :]^2) + eps), rows contiguous.
// Without `weight` ones, without `add` zeros, without `norm` y = add + gain * x. y may be x or add.
struct RmsNorm {
  const float* x;
  const float* add;
  const float* weight;
  float* y;
  size_t rows;
  int dims;
  float eps, gain;
  bool norm;
};

// Of y = weight * x / sqrt(mean(x^2) + eps), where they are asked for.
struct RmsNormGradient {
  const float *x, *weight, *d_y;
  float *d_x, *d_weight; // or null
  size_t rows;
  int dims;
  float eps;
};

// What happens to the heads of one projection x[batch * rows, stride], in this order: the bias,
// an RMSNorm over each head or over all of them, the rotation of the first `rotated` values by
// position. y[b, h, r, :] as its strides (in elements) say.
struct Heads {
  const float* x;
  size_t stride;
  const float* bias; // [heads * dim]
  enum { no_norm, each_head, all_heads } norm;
  const float* weight; // [dim] or [heads * dim]
  float eps;
  const float* cos_sin; // [batch * rows, rotated]: the cosines, then the sines
  int rotated;
  bool traditional; // pairs are neighbours, not half a head apart
  float* y;
  size_t y_batch, y_head, y_row;
  int batch, rows, heads, dim;
};

// y = x with the first `rotated` of the `dim` values of each head turned by the position of its
// row, or `back`, which also is the gradient. x and y are [batch, heads, rows, dim] by strides.
struct Rotary {
  const float* x;
  size_t x_batch, x_head, x_row;
  float* y;
  size_t y_batch, y_head, y_row;
  const float* cos_sin; // [rows, rotated]: the cosines, then the sines
  int batch, heads, rows, dim, rotated;
  bool traditional, back;
};

enum class Masking : uint8_t { none, causal, boolean, additive };

// Keys or values [batch, heads, tokens, dim] by strides, in elements: floats, or records of uint32
// words (kv_records.h).
struct Vectors {
  const void* data;
  Float type;          // of floats
  AffineFormat format; // of records; dense: floats
  size_t batch, head, row;
};

// y[b, r, h, :] = softmax(scale * q k.T, masked) v; query head h reads key head
// h * kv_heads / heads. With `causal` query r sees the first keys - rows + r + 1 keys, of them the
// last `window` unless that is 0.
struct Attention {
  const void* q; // [batch, heads, rows, dim] by strides
  Float type;    // of q and y
  size_t q_batch, q_head, q_row;
  Vectors k, v;
  // Floats in place of the `first` keys from each start on, and of the `recent` last ones.
  Vectors first_k, first_v, recent_k, recent_v;
  int first, recent;
  const int32_t* starts; // [batch], the first key of each, those before it are not seen; null: 0
  Masking masking;
  int window;
  const void* mask; // [batch, heads, rows, keys] by strides; bool, or `mask_type` to add
  Float mask_type;
  int64_t mask_strides[4];
  const float* sinks; // [heads]: a logit beside the keys that takes probability and gives nothing
  void* y;            // [batch, rows, heads, value_dim]
  int batch, heads, kv_heads, rows, keys, dim, value_dim;
  float scale, softcap; // scores become softcap * tanh(score / softcap) unless that is 0
};

// `count` vectors [count, dim] of floats, and their records.
struct Records {
  const void* floats;
  Float type;
  uint32_t* words;
  size_t count;
  int dim;
  AffineFormat format;
};

inline constexpr int record_words(int dim, AffineFormat format) {
  return (dim + format.group_size - 1) / format.group_size + (dim * format.bits + 31) / 32;
}

// y[r, i] = activation(gate[r, i] + gate_bias[i]) * (up[r, i] + up_bias[i])
enum class Activation : uint8_t { silu, gelu_tanh };
struct Gate {
  const float *gate, *up;
  size_t stride; // from row to row of both
  const float *gate_bias, *up_bias;
  float* y; // [rows, width]
  size_t rows, width;
  Activation activation;
};

// The gradients at gate and up of y = activation(gate) * up, n values of each.
struct GateGradient {
  const float *gate, *up, *d_y;
  float *d_gate, *d_up;
  size_t n;
  Activation activation;
};

// Per row of logits[rows, vocab]: lse = log(sum(exp(logits))), and loss = lse - logits[label].
// Where a logit is not finite both are NaN, and where there is no such label the loss is.
struct CrossEntropy {
  const float* logits;
  const int32_t* labels;
  float *loss, *lse;
  size_t rows, vocab;
};
struct CrossEntropyGradient {
  const float* logits;
  const int32_t* labels;
  const float *lse, *d_loss;
  float* d_logits;
  size_t rows, vocab;
};

// y[rows, keys] = softmax(scale * x) of what each query sees, zeros elsewhere: row r is query
// r % queries, and belongs to one of the last `queries` keys. It sees the keys up to its own, of
// them the last `window` unless that is 0. The scale is positive.
struct CausalSoftmax {
  const float* x;
  float* y;
  size_t rows, queries, keys, window;
  float scale;
};

// y[m, out] = base[m, out] + scale * x[m, in] @ a[in, rank] @ b[rank, out], of any rank.
struct LowRankTerm {
  const float *x, *a, *b, *base;
  float* y;
  int m, in, rank, out;
  float scale;
};
struct LowRankTermGradient {
  const float *x, *a, *b, *d_y;
  float *d_x, *d_a, *d_b;
  int m, in, rank, out;
  float scale;
};

// A step of AdamW: with g = by * gradient, m = old_m m + new_m g, v = old_v v + new_v g^2,
// parameter = keep * parameter - rate * m / (sqrt(v) * root + eps).
struct AdamW {
  const float *parameter, *gradient, *m, *v;
  float *next_parameter, *next_m, *next_v;
  size_t n;
  float by, old_m, new_m, old_v, new_v, keep, rate, root, eps;
};

// One set of kernels per instruction set, compiled from the same source.
struct Kernels {
  const char* isa;
  // Whether `tile` takes a weight, which puts it into the order in which products read it
  // (tiled.h), and the reverse, of a weight that is tiled.
  bool (*can_tile)(const Weight&);
  void (*tile)(const Weight&, void* tiled);
  void (*untile)(const Weight&, void* codes, void* scales, void* biases);
  void (*matmul)(const Matmul&);
  void (*products)(const Products&);
  void (*low_rank)(const LowRankProducts&);
  void (*sgemm)(const Sgemm&);
  void (*kl_divergence)(const KlDivergence&);
  void (*head_kl)(const HeadKl&);
  void (*head_kl_gradient)(const HeadKlGradient&);
  void (*quantize)(const Quantize&);
  void (*dequantize)(const Weight&, float* y);
  void (*descend)(const Descent&);
  void (*group_gradient)(const GroupGradient&);
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_gradient)(const RmsNormGradient&);
  void (*heads)(const Heads&);
  void (*rotary)(const Rotary&);
  void (*attention)(const Attention*, int count);
  void (*quantize_kv)(const Records&);
  void (*dequantize_kv)(const Records&);
  void (*gate)(const Gate&);
  void (*gate_gradient)(const GateGradient&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*cross_entropy_gradient)(const CrossEntropyGradient&);
  void (*causal_softmax)(const CausalSoftmax&);
  void (*causal_softmax_gradient)(const CausalSoftmax&, const float* d_y);
  void (*low_rank_term)(const LowRankTerm&);
  void (*low_rank_term_gradient)(const LowRankTermGradient&);
  void (*adamw)(const AdamW&);
  void (*to_f32)(const void* in, Float type, float* out, size_t n);
  void (*from_f32)(const float* in, Float type, void* out, size_t n);
};

// Those that this processor runs, the fastest first.
OPTIQ_API std::vector<const Kernels*> usable_kernels();

// The one that OPTIQ_ISA names (scalar, avx2, avx512, amx or neon), else the fastest. Throws
// std::invalid_argument where OPTIQ_ISA names none that this processor runs.
OPTIQ_API const Kernels& kernels();

} // namespace cpu
} // namespace optiq
