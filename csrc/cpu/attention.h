// Softmax attention over a cache in place, for one query (decode) as for many (prefill).
//
// All query heads of a key head are rows that share each key and value read, and decoded where the
// cache holds records. The keys are cut into fixed splits from the first one of a batch entry on;
// each split gives a maximum, a sum and a weighted value per row, and splits are merged in order.
// So a row's result depends neither on the rows beside it, nor on padding, nor on the threads.
#pragma once

#include "kl_logits.h" // tanh
#include "kv_records.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kSplit = 128;               // keys
constexpr int kChunk = 32;                // keys that are decoded at a time
constexpr int kTileRows = 16;             // query rows that share the keys read, at most
constexpr float kExcluded = -__FLT_MAX__; // as mx.fast.scaled_dot_product_attention masks
constexpr float kInfinity = __builtin_inff();

OPTIQ_INLINE float exp_one(float x) {
  return exp_negative(splat(x))[0];
}

// What a row knows after some of its keys: the output is value / sum.
struct Partial {
  float maximum, sum;
};

// Some consecutive keys or values of a head, `stride` floats apart.
struct Chunk {
  const float* rows;
  size_t stride;
};

// `n` tokens of a head from the at-th element on, `dim` floats each.
inline void decode(const Vectors& x, size_t at, int n, int dim, float* out) {
  if (x.bits == 0) {
    for (int j = 0; j < n; j++) {
      widen(x.data, x.type, at + j * x.row, dim, out + size_t(j) * dim);
    }
    return;
  }
  at_width(x.bits, [&]<int BITS>(Width<BITS>) {
    for (int j = 0; j < n; j++) {
      auto* record = static_cast<const uint32_t*>(x.data) + at + j * x.row;
      decode_record<BITS>(record, dim, x.group_size, out + size_t(j) * dim);
    }
  });
}

struct AttentionTiles {
  const Attention& a;
  int group;       // query heads per key head
  int height;      // rows of a tile
  int tiles;       // per batch entry and key head
  int splits;      // of the keys
  bool split_up;   // a task is one split, and somebody else merges
  Partial* states; // [tasks, height], when split up
  float* values;   // [tasks, height, value_dim]

  struct Tile {
    int batch, kv_head, begin, rows;
    int start;       // first key of the batch entry
    int end;         // of the keys that its last row sees
    int first, last; // splits with keys that it sees
  };

  Tile tile(int index) const {
    int of_head = index % tiles, head = index / tiles;
    int begin = of_head * height, all = group * a.rows;
    int rows = all - begin < height ? all - begin : height;
    Tile t{head / a.kv_heads, head % a.kv_heads, begin, rows, 0, a.keys, 0, 0};
    if (a.starts) {
      int start = a.starts[t.batch];
      t.start = start < 0 ? 0 : start < a.keys ? start : a.keys;
    }
    if (a.masking == Masking::causal) {
      t.end = a.keys - a.rows + query(t, rows - 1) + 1;
      int seen = a.keys - a.rows + query(t, 0) + 1 - a.window - t.start;
      t.first = a.window && seen > 0 ? seen / kSplit : 0;
    }
    t.last = t.end > t.start ? (t.end - t.start - 1) / kSplit : 0;
    return t;
  }

  void operator()(int task) {
    Tile t = tile(split_up ? task / splits : task);
    int split = split_up ? task % splits : t.first;
    if (split < t.first || split > t.last) {
      return;
    }
    int widest = a.dim > a.value_dim ? a.dim : a.value_dim;
    Scratch<float> q(size_t(height) * a.dim), scores(size_t(height) * kSplit);
    Scratch<float> chunk(size_t(kChunk) * widest);
    gather(t, q);
    if (split_up) {
      size_t at = size_t(task) * height;
      partial(t, split, q, scores, chunk, states + at, values + at * a.value_dim);
      return;
    }
    Partial all[kTileRows], one[kTileRows];
    Scratch<float> sums(size_t(height) * a.value_dim), next(size_t(height) * a.value_dim);
    partial(t, split, q, scores, chunk, all, sums);
    for (int s = split + 1; s <= t.last; s++) {
      partial(t, s, q, scores, chunk, one, next);
      merge(t, all, sums, one, next);
    }
    finish(t, all, sums);
  }

