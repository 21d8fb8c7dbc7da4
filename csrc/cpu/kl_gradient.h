// The gradient of the streamed KL at the student's hidden states: dh = (dKL/dlogits) @ W_q, with
// dKL/dlogits = softmax(q) - softmax(p) made again strip by strip from the log-sum-exps.
#pragma once

#include "kl_stream.h"

namespace optiq::cpu::OPTIQ_ISA {

struct KlGradient {
  const HeadKlGradient& a;
  const Side &p, &q;
  int first, rows, tasks; // the block of tokens
  float* partial;         // [tasks, rows, w_q.cols]

  void operator()(int task) {
    int strips = (p.w.rows + kStrip - 1) / kStrip;
    int begin = int(int64_t(strips) * task / tasks),
        end = int(int64_t(strips) * (task + 1) / tasks);
    Scratch<float> p_tile(size_t(rows) * kStrip), q_tile(size_t(rows) * kStrip);
    float* out = partial + size_t(task) * rows * q.w.cols;
    std::memset(out, 0, size_t(rows) * q.w.cols * sizeof(float));
    for (int strip = begin; strip < end; strip++) {
      p.logits(rows, strip * kStrip, p_tile);
      q.logits(rows, strip * kStrip, q_tile);
      for (int i = 0; i < rows; i++) {
        slopes(first + i, p_tile + i * kStrip, q_tile + i * kStrip);
      }
      multiply(strip * kStrip, q_tile, out);
    }
  }

 private:
  // y becomes the derivative at each logit of the student before its cap.
  void slopes(int token, const float* x, float* y) const {
    float unknown = 0 * (a.lse_p[token] + a.lse_q[token]); // NaN where the KL is
    float d_kl = a.d_kl[token] + unknown, d_both = d_kl + a.d_lse[token];
    for (int j = 0; j < kStrip; j += 8) {
      f32x8 yj = load<f32x8>(y + j);
      f32x8 pe = exp_negative(load<f32x8>(x + j) - a.lse_p[token]);
      f32x8 qe = exp_negative(yj - a.lse_q[token]);
      f32x8 slope = d_both * qe - d_kl * pe;
      if (q.cap != 0) {
        f32x8 t = yj * (1 / q.cap);
        slope = select(yj > -q.cap * 2, slope * (1.0f - t * t), f32x8{}); // not where kAbsent
      }
      store(y + j, slope);
    }
  }

  // out += tile @ W_q[n0 : n0 + kStrip]
  void multiply(int n0, const float* tile, float* out) const {
    int cols = q.w.cols, depth = q.w.rows - n0 < kStrip ? q.w.rows - n0 : kStrip;
    Weight w = q.w.from_row(n0);
    multiply_part<PackColumns>(
        Rows(tile, kStrip, rows, depth, false), rows, w, 0, cols, depth, out, cols, true);
  }
};

inline void head_kl_gradient(const HeadKlGradient& a) {
  constexpr size_t kFloats = 8 << 20; // of partial sums in all tasks together
  int strips = (a.w_p.rows + kStrip - 1) / kStrip, cols = a.w_q.cols;
  int tasks = strips < 2 * num_threads() ? strips : 2 * num_threads();
  int block = int(kFloats / (size_t(tasks) * cols));
  block = block < Rows::kOfBlock ? Rows::kOfBlock : block < kTokens ? block : kTokens;
  for (int first = 0; first < a.rows; first += block) {
    int rows = a.rows - first < block ? a.rows - first : block;
    Side p(a.w_p, a.h_p + size_t(first) * a.w_p.cols, rows, a.cap);
    Side q(a.w_q, a.h_q + size_t(first) * cols, rows, a.cap);
    Scratch<float> partial(size_t(tasks) * rows * cols);
    KlGradient body{a, p, q, first, rows, tasks, partial};
    parallel_for(tasks, body);
    for (size_t i = 0; i < size_t(rows) * cols; i++) {
      float total = partial[i];
      for (int task = 1; task < tasks; task++) {
        total += partial[size_t(task) * rows * cols + i];
      }
      a.d_h[size_t(first) * cols + i] = total;
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
