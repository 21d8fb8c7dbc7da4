// Strips of logits for the KL that never stores all of them: tiles of h @ W.T, and single logits
// in double precision.
#pragma once

#include "gemm.h"
#include "kl.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kStrip = 128;       // logits of a token at a time; a multiple of kPanel
constexpr int kTokens = 512;      // tokens that share each packed panel of a head
constexpr float kAbsent = -3e38f; // in place of the logits past the vocabulary

// multiply_part() for PackRows or PackColumns of the width of `w`.
template <template <int> class Pack>
void multiply_part(const Rows& a, int rows, const Weight& w, int left, int right, int k, float* c,
    size_t ldc, bool accumulate) {
  at_width_or_dense(w.format.bits, [&]<int BITS>(Width<BITS>) {
    multiply_part(a, PartOfProduct<Pack<BITS>>{0, rows, left, right, k, c, ldc, accumulate, {{w}}});
  });
}

// tanh with a relative error below 3e-7 (Cephes tanhf near zero, by the exponential beyond).
OPTIQ_INLINE f32x8 tanh(f32x8 x) {
  i32x8 sign = i32x8(x) & i32x8(splat(-0.0f));
  f32x8 magnitude = f32x8(i32x8(x) ^ sign);
  f32x8 z = x * x;
  f32x8 p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  f32x8 small = p * z * x + x;
  f32x8 e = exp_negative(magnitude * -2.0f);
  f32x8 large = f32x8(i32x8((1.0f - e) / (1.0f + e)) | sign);
  return select(magnitude < 0.625f, small, select(x == x, large, x));
}

// Hidden states [rows, w.cols] of one model and the head that turns them into logits.
struct Side {
  Weight w;
  const float* h;
  float cap; // logits become cap * tanh(logit / cap); 0: as they are
  Rows read;

  Side(const Weight& w, const float* h, int rows, float cap)
      : w(w), h(h), cap(cap), read(h, w.cols, rows, w.cols, true) {}

  // tile[i, j] = the logit of token n0 + j at row i, j < kStrip, rows kStrip apart.
  void logits(int rows, int n0, float* tile) const {
    int cols = w.rows - n0 < kStrip ? w.rows - n0 : kStrip;
    multiply_part<PackRows>(read, rows, w, n0, n0 + cols, w.cols, tile, kStrip, false);
    for (int i = 0; cap != 0 && i < rows * kStrip; i += 8) {
      store(tile + i, tanh(load<f32x8>(tile + i) * (1 / cap)) * cap);
    }
    for (int i = 0; cols < kStrip && i < rows; i++) {
      for (int j = cols; j < kStrip; j++) {
        tile[i * kStrip + j] = kAbsent;
      }
    }
  }

  // One logit in double precision, weights decoded in double too.
  double logit(int row, int token) const {
    const float* x = h + size_t(row) * w.cols;
    auto affine = [&]<int BITS>(Width<BITS>) { return affine_logit<BITS>(x, token); };
    double z = w.dense() ? dense_logit(x, token) : at_width(w.format.bits, affine);
    return cap != 0 ? cap * __builtin_tanh(z / cap) : z;
  }

 private:
  typedef double f64x8 __attribute__((vector_size(64)));

  static f64x8 widen(f32x8 x) {
    return __builtin_convertvector(x, f64x8);
  }

  static double sum(f64x8 v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }

  double dense_logit(const float* x, int token) const {
    Reader<0> read{w};
    f64x8 acc[4] = {}; // independent, so that no addition waits for the one before it
    int k = 0;
    for (; k + 32 <= w.cols; k += 32) {
      for (int i = 0; i < 4; i++) {
        acc[i] += widen(read(token, k + 8 * i)) * widen(load<f32x8>(x + k + 8 * i));
      }
    }
    for (; k < w.cols; k += 8) {
      f32x8 xk = k + 8 <= w.cols ? load<f32x8>(x + k) : load_tail(x, Float::f32, k, w.cols - k);
      acc[0] += widen(read(token, k)) * widen(xk);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }

  // scale * sum(code * x) + bias * sum(x) for each group
  template <int BITS>
  double affine_logit(const float* x, int token) const {
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + token * w.row_bytes();
    double total = 0;
    for (size_t g = 0; g < w.groups(); g++) {
      f64x8 dot = {}, ones = {};
      for (int k = int(g) * w.format.group_size; k < int(g + 1) * w.format.group_size; k += 8) {
        f64x8 xk = widen(load<f32x8>(x + k));
        dot += widen(decode_last_codes<BITS>(codes + k / 8 * BITS)) * xk;
        ones += xk;
      }
      size_t at = size_t(token) * w.groups() + g;
      total += load_tail(w.scales, w.type, at, 1)[0] * sum(dot) +
               load_tail(w.biases, w.type, at, 1)[0] * sum(ones);
    }
    return total;
  }
};

} // namespace optiq::cpu::OPTIQ_ISA
