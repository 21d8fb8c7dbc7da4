// KL(p || q) from final hidden states and heads: logits are made strip by strip and forgotten.
//
// Each task takes a range of the vocabulary for all tokens of a block and keeps, per token, the
// sums of e^p, e^q and e^p (p - q), maxima removed; the ranges are merged in order at the end
// (online log-sum-exp, Milakov and Gimelshein 2018).
//
// A logit summed in float32 is off by about 1e-6, and where a few tokens hold the probability
// that error reaches the KL undiminished. So logits that matter, those of probability 2^-10 or
// more among the ones seen so far, are computed again in double. Of the others, thousands must
// share what is left, and their independent errors average out. Early in a range nearly every
// logit would seem to matter; so a few strips are sampled first, and their median, which one very
// probable token does not move, says how large the sums will be at least.
#pragma once

#include "kl_logits.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr double kMatters = 1.0 / 1024;
constexpr int kSamples = 8; // strips looked at first, for a guess of what will matter at the end

// What is known of one token of text after part of the vocabulary.
struct Running {
  double p_sum = 0, q_sum = 0, dot = 0;
  double p_best = -__builtin_inf(), q_best = -__builtin_inf();
  int p_first = -1, q_first = -1;             // where the best logit was seen first
  float p_max = kAbsent, q_max = kAbsent;     // removed from all exponents
  float p_limit = kAbsent, q_limit = kAbsent; // only logits above are looked at singly
  bool finite = true;                         // all logits so far

  void raise(float p_top, float q_top) {
    if (p_sum == 0) {
      p_max = p_top;
      q_max = q_top;
      return;
    }
    if (p_top > p_max) {
      double by = double(p_top) - p_max;
      double scale = __builtin_exp(-by);
      dot = scale * (dot - p_sum * by);
      p_sum *= scale;
      p_max = p_top;
    }
    if (q_top > q_max) {
      double by = double(q_top) - q_max;
      dot += p_sum * by;
      q_sum *= __builtin_exp(-by);
      q_max = q_top;
    }
  }

  void merge(Running other) {
    finite &= other.finite;
    if (other.p_sum == 0) {
      return;
    }
    raise(other.p_max, other.q_max);
    other.raise(p_max, q_max);
    p_sum += other.p_sum;
    q_sum += other.q_sum;
    dot += other.dot;
    if (other.p_best > p_best) {
      p_best = other.p_best;
      p_first = other.p_first;
    }
    if (other.q_best > q_best) {
      q_best = other.q_best;
      q_first = other.q_first;
    }
  }
};

// A logit below cannot matter, as far as the sample goes.
struct Floor {
  float p = kAbsent, q = kAbsent;
};

struct KlStream {
  const Side &p, &q;
  int rows, strips, tasks;
  bool sample;        // only the first strip of each task
  const Floor* floor; // [rows]
  Running* running;   // [tasks, rows]

  void operator()(int task) {
    int begin = int(int64_t(strips) * task / tasks);
    int end = sample ? begin + 1 : int(int64_t(strips) * (task + 1) / tasks);
    Scratch<float> p_tile(size_t(rows) * kStrip), q_tile(size_t(rows) * kStrip);
    Running* state = running + size_t(task) * rows;
    for (int i = 0; i < rows; i++) {
      state[i] = Running{};
    }
    for (int strip = begin; strip < end; strip++) {
      p.logits(rows, strip * kStrip, p_tile);
      q.logits(rows, strip * kStrip, q_tile);
      for (int i = 0; i < rows; i++) {
        take(state[i], i, strip * kStrip, p_tile + i * kStrip, q_tile + i * kStrip);
      }
    }
  }

 private:
  struct Sums {
    float p, q, dot;
  };

  void take(Running& r, int row, int n0, const float* x, const float* y) const {
    float p_top = top(x, r.finite), q_top = top(y, r.finite);
    if (!r.finite) {
      return;
    }
    if (p_top > r.p_limit || q_top > r.q_limit) {
      return take_singly(r, row, n0, x, y, p_top, q_top);
    }
    add(r, sums<false>(r, x, y));
  }

  static void add(Running& r, Sums s) {
    r.p_sum += s.p;
    r.q_sum += s.q;
    r.dot += s.dot;
  }

  // A strip with a new maximum, or with logits that matter.
  void take_singly(
      Running& r, int row, int n0, const float* x, const float* y, float p_top, float q_top) const {
    bool first = r.p_sum == 0;
    // Of equal logits the first is the maximum, so one equal to the old maximum is no news.
    float p_old = first ? p_top - __builtin_fabsf(p_top) * 0x1p-20f : r.p_max;
    float q_old = first ? q_top - __builtin_fabsf(q_top) * 0x1p-20f : r.q_max;
    r.raise(p_top, q_top);
    Sums all = sums<false>(r, x, y);
    r.p_limit = limit(r.p_max, r.p_sum + all.p, floor[row].p, p_old);
    r.q_limit = limit(r.q_max, r.q_sum + all.q, floor[row].q, q_old);
    add(r, sums<true>(r, x, y));
    for (int j = 0; j < kStrip; j++) {
      if (x[j] > r.p_limit || y[j] > r.q_limit) {
        double a = p.logit(row, n0 + j), b = q.logit(row, n0 + j);
        double e = __builtin_exp(a - r.p_max);
        r.p_sum += e;
        r.q_sum += __builtin_exp(b - r.q_max);
        r.dot += e * ((a - r.p_max) - (b - r.q_max));
        if (a > r.p_best) {
          r.p_best = a;
          r.p_first = n0 + j;
        }
        if (b > r.q_best) {
          r.q_best = b;
          r.q_first = n0 + j;
        }
      }
    }
    r.p_limit = limit(r.p_max, r.p_sum, floor[row].p, r.p_max);
    r.q_limit = limit(r.q_max, r.q_sum, floor[row].q, r.q_max);
  }

