// What a training step computes beside its products, and the gradients of it.
#pragma once

#include "elementwise.h"
#include "low_rank.h"

namespace optiq::cpu::OPTIQ_ISA {

OPTIQ_INLINE float lane_max(f32x8 v) {
  float m = v[0];
  for (int i = 1; i < 8; i++) {
    m = v[i] > m ? v[i] : m;
  }
  return m;
}

// The first n <= 8 lanes of v, the others `other`.
OPTIQ_INLINE f32x8 first(f32x8 v, size_t n, float other) {
  f32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return n == 8 ? v : select(lane < float(n), v, splat(other));
}

OPTIQ_INLINE float maximum(const float* x, size_t n) {
  f32x8 best = splat(x[0]);
  for (size_t i = 0; i < n; i += 8) {
    size_t width = n - i < 8 ? n - i : 8;
    best = max(first(load_some(x + i, width), width, x[0]), best);
  }
  return lane_max(best);
}

inline void cross_entropy(const CrossEntropy& a) {
  constexpr size_t kChunk = 1024; // summed in single precision, then in double
  auto row = [&](int r) {
    const float* x = a.logits + size_t(r) * a.vocab;
    float top = maximum(x, a.vocab), unknown = 0; // NaN where a logit is not finite
    double total = 0;
    for (size_t begin = 0; begin < a.vocab; begin += kChunk) {
      size_t end = begin + kChunk < a.vocab ? begin + kChunk : a.vocab;
      f32x8 sums = {}, zeros = {};
      for (size_t i = begin; i < end; i += 8) {
        size_t width = end - i < 8 ? end - i : 8;
        f32x8 v = load_some(x + i, width);
        zeros += v * 0.0f;
        sums += first(exp_negative(v - top), width, 0);
      }
      total += sum(sums);
      unknown += sum(zeros);
    }
    int32_t label = a.labels[r];
    bool known = label >= 0 && size_t(label) < a.vocab;
    a.lse[r] = float(top + __builtin_log(total)) + unknown;
    a.loss[r] = known ? a.lse[r] - x[label] : __builtin_nanf("");
  };
  for_rows(a.rows, a.vocab, row);
}

// d_loss * (softmax(logits) - 1 at the label)
inline void cross_entropy_gradient(const CrossEntropyGradient& a) {
  auto row = [&](int r) {
    const float* x = a.logits + size_t(r) * a.vocab;
    float *y = a.d_logits + size_t(r) * a.vocab, lse = a.lse[r], d = a.d_loss[r] + 0 * lse;
    for (size_t i = 0; i < a.vocab; i += 8) {
      size_t width = a.vocab - i < 8 ? a.vocab - i : 8;
      store_some(y + i, exp_negative(load_some(x + i, width) - lse) * d, width);
    }
    if (a.labels[r] >= 0 && size_t(a.labels[r]) < a.vocab) {
      y[a.labels[r]] -= d;
    }
  };
  for_rows(a.rows, a.vocab, row);
}

// activation(x), and its derivative in `slope`.
OPTIQ_INLINE f32x8 activate(Activation kind, f32x8 x, f32x8& slope) {
  constexpr float kInner = 1.5957691216057308f, kCube = 0.044715f;
  bool gelu = kind == Activation::gelu_tanh;
  f32x8 s = sigmoid(gelu ? (x + x * x * x * kCube) * kInner : x);
  f32x8 inner = gelu ? (1.0f + x * x * (3 * kCube)) * kInner : splat(1.0f);
  slope = s + x * s * (1.0f - s) * inner;
  return x * s;
}

inline void gate_gradient(const GateGradient& a) {
  constexpr size_t kBlock = 1024;
  auto block = [&](int b) {
    size_t end = (b + 1) * kBlock < a.n ? (b + 1) * kBlock : a.n;
    for (size_t i = b * kBlock; i < end; i += 8) {
      size_t n = end - i < 8 ? end - i : 8;
      f32x8 dy = load_some(a.d_y + i, n), slope;
      f32x8 active = activate(a.activation, load_some(a.gate + i, n), slope);
      store_some(a.d_gate + i, dy * load_some(a.up + i, n) * slope, n);
      store_some(a.d_up + i, dy * active, n);
    }
  };
  for_rows((a.n + kBlock - 1) / kBlock, kBlock, block);
}

// The keys [begin, end) that the query of row r sees.
struct Seen {
  size_t begin, end;