  // The second pass of split-up tiles.
  void combine(int index) {
    Tile t = tile(index);
    size_t at = (size_t(index) * splits + t.first) * height;
    for (int s = 1; s <= t.last - t.first; s++) {
      size_t next = at + size_t(s) * height;
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
      size_t from = t.batch * a.q_batch + head(t, r) * a.q_head + query(t, r) * a.q_row;
      for (int i = 0; i < a.dim; i += 8) {
        store(q + r * a.dim + i, load_float(a.q, a.type, from + i) * a.scale);
      }
    }
  }

  // Keys or values of the tile from the begin-th on.
  Chunk vectors(const Tile& t, const Vectors& x, const Vectors& first, const Vectors& recent,
      int dim, int begin, int n, float* out) const {
    auto at = [&](const Vectors& from, int token) {
      return t.batch * from.batch + t.kv_head * from.head + size_t(token) * from.row;
    };
    int end = begin + n, exact = t.start + a.first, inexact = a.keys - a.recent;
    if (begin >= exact && end <= inexact) {
      if (x.bits == 0 && x.type == Float::f32) {
        return {static_cast<const float*>(x.data) + at(x, begin), x.row};
      }
      decode(x, at(x, begin), n, dim, out);
      return {out, size_t(dim)};
    }
    for (int j = begin; j < end; j++) {
      bool late = j >= inexact, early = j < exact;
      const Vectors& from = late ? recent : early ? first : x;
      int token = j - (late ? inexact : early ? t.start : 0);
      decode(from, at(from, token), 1, dim, out + size_t(j - begin) * dim);
    }
    return {out, size_t(dim)};
  }

  // out[r, :] = softmax-weighted values of one split, not yet divided by the sum.
  void partial(const Tile& t, int split, const float* q, float* scores, float* chunk,
      Partial* state, float* out) const {
    int begin = t.start + split * kSplit;
    int n = t.end - begin < kSplit ? t.end - begin : kSplit;
    n = n < 0 ? 0 : n;
    for (int c = 0; c < n; c += kChunk) {
      int some = n - c < kChunk ? n - c : kChunk;
      Chunk k = vectors(t, a.k, a.first_k, a.recent_k, a.dim, begin + c, some, chunk);
      for (int j = 0; j < some; j += 8) {
        int keys = some - j < 8 ? some - j : 8;
        Chunk eight = {k.rows + j * k.stride, k.stride};
        int r = 0;
        for (; r + 2 <= t.rows; r += 2) {
          dots<2>(q + r * a.dim, eight, keys, scores + r * kSplit + c + j);
        }
        if (r < t.rows) {
          dots<1>(q + r * a.dim, eight, keys, scores + r * kSplit + c + j);
        }
      }
    }
    for (int r = 0; r < t.rows; r++) {
      state[r] = weigh(t, r, begin, n, scores + r * kSplit);
    }
    std::memset(out, 0, sizeof(float) * t.rows * a.value_dim);
    for (int c = 0; c < n; c += kChunk) {
      int some = n - c < kChunk ? n - c : kChunk;
      add_values(t, vectors(t, a.v, a.first_v, a.recent_v, a.value_dim, begin + c, some, chunk),
          some, scores + c, out);
    }
  }

  void add_values(const Tile& t, Chunk v, int n, const float* weights, float* out) const {
    for (int d = 0; d < a.value_dim; d += 32) {
      int vectors = a.value_dim - d < 32 ? (a.value_dim - d) / 8 : 4;
      Chunk part = {v.rows + d, v.stride};
      for (int r = 0; r < t.rows; r += 4) {
        int rows = t.rows - r < 4 ? t.rows - r : 4;
        const float* p = weights + r * kSplit;
        float* o = out + r * a.value_dim + d;
        vectors == 4 ? rows == 4   ? weighted<4, 4>(p, part, n, o)
                       : rows == 3 ? weighted<3, 4>(p, part, n, o)
                       : rows == 2 ? weighted<2, 4>(p, part, n, o)
                                   : weighted<1, 4>(p, part, n, o)
                     : ragged(p, part, n, rows, vectors, o);
      }
    }
  }

