// Low-rank terms beside the products of a few rows or many. Each value is summed in the same order
// on every instruction set, whatever the number of rows and the terms of the others.
#pragma once

#include "decode.h"
#include "pool.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kTermRows = 4;   // rows of one term that share what is read of it
constexpr int kTermChains = 4; // sums over the inputs at a time, to hide the latency of fma
constexpr int kTermLanes = 8;  // ranks are a multiple of it
constexpr int kLine = 64;      // bytes of a cache line
constexpr int kAhead = 4096;   // bytes: processors look no further ahead than the end of a page

template <int LANES, Float TYPE>
OPTIQ_INLINE typename Vector<LANES>::Floats load_term(const void* base, size_t i) {
  if constexpr (LANES == kWide) {
    return load_wide<TYPE>(base, i);
  } else {
    return load_float(base, TYPE, i);
  }
}

// h[i, 0:LANES] = sum_k x[i, k] a[k, 0:LANES]. Meanwhile what comes next is fetched: a itself, and
// in even steps b, [rank, out], which is read in pieces afterwards.
template <int ROWS, int LANES, Float TYPE>
OPTIQ_INLINE void term_down(
    const float* x, size_t in, const LowRank& t, size_t out, int first, float* h) {
  using V = typename Vector<LANES>::Floats;
  V acc[ROWS][kTermChains] = {};
  size_t k = 0, step = size_t(kTermChains) * t.rank * size_of(TYPE), step_of_b = step * out / in;
  auto *a = static_cast<const char*>(t.a), *b = static_cast<const char*>(t.b), *until = b;
  for (; k + kTermChains <= in; k += kTermChains) {
    if (first == 0) {
      for (const char* end = a + step; a < end; a += kLine) {
        __builtin_prefetch(a + kAhead);
      }
      for (until += step_of_b; b < until; b += kLine) {
        __builtin_prefetch(b);
      }
    }
    for (int c = 0; c < kTermChains; c++) {
      V a = load_term<LANES, TYPE>(t.a, (k + c) * t.rank + first);
      for (int i = 0; i < ROWS; i++) {
        acc[i][c] += x[i * in + k + c] * a;
      }
    }
  }
  for (; k < in; k++) {
    V a = load_term<LANES, TYPE>(t.a, k * t.rank + first);
    for (int i = 0; i < ROWS; i++) {
      acc[i][0] += x[i * in + k] * a;
    }
  }
  for (int i = 0; i < ROWS; i++) {
    store(h + i * t.rank + first, (acc[i][0] + acc[i][1]) + (acc[i][2] + acc[i][3]));
  }
}

// y[i, n:n + VECTORS * LANES] += sum_r h[i, r] b[r, n:...]
template <int ROWS, int VECTORS, int LANES, Float TYPE>
OPTIQ_INLINE void term_up(const float* h, const LowRank& t, size_t out, size_t n, float* y) {
  using V = typename Vector<LANES>::Floats;
  V acc[ROWS][VECTORS] = {};
  for (int r = 0; r < t.rank; r++) {
    for (int v = 0; v < VECTORS; v++) {
      V b = load_term<LANES, TYPE>(t.b, r * out + n + v * LANES);
      for (int i = 0; i < ROWS; i++) {
        acc[i][v] += h[i * t.rank + r] * b;
      }
    }
  }
  for (int i = 0; i < ROWS; i++) {
    for (int v = 0; v < VECTORS; v++) {
      float* to = y + i * out + n + v * LANES;
      store(to, load<V>(to) + acc[i][v]);
    }
  }
}

template <int ROWS, Float TYPE>
void add_term(const float* x, size_t in, const LowRank& t, float* h, float* y, size_t out) {
  int first = 0;
  for (; first + kWide <= t.rank; first += kWide) {
    term_down<ROWS, kWide, TYPE>(x, in, t, out, first, h);
  }
  for (; first < t.rank; first += kTermLanes) {
    term_down<ROWS, kTermLanes, TYPE>(x, in, t, out, first, h);
  }
  constexpr int kVectors = ROWS == 1 ? 8 : 4;
  size_t n = 0;
  for (; n + kVectors * kWide <= out; n += kVectors * kWide) {
    term_up<ROWS, kVectors, kWide, TYPE>(h, t, out, n, y);
  }
  for (; n + kTermLanes <= out; n += kTermLanes) {
    term_up<ROWS, 1, kTermLanes, TYPE>(h, t, out, n, y);
  }
  for (; n < out; n++) {
    for (int i = 0; i < ROWS; i++) {
      float sum = 0;
      for (int r = 0; r < t.rank; r++) {
        float b;
        widen(t.b, TYPE, r * out + n, 1, &b);
        sum += h[i * t.rank + r] * b;
      }
      y[i * out + n] += sum;
    }
  }
}

// Rows [begin, end), which have the same slot.
struct TermRows {
  int begin, end;
};

struct LowRankTask {
  const LowRankProducts& p;
  const TermRows* blocks;

  void operator()(int task) {
    auto [begin, end] = blocks[task];
    const float* x = p.x + size_t(begin) * p.in;
    for (int i = 0; i < p.count; i++) {
      const LowRankPart& part = p.parts[i];
      const LowRank& t = part.terms[p.slots[begin]];
      if (t.rank > 0) {
        float* y = part.y + size_t(begin) * part.out;
        for (int row = begin; t.gain && row < end; row++) {
          multiply(t.gain, part.out, part.y + size_t(row) * part.out);
        }
        Scratch<float> h(size_t(kTermRows) * t.rank);
        t.type == Float::f16 ? rows<Float::f16>(end - begin, x, t, h, y, part.out)
                             : rows<Float::f32>(end - begin, x, t, h, y, part.out);
      }
    }
  }

 private:
  static void multiply(const float* gain, int n, float* y) {
    for (int i = 0; i < n; i++) {
      y[i] *= gain[i];
    }
  }

  template <Float TYPE>
  void rows(int n, const float* x, const LowRank& t, float* h, float* y, size_t out) {
    if (n == kTermRows) {
      return add_term<kTermRows, TYPE>(x, p.in, t, h, y, out);
    }
    for (int i = 0; i < n; i++) {
      add_term<1, TYPE>(x + size_t(i) * p.in, p.in, t, h, y + i * out, out);
    }
  }
};

inline void low_rank(const LowRankProducts& p) {
  Scratch<TermRows> blocks(p.m);
  int count = 0;
  double flops = 0;
  for (int begin = 0, end; begin < p.m; begin = end) {
    int slot = p.slots[begin];
    for (end = begin + 1; end < p.m && end < begin + kTermRows && p.slots[end] == slot; end++) {
    }
    double each = 0;
    for (int i = 0; i < p.count; i++) {
      each += 2.0 * p.parts[i].terms[slot].rank * (p.in + p.parts[i].out);
    }
    if (each > 0) {
      blocks[count++] = {begin, end};
      flops += each * (end - begin);
    }
  }
  LowRankTask work{p, blocks};
  if (flops < kSerialFlops) {
    for (int i = 0; i < count; i++) {
      work(i);
    }
  } else {
    parallel_for(count, work);
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