  Seen(const CausalSoftmax& a, int r) {
    end = a.keys - a.queries + r % a.queries + 1;
    begin = a.window && end > a.window ? end - a.window : 0;
  }
};

inline void causal_softmax(const CausalSoftmax& a) {
  auto row = [&](int r) {
    Seen seen(a, r);
    const float* x = a.x + size_t(r) * a.keys + seen.begin;
    float* y = a.y + size_t(r) * a.keys;
    size_t n = seen.end - seen.begin;
    std::memset(y, 0, a.keys * sizeof(float));
    y += seen.begin;
    float top = maximum(x, n);
    f32x8 sums = {};
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      f32x8 v = load_some(x + i, width);
      f32x8 e = first(exp_negative((v - top) * a.scale) + v * 0.0f, width, 0);
      sums += e;
      store_some(y + i, e, width);
    }
    float inverse = 1 / sum(sums);
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      store_some(y + i, load_some(y + i, width) * inverse, width);
    }
  };
  for_rows(a.rows, a.keys, row);
}

// scale * y * (d_y - sum(y * d_y)) where the query sees, zero elsewhere; x is the softmax here.
inline void causal_softmax_gradient(const CausalSoftmax& a, const float* d_y) {
  auto row = [&](int r) {
    Seen seen(a, r);
    size_t at = size_t(r) * a.keys, n = seen.end - seen.begin;
    const float *p = a.x + at + seen.begin, *d = d_y + at + seen.begin;
    f32x8 sums = {};
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      sums += load_some(p + i, width) * load_some(d + i, width);
    }
    float mean = sum(sums);
    std::memset(a.y + at, 0, a.keys * sizeof(float));
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      f32x8 v = load_some(p + i, width) * (load_some(d + i, width) - mean) * a.scale;
      store_some(a.y + at + seen.begin + i, v, width);
    }
  };
  for_rows(a.rows, a.keys, row);
}

inline void rms_norm_gradient(const RmsNormGradient& a) {
  size_t n = a.dims;
  Scratch<float> inverse(a.rows);
  auto row = [&](int r) {
    const float *x = a.x + r * n, *d = a.d_y + r * n;
    float by = inverse[r] = inverse_rms(x, n, a.eps);
    if (!a.d_x) {
      return;
    }
    f32x8 sums = {};
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      sums += load_some(x + i, width) * load_some(d + i, width) * load_some(a.weight + i, width);
    }
    float along = sum(sums) * by * by / float(n);
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      f32x8 straight = load_some(d + i, width) * load_some(a.weight + i, width);
      store_some(a.d_x + r * n + i, (straight - load_some(x + i, width) * along) * by, width);
    }
  };
  for_rows(a.rows, n, row);
  constexpr size_t kColumns = 64; // of a task, which adds up the rows in their order
  auto columns = [&](int block) {
    size_t end = (block + 1) * kColumns < n ? (block + 1) * kColumns : n;
    for (size_t i = block * kColumns; i < end; i += 8) {
      size_t width = end - i < 8 ? end - i : 8;
      f32x8 sums = {};
      for (size_t r = 0; r < a.rows; r++) {
        sums +=
            load_some(a.x + r * n + i, width) * load_some(a.d_y + r * n + i, width) * inverse[r];
      }
      store_some(a.d_weight + i, sums, width);
    }
  };
  if (a.d_weight) {
    for_rows((n + kColumns - 1) / kColumns, a.rows * kColumns, columns);
  }
}

inline void adamw(const AdamW& a) {
  constexpr size_t kBlock = 4096;
  auto block = [&](int b) {
    size_t end = (b + 1) * kBlock < a.n ? (b + 1) * kBlock : a.n;
    for (size_t i = b * kBlock; i < end; i += 8) {
      size_t width = end - i < 8 ? end - i : 8;
      f32x8 g = load_some(a.gradient + i, width) * a.by;
      f32x8 m = load_some(a.m + i, width) * a.old_m + g * a.new_m;
      f32x8 v = load_some(a.v + i, width) * a.old_v + g * g * a.new_v;
      f32x8 step = m * a.rate / (square_root(v) * a.root + a.eps);
      store_some(a.next_m + i, m, width);
      store_some(a.next_v + i, v, width);
      store_some(a.next_parameter + i, load_some(a.parameter + i, width) * a.keep - step, width);
    }
  };
  for_rows((a.n + kBlock - 1) / kBlock, kBlock, block);
}

// from[rows, cols] times `by`; out[i, j] is at i * row + j * col, and zero past `rows` and `cols`.
inline void padded(const float* from, int rows, int cols, float by, float* out, size_t size,
    size_t row, size_t col) {
  std::memset(out, 0, size * sizeof(float));
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < cols; j++) {
      out[i * row + j * col] = from[size_t(i) * cols + j] * by;
    }
  }
}

