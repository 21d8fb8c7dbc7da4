// Softmax attention over a cache in place, for one query (decode) as for many (prefill).
//
// All query heads of a key head are rows that share each key and value read. The keys are cut into
// fixed splits; each split gives a maximum, a sum and a weighted value per row, and splits are
// merged in order. So a row's result does not depend on the rows beside it or on the threads.
#pragma once

#include "elementwise.h"
#include "kl_logits.h" // tanh

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kSplit = 128;               // keys
constexpr int kTileRows = 16;             // query rows that share the keys read
constexpr float kExcluded = -__FLT_MAX__; // as mx.fast.scaled_dot_product_attention masks
constexpr float kInfinity = __builtin_inff();

OPTIQ_INLINE float exp_one(float x) {
  return exp_negative(splat(x))[0];
}

// What a row knows after some of its keys: the output is value / sum.
struct Partial {
  float maximum, sum;
};

template <Float TYPE>
struct AttentionTiles {
  const Attention& a;
  int group;       // query heads per key head
  int tiles;       // of rows, per batch entry and key head
  int splits;      // of the keys
  bool split_up;   // a task is one split, and somebody else merges
  Partial* states; // [tasks, kTileRows], when split up
  float* values;   // [tasks, kTileRows, value_dim]

  struct Tile {
    int batch, kv_head, begin, rows;
    int visible; // keys that its last row sees
  };

  Tile tile(int index) const {
    int of_head = index % tiles, head = index / tiles;
    int begin = of_head * kTileRows, all = group * a.rows;
    int rows = all - begin < kTileRows ? all - begin : kTileRows;
    int last = (begin + rows - 1) / group;
    int visible = a.masking == Masking::causal ? a.keys - a.rows + last + 1 : a.keys;
    return {head / a.kv_heads, head % a.kv_heads, begin, rows, visible};
  }

  void operator()(int task) {
    Tile t = tile(split_up ? task / splits : task);
    Scratch<float> q(size_t(kTileRows) * a.dim), scores(size_t(kTileRows) * kSplit);
    gather(t, q);
    if (split_up) {
      size_t at = size_t(task) * kTileRows;
      partial(t, task % splits, q, scores, states + at, values + at * a.value_dim);
      return;
    }
    Partial all[kTileRows], one[kTileRows];
    Scratch<float> sums(size_t(kTileRows) * a.value_dim), next(size_t(kTileRows) * a.value_dim);
    partial(t, 0, q, scores, all, sums);
    for (int s = 1; s * kSplit < t.visible; s++) {
      partial(t, s, q, scores, one, next);
      merge(t, all, sums, one, next);
    }
    finish(t, all, sums);
  }

  // The second pass of split-up tiles.
  void combine(int index) {
    Tile t = tile(index);
    size_t at = size_t(index) * splits * kTileRows;
    for (int s = 1; s * kSplit < t.visible; s++) {
      size_t next = at + size_t(s) * kTileRows;
      merge(t, states + at, values + at * a.value_dim, states + next, values + next * a.value_dim);
    }
    finish(t, states + at, values + at * a.value_dim);
  }

 private:
  // Rows are ordered by query, then by head, so that a causal tile ends early.
  int query(const Tile& t, int r) const {
    return (t.begin + r) / group;
  }
  int head(const Tile& t, int r) const {
    return t.kv_head * group + (t.begin + r) % group;
  }

  void gather(const Tile& t, float* q) const {
    for (int r = 0; r < t.rows; r++) {
      const float* from = a.q + t.batch * a.q_batch + head(t, r) * a.q_head + query(t, r) * a.q_row;
      for (int i = 0; i < a.dim; i += 8) {
        store(q + r * a.dim + i, load<f32x8>(from + i) * a.scale);
      }
    }
  }

