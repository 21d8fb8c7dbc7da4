// KL(p || q) per row of logits, in one sweep for the maxima and one for the sums.
#pragma once

#include "pool.h"
#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

// exp(x) for x <= 0, relative error below 2e-7: x = n ln2 + r, then a degree-6 polynomial in r
// (coefficients of Cephes expf), scaled by 2^n. Below -87 the result is zero.
template <class V>
OPTIQ_INLINE V exp_negative(V x) {
  using Ints = decltype(x > x);
  constexpr float kShift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  V t = x * 1.44269504088896341f + kShift;
  V n = t - kShift;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints exponent = Ints(t) << 23;
  return V((Ints(p) + exponent) & (x > -87.0f));
}

struct KlRows {
  const KlDivergence& a;
  static constexpr int kRowsPerTask = 4;
  static constexpr size_t kChunk = 1024; // floats summed in single precision, then in double

  void operator()(int task) {
    size_t begin = size_t(task) * kRowsPerTask;
    size_t end = begin + kRowsPerTask < a.rows ? begin + kRowsPerTask : a.rows;
    for (size_t t = begin; t < end; t++) {
      row(t, a.p + t * a.vocab, a.q + t * a.vocab);
    }
  }

 private:
  static float maximum(const float* x, size_t n) {
    f32x8 best = splat(x[0]);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
      best = max(best, load<f32x8>(x + i));
    }
    float m = best[0];
    for (int j = 1; j < 8; j++) {
      m = best[j] > m ? best[j] : m;
    }
    for (; i < n; i++) {
      m = x[i] > m ? x[i] : m;
    }
    return m;
  }

  static size_t find(const float* x, size_t n, float value) {
    size_t i = 0;
    while (i < n && x[i] != value) {
      i++;
    }
    return i;
  }

  void row(size_t t, const float* p, const float* q) {
    float p_max = maximum(p, a.vocab);
    float q_max = maximum(q, a.vocab);
    double p_sum = 0, q_sum = 0, dot = 0; // sums of e^p, e^q and e^p (p - q), maxima removed
    for (size_t begin = 0; begin < a.vocab; begin += kChunk) {
      size_t end = begin + kChunk < a.vocab ? begin + kChunk : a.vocab;
      f32x8 ps = {}, qs = {}, ds = {};
      for (size_t i = begin; i < end; i += 8) {
        bool whole = i + 8 <= end;
        f32x8 pi = whole ? load<f32x8>(p + i) : load_tail(p, Float::f32, i, end - i);
        f32x8 qi = whole ? load<f32x8>(q + i) : load_tail(q, Float::f32, i, end - i);
        pi -= p_max;
        qi -= q_max;
        f32x8 pe = exp_negative(pi);
        f32x8 qe = exp_negative(qi);
        f32x8 d = select(pe > 0.0f, pe * (pi - qi), f32x8{}); // 0 * inf counts as 0
        if (!whole) {
          f32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
          i32x8 inside = lane < float(end - i);
          pe = select(inside, pe, f32x8{});
          qe = select(inside, qe, f32x8{});
          d = select(inside, d, f32x8{});
        }
        ps += pe;
        qs += qe;
        ds += d;
      }
      p_sum += sum(ps);
      q_sum += sum(qs);
      dot += sum(ds);
    }
    a.kl[t] = float(dot / p_sum + __builtin_log(q_sum / p_sum));
    a.lse_p[t] = float(p_max + __builtin_log(p_sum));
    a.lse_q[t] = float(q_max + __builtin_log(q_sum));
    a.agree[t] = find(p, a.vocab, p_max) == find(q, a.vocab, q_max);
  }
};

inline void kl_divergence(const KlDivergence& a) {
  KlRows body{a};
  parallel_for(int((a.rows + KlRows::kRowsPerTask - 1) / KlRows::kRowsPerTask), body);
}

} // namespace optiq::cpu::OPTIQ_ISA