inline void low_rank_term(const LowRankTerm& p) {
  int rank = (p.rank + kTermLanes - 1) / kTermLanes * kTermLanes;
  size_t of_a = size_t(p.in) * rank, of_b = size_t(rank) * p.out;
  Scratch<float> a(of_a), b(of_b);
  padded(p.a, p.in, p.rank, 1, a, of_a, rank, 1);
  padded(p.b, p.rank, p.out, p.scale, b, of_b, p.out, 1);
  Scratch<int> slots(p.m);
  std::memset(slots, 0, p.m * sizeof(int));
  std::memcpy(p.y, p.base, size_t(p.m) * p.out * sizeof(float));
  LowRank term{a, b, Float::f32, rank};
  LowRankPart part{&term, p.y, p.out};
  low_rank({p.x, p.m, p.in, slots, &part, 1});
}

// out[r, n] = sum_i t[i, r] * y[i, n] for r < lanes, which is a multiple of 8.
struct Outer {
  const float *t, *y;
  float* out;
  int m, lanes, width;

  void operator()(int task) const {
    int n = task * kWide, cols = width - n < kWide ? width - n : kWide;
    for (int r = 0; r < lanes; r += 8) {
      fw sums[8] = {};
      for (int i = 0; i < m; i++) {
        fw v{};
        const float* row = y + size_t(i) * width + n;
        cols == kWide ? void(v = load<fw>(row)) : void(std::memcpy(&v, row, cols * sizeof(float)));
        for (int j = 0; j < 8; j++) {
          sums[j] += t[size_t(i) * lanes + r + j] * v;
        }
      }
      for (int j = 0; j < 8; j++) {
        std::memcpy(out + size_t(r + j) * width + n, &sums[j], cols * sizeof(float));
      }
    }
  }

  void run() {
    int tasks = (width + kWide - 1) / kWide;
    if (2.0 * m * lanes * width < kSerialFlops) {
      for (int i = 0; i < tasks; i++) {
        (*this)(i);
      }
    } else {
      parallel_for(tasks, *this);
    }
  }
};

// With h = x a and g = scale d_y b': d_x = g a', d_a = x' g, d_b = scale h' d_y.
struct LowRankBack {
  const LowRankTermGradient& p;
  const float* a;
  const LowRank& down; // from d_y to d_x
  int rank;
  float *h, *g;

  template <int ROWS>
  void rows(size_t at) const {
    LowRank term{a, nullptr, Float::f32, rank};
    for (int first = 0; first < rank; first += kTermLanes) {
      term_down<ROWS, kTermLanes, Float::f32>(p.x + at * p.in, p.in, term, 0, first, h + at * rank);
    }
    add_term<ROWS, Float::f32>(
        p.d_y + at * p.out, p.out, down, g + at * rank, p.d_x + at * p.in, p.in);
  }

  void operator()(int block) const {
    int begin = block * kTermRows;
    if (begin + kTermRows <= p.m) {
      return rows<kTermRows>(begin);
    }
    for (int i = begin; i < p.m; i++) {
      rows<1>(i);
    }
  }
};

inline void low_rank_term_gradient(const LowRankTermGradient& p) {
  int rank = (p.rank + kTermLanes - 1) / kTermLanes * kTermLanes;
  size_t of_in = size_t(rank) * p.in, of_out = size_t(rank) * p.out;
  Scratch<float> a(of_in), a_turned(of_in), b_turned(of_out);
  padded(p.a, p.in, p.rank, 1, a, of_in, rank, 1);
  padded(p.a, p.in, p.rank, 1, a_turned, of_in, 1, p.in);
  padded(p.b, p.rank, p.out, p.scale, b_turned, of_out, 1, rank);
  Scratch<float> h(size_t(p.m) * rank), g(size_t(p.m) * rank);
  LowRank down{b_turned, a_turned, Float::f32, rank};
  std::memset(p.d_x, 0, size_t(p.m) * p.in * sizeof(float));
  LowRankBack back{p, a, down, rank, h, g};
  for_rows((p.m + kTermRows - 1) / kTermRows, size_t(kTermRows) * rank * (p.in + p.out), back);
  Scratch<float> d_a(of_in), d_b(of_out);
  Outer{g, p.x, d_a, p.m, rank, p.in}.run();
  Outer{h, p.d_y, d_b, p.m, rank, p.out}.run();
  for (int i = 0; i < p.in; i++) {
    for (int r = 0; r < p.rank; r++) {
      p.d_a[size_t(i) * p.rank + r] = d_a[size_t(r) * p.in + i];
    }
  }
  for (size_t i = 0; i < size_t(p.rank) * p.out; i++) {
    p.d_b[i] = p.scale * d_b[i];
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