  // out[r, :] = softmax-weighted values of one split, not yet divided by the sum.
  void partial(
      const Tile& t, int split, const float* q, float* scores, Partial* state, float* out) const {
    int begin = split * kSplit;
    int n = t.visible - begin < kSplit ? t.visible - begin : kSplit;
    if (n <= 0) {
      return;
    }
    size_t k_at = t.batch * a.k_batch + t.kv_head * a.k_head + size_t(begin) * a.k_row;
    for (int j = 0; j < n; j += 8) {
      int keys = n - j < 8 ? n - j : 8;
      int r = 0;
      for (; r + 2 <= t.rows; r += 2) {
        dots<2>(q + r * a.dim, k_at + j * a.k_row, keys, scores + r * kSplit + j);
      }
      if (r < t.rows) {
        dots<1>(q + r * a.dim, k_at + j * a.k_row, keys, scores + r * kSplit + j);
      }
    }
    for (int r = 0; r < t.rows; r++) {
      state[r] = weigh(t, r, begin, n, scores + r * kSplit);
    }
    size_t v_at = t.batch * a.v_batch + t.kv_head * a.v_head + size_t(begin) * a.v_row;
    for (int d = 0; d < a.value_dim; d += 32) {
      int vectors = a.value_dim - d < 32 ? (a.value_dim - d) / 8 : 4;
      for (int r = 0; r < t.rows; r += 4) {
        int rows = t.rows - r < 4 ? t.rows - r : 4;
        const float* p = scores + r * kSplit;
        float* o = out + r * a.value_dim + d;
        vectors == 4 ? rows == 4   ? weighted<4, 4>(p, v_at + d, n, o)
                       : rows == 3 ? weighted<3, 4>(p, v_at + d, n, o)
                       : rows == 2 ? weighted<2, 4>(p, v_at + d, n, o)
                                   : weighted<1, 4>(p, v_at + d, n, o)
                     : ragged(p, v_at + d, n, rows, vectors, o);
      }
    }
  }