  static float limit(float maximum, double sum, float floor, float old) {
    float matters = float(maximum + __builtin_log(kMatters * sum));
    matters = matters > floor ? matters : floor;
    return matters < old ? matters : old;
  }

  static float top(const float* x, bool& finite) {
    f32x8 best = load<f32x8>(x), zero = {};
    for (int j = 0; j < kStrip; j += 8) {
      f32x8 v = load<f32x8>(x + j);
      best = max(best, v);
      zero += v * 0.0f; // NaN from NaN and from infinity
    }
    finite &= sum(zero) == 0;
    float m = best[0];
    for (int j = 1; j < 8; j++) {
      m = best[j] > m ? best[j] : m;
    }
    return m;
  }

  // Over the strip, without the logits above the limits if BELOW.
  template <bool BELOW>
  static Sums sums(const Running& r, const float* x, const float* y) {
    f32x8 ps = {}, qs = {}, ds = {};
    for (int j = 0; j < kStrip; j += 8) {
      f32x8 xj = load<f32x8>(x + j), yj = load<f32x8>(y + j);
      f32x8 a = xj - r.p_max, b = yj - r.q_max;
      f32x8 pe = exp_negative(a), qe = exp_negative(b);
      if (BELOW) {
        i32x8 above = (xj > r.p_limit) | (yj > r.q_limit);
        pe = select(above, f32x8{}, pe);
        qe = select(above, f32x8{}, qe);
      }
      ps += pe;
      qs += qe;
      ds += select(pe > 0.0f, pe * (a - b), f32x8{}); // 0 * inf counts as 0
    }
    return {sum(ps), sum(qs), sum(ds)};
  }
};

// One block of tokens, whose results go to a.kl[first + i] and so on.
struct KlBlock {
  const HeadKl& a;
  int first, rows, strips;
  Side p, q;
  Scratch<Floor> floor;

  KlBlock(const HeadKl& a, int first, int rows)
      : a(a),
        first(first),
        rows(rows),
        strips((a.w_p.rows + kStrip - 1) / kStrip),
        p(a.w_p, a.h_p + size_t(first) * a.w_p.cols, rows, a.cap),
        q(a.w_q, a.h_q + size_t(first) * a.w_q.cols, rows, a.cap),
        floor(rows) {}

  void run() {
    for (int i = 0; i < rows; i++) {
      floor[i] = Floor{};
    }
    if (strips >= 16 * kSamples) {
      guess();
    }
    int tasks = strips < 8 * num_threads() ? strips : 8 * num_threads();
    Scratch<Running> running(size_t(tasks) * rows);
    KlStream body{p, q, rows, strips, tasks, false, floor, running};
    parallel_for(tasks, body);
    for (int i = 0; i < rows; i++) {
      Running r = running[i];
      for (int task = 1; task < tasks; task++) {
        r.merge(running[size_t(task) * rows + i]);
      }
      double unit = r.finite ? 1 : __builtin_nan("");
      a.kl[first + i] = float(unit * (r.dot / r.p_sum + __builtin_log(r.q_sum / r.p_sum)));
      a.agree[first + i] = r.finite && r.p_first == r.q_first;
      a.lse_p[first + i] = float(unit * (r.p_max + __builtin_log(r.p_sum)));
      a.lse_q[first + i] = float(unit * (r.q_max + __builtin_log(r.q_sum)));
    }
  }

 private:
  void guess() {
    Scratch<Running> running(size_t(kSamples) * rows);
    KlStream body{p, q, rows, strips, kSamples, true, floor, running};
    parallel_for(kSamples, body);
    double share = __builtin_log(kMatters * strips);
    for (int i = 0; i < rows; i++) {
      float ps[kSamples], qs[kSamples];
      bool finite = true;
      for (int k = 0; k < kSamples; k++) {
        const Running& r = running[size_t(k) * rows + i];
        finite &= r.finite;
        insert(ps, k, float(r.p_max + __builtin_log(r.p_sum)));
        insert(qs, k, float(r.q_max + __builtin_log(r.q_sum)));
      }
      if (finite) {
        floor[i] = {float(ps[kSamples / 2 - 1] + share), float(qs[kSamples / 2 - 1] + share)};
      }
    }
  }

  // Keeps the first n values in order, and the new one among them.
  static void insert(float* sorted, int n, float value) {
    for (; n > 0 && sorted[n - 1] > value; n--) {
      sorted[n] = sorted[n - 1];
    }
    sorted[n] = value;
  }
};

inline void head_kl(const HeadKl& a) {
  for (int first = 0; first < a.rows; first += kTokens) {
    KlBlock(a, first, a.rows - first < kTokens ? a.rows - first : kTokens).run();
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