  // scores[r, j] = q[r] . k[j] for eight keys and one or two rows.
  template <int ROWS>
  OPTIQ_INLINE void dots(const float* q, Chunk k, int keys, float* scores) const {
    f32x8 acc[ROWS][8] = {};
    const float* row[8];
    for (int j = 0; j < 8; j++) {
      row[j] = k.rows + (j < keys ? j : keys - 1) * k.stride;
    }
    for (int i = 0; i < a.dim; i += 8) {
      f32x8 qi[ROWS];
      for (int r = 0; r < ROWS; r++) {
        qi[r] = load<f32x8>(q + r * a.dim + i);
      }
      for (int j = 0; j < 8; j++) {
        f32x8 kj = load<f32x8>(row[j] + i);
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
      int end = a.keys - a.rows + i + 1 - begin, first = a.window ? end - a.window : 0;
      for (int j = 0; (first > 0 || end < n) && j < n; j++) {
        s[j] = j >= first && j < end ? s[j] : -kInfinity;
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

  // o[r, :] += sum_j p[r, j] v[j, :] for a few rows and a few vectors, all in registers.
  template <int ROWS, int VECTORS>
  OPTIQ_INLINE void weighted(const float* p, Chunk v, int n, float* o) const {
    f32x8 acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
      for (int d = 0; d < VECTORS; d++) {
        acc[r][d] = load<f32x8>(o + r * a.value_dim + 8 * d);
      }
    }
    for (int j = 0; j < n; j++) {
      f32x8 vj[VECTORS];
      for (int d = 0; d < VECTORS; d++) {
        vj[d] = load<f32x8>(v.rows + j * v.stride + 8 * d);
      }
      for (int r = 0; r < ROWS; r++) {
        f32x8 weight = splat(p[r * kSplit + j]);
        for (int d = 0; d < VECTORS; d++) {
          acc[r][d] += weight * vj[d];
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int d = 0; d < VECTORS; d++) {
        store(o + r * a.value_dim + 8 * d, acc[r][d]);
      }
    }
  }

  void ragged(const float* p, Chunk v, int n, int rows, int vectors, float* o) const {
    for (int r = 0; r < rows; r++) {
      for (int d = 0; d < vectors; d++) {
        Chunk part = {v.rows + 8 * d, v.stride};
        weighted<1, 1>(p + r * kSplit, part, n, o + r * a.value_dim + 8 * d);
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

  // A row that saw nothing is zero.
  void finish(const Tile& t, const Partial* all, const float* sums) const {
    for (int r = 0; r < t.rows; r++) {
      int h = head(t, r);
      float total = all[r].sum, factor = 1;
      if (a.sinks) {
        float m = a.sinks[h] > all[r].maximum ? a.sinks[h] : all[r].maximum;
        factor = exp_one(all[r].maximum - m);
        total = total * factor + exp_one(a.sinks[h] - m);
      }
      factor = total == 0 ? 0 : factor / total;
      size_t row = (size_t(t.batch) * a.rows + query(t, r)) * a.heads + h;
      for (int d = 0; d < a.value_dim; d += 8) {
        f32x8 y = load<f32x8>(sums + r * a.value_dim + d) * factor;
        char* out = static_cast<char*>(a.y) + (row * a.value_dim + d) * size_of(a.type);
        narrow(reinterpret_cast<float*>(&y), 8, out, a.type);
      }
    }
  }
};

inline void attention(const Attention& a) {
  int group = a.heads / a.kv_heads, all = group * a.rows;
  int height = all < kTileRows ? all : kTileRows, tiles = (all + height - 1) / height;
  int base = a.batch * a.kv_heads * tiles, splits = (a.keys + kSplit - 1) / kSplit;
  double flops = 2.0 * a.batch * a.heads * a.rows * a.keys * (a.dim + a.value_dim);
  bool serial = flops < kSerialFlops;
  bool split_up = !serial && splits > 1 && base < 4 * num_threads();
  size_t partials = split_up ? size_t(base) * splits * height : 1;
  Scratch<Partial> states(partials);
  Scratch<float> values(partials * a.value_dim);
  AttentionTiles work{a, group, height, tiles, splits, split_up, states, values};
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

} // namespace optiq::cpu::OPTIQ_ISA