  // scores[r, j] = q[r] . k[j] for eight keys and one or two rows.
  template <int ROWS>
  OPTIQ_INLINE void dots(const float* q, size_t k_at, int keys, float* scores) const {
    f32x8 acc[ROWS][8] = {};
    size_t row[8];
    for (int j = 0; j < 8; j++) {
      row[j] = k_at + (j < keys ? j : keys - 1) * a.k_row;
    }
    for (int i = 0; i < a.dim; i += 8) {
      f32x8 qi[ROWS];
      for (int r = 0; r < ROWS; r++) {
        qi[r] = load<f32x8>(q + r * a.dim + i);
      }
      for (int j = 0; j < 8; j++) {
        f32x8 kj = load_float(a.k, TYPE, row[j] + i);
        for (int r = 0; r < ROWS; r++) {
          acc[r][j] += qi[r] * kj;
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      f32x8* c = acc[r];
      transpose(c);
      store(scores + r * kSplit, ((c[0] + c[4]) + (c[2] + c[6])) + ((c[1] + c[5]) + (c[3] + c[7])));
    }
  }

  // Scores become exp(score - maximum), the excluded ones and those past n zero.
  Partial weigh(const Tile& t, int r, int begin, int n, float* s) const {
    int padded = (n + 7) / 8 * 8, i = query(t, r);
    if (a.softcap != 0) {
      for (int j = 0; j < padded; j += 8) {
        store(s + j, tanh(load<f32x8>(s + j) * (1 / a.softcap)) * a.softcap);
      }
    }
    if (a.masking == Masking::causal) {
      int limit = a.keys - a.rows + i + 1 - begin;
      for (int j = limit < 0 ? 0 : limit; j < n; j++) {
        s[j] = kExcluded;
      }
    } else if (a.masking != Masking::none) {
      const int64_t* stride = a.mask_strides;
      int64_t at = t.batch * stride[0] + head(t, r) * stride[1] + i * stride[2] + begin * stride[3];
      for (int j = 0; j < n; j++, at += stride[3]) {
        s[j] = masked(at, s[j]);
      }
    }
    for (int j = n; j < padded; j++) {
      s[j] = -kInfinity;
    }
    f32x8 largest = splat(-kInfinity), sums = {};
    for (int j = 0; j < padded; j += 8) {
      largest = max(largest, load<f32x8>(s + j));
    }
    float m = largest[0];
    for (int j = 1; j < 8; j++) {
      m = largest[j] > m ? largest[j] : m;
    }
    for (int j = 0; j < padded; j += 8) {
      f32x8 p = exp_negative(load<f32x8>(s + j) - m);
      store(s + j, p);
      sums += p;
    }
    return {m, sum(sums)};
  }

  OPTIQ_INLINE float masked(int64_t at, float score) const {
    if (a.masking == Masking::boolean) {
      return static_cast<const bool*>(a.mask)[at] ? score : kExcluded;
    }
    return score + load_tail(a.mask, a.mask_type, at, 1)[0];
  }

  // o[r, :] = sum_j p[r, j] v[j, :] for a few rows and a few vectors, all in registers.
  template <int ROWS, int VECTORS>
  OPTIQ_INLINE void weighted(const float* p, size_t v_at, int n, float* o) const {
    f32x8 acc[ROWS][VECTORS] = {};
    for (int j = 0; j < n; j++) {
      f32x8 v[VECTORS];
      for (int d = 0; d < VECTORS; d++) {
        v[d] = load_float(a.v, TYPE, v_at + j * a.v_row + 8 * d);
      }
      for (int r = 0; r < ROWS; r++) {
        f32x8 weight = splat(p[r * kSplit + j]);
        for (int d = 0; d < VECTORS; d++) {
          acc[r][d] += weight * v[d];
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int d = 0; d < VECTORS; d++) {
        store(o + r * a.value_dim + 8 * d, acc[r][d]);
      }
    }
  }

  void ragged(const float* p, size_t v_at, int n, int rows, int vectors, float* o) const {
    for (int r = 0; r < rows; r++) {
      for (int d = 0; d < vectors; d++) {
        weighted<1, 1>(p + r * kSplit, v_at + 8 * d, n, o + r * a.value_dim + 8 * d);
      }
    }
  }

  void merge(
      const Tile& t, Partial* all, float* sums, const Partial* one, const float* next) const {
    for (int r = 0; r < t.rows; r++) {
      float m = all[r].maximum > one[r].maximum ? all[r].maximum : one[r].maximum;
      if (m == -kInfinity) { // an additive mask hid every key so far
        continue;
      }
      float keep = exp_one(all[r].maximum - m), take = exp_one(one[r].maximum - m);
      float* y = sums + r * a.value_dim;
      for (int d = 0; d < a.value_dim; d += 8) {
        f32x8 more = load<f32x8>(next + r * a.value_dim + d) * take;
        store(y + d, load<f32x8>(y + d) * keep + more);
      }
      all[r] = {m, all[r].sum * keep + one[r].sum * take};
    }
  }

  void finish(const Tile& t, const Partial* all, const float* sums) const {
    for (int r = 0; r < t.rows; r++) {
      int h = head(t, r);
      float total = all[r].sum, factor = 1;
      if (a.sinks) {
        float m = a.sinks[h] > all[r].maximum ? a.sinks[h] : all[r].maximum;
        factor = exp_one(all[r].maximum - m);
        total = total * factor + exp_one(a.sinks[h] - m);
      }
      size_t row = (size_t(t.batch) * a.rows + query(t, r)) * a.heads + h;
      for (int d = 0; d < a.value_dim; d += 8) {
        store(a.y + row * a.value_dim + d,
            load<f32x8>(sums + r * a.value_dim + d) * (factor / total));
      }
    }
  }
};

template <Float TYPE>
void attend(const Attention& a) {
  int group = a.heads / a.kv_heads;
  int tiles = (group * a.rows + kTileRows - 1) / kTileRows;
  int base = a.batch * a.kv_heads * tiles, splits = (a.keys + kSplit - 1) / kSplit;
  double flops = 2.0 * a.batch * a.heads * a.rows * a.keys * (a.dim + a.value_dim);
  bool serial = flops < kSerialFlops;
  bool split_up = !serial && splits > 1 && base < 4 * num_threads();
  size_t partials = split_up ? size_t(base) * splits * kTileRows : 1;
  Scratch<Partial> states(partials);
  Scratch<float> values(partials * a.value_dim);
  AttentionTiles<TYPE> work{a, group, tiles, splits, split_up, states, values};
  if (serial) {
    for (int t = 0; t < base; t++) {
      work(t);
    }
    return;
  }
  parallel_for(split_up ? base * splits : base, work);
  for (int t = 0; split_up && t < base; t++) {
    work.combine(t);
  }
}

inline void attention(const Attention& a) {
  switch (a.type) {
    case Float::f32:
      return attend<Float::f32>(a);
    case Float::f16:
      return attend<Float::f16>(a);
    default:
      return attend<Float::bf16>(a);
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
