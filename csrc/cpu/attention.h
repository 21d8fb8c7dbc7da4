// Softmax attention over a cache in place, for one query (decode) as for many (prefill).
//
// All query heads of a key head are rows that share each key and value read, and decoded where the
// cache holds records. The keys are cut into fixed splits from the first one of a batch entry on;
// each split gives a maximum, a sum and a weighted value per row, and splits are merged in order.
// So a row's result depends neither on the rows beside it, nor on padding, nor on the threads.
#pragma once

#include "kl_logits.h" // tanh
#include "kv_read.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kSplit = 128;    // keys
constexpr int kChunk = 32;     // values that are decoded at a time
constexpr int kTileRows = 32;  // query rows that share the keys read, at most
constexpr int kWholeTiles = 8; // per thread, from which on the tasks are tiles and not splits
// Query rows of a product that fills the registers with its four sums per row.
#if defined(__AVX512F__)
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif
constexpr float kExcluded = -__FLT_MAX__; // as mx.fast.scaled_dot_product_attention masks
constexpr float kInfinity = __builtin_inff();

OPTIQ_INLINE float exp_one(float x) {
  return exp_negative(splat(x))[0];
}

// What a row knows after some of its keys: the output is value / sum.
struct Partial {
  float maximum, sum;
};

struct AttentionTiles {
  const Attention& a;
  int group;       // query heads per key head
  int height;      // rows of a tile
  int tiles;       // per batch entry and key head
  int splits;      // of the keys
  bool split_up;   // a task is one split, and the last one of a tile merges all
  Partial* states; // [tasks, height], when split up
  float* values;   // [tasks, height, width]
  int* done;       // [tiles], tasks of each
  int width;       // padded value_dim

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
    int index = split_up ? task / splits : task;
    Tile t = tile(index);
    int split = split_up ? task % splits : t.first;
    if (split < t.first || split > t.last) {
      return;
    }
    Scratch<float> memory(room_size());
    Room own = room(memory);
    gather(t, own.q);
    if (split_up) {
      size_t at = size_t(task) * height;
      partial(t, split, own, states + at, values + at * width);
      if (__atomic_add_fetch(done + index, 1, __ATOMIC_ACQ_REL) == t.last - t.first + 1) {
        combine(index, t);
      }
      return;
    }
    Partial all[kTileRows], one[kTileRows];
    partial(t, split, own, all, own.sums);
    for (int s = split + 1; s <= t.last; s++) {
      partial(t, s, own, one, own.next);
      merge(t, all, own.sums, one, own.next);
    }
    finish(t, all, own.sums);
  }

 private:
  // The splits of a tile in order, whoever was the last.
  void combine(int index, const Tile& t) {
    size_t at = (size_t(index) * splits + t.first) * height;
    for (int s = 1; s <= t.last - t.first; s++) {
      size_t next = at + size_t(s) * height;
      merge(t, states + at, values + at * width, states + next, values + next * width);
    }
    finish(t, states + at, values + at * width);
  }

  // Where a task works: pieces of one allocation.
  struct Room {
    float* q;           // [height, dim], scaled
    float* columns;     // [dim, kWide]: some keys
    float* chunk;       // [kChunk, padded dim or width]: some keys or values
    float* scores;      // [height, kSplit]
    float *sums, *next; // [height, width]
  };

  size_t room_size() const {
    size_t widest = padded(a.dim) > width ? padded(a.dim) : width;
    return height * (size_t(a.dim) + kSplit + 2 * width) + kChunk * widest + kWide * a.dim;
  }

  Room room(float* at) const {
    auto take = [&](size_t n) {
      at += n;
      return at - n;
    };
    Room r;
    r.columns = take(size_t(kWide) * a.dim);
    r.scores = take(size_t(height) * kSplit);
    r.sums = take(size_t(height) * width);
    r.next = take(size_t(height) * width);
    r.q = take(size_t(height) * a.dim);
    r.chunk = at;
    return r;
  }

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

  size_t place(const Tile& t, const Vectors& x, int token) const {
    return t.batch * x.batch + t.kv_head * x.head + size_t(token) * x.row;
  }

  // Asks for kWide keys before they are used. The processor foresees them only within a page of
  // memory, which is 16 keys of 64 floats.
  OPTIQ_INLINE void ask_for_keys(const Tile& t, int begin, int end) const {
    constexpr size_t kMost = 1 << 14; // more bytes are rows with something else between them
    size_t element = a.k.format.dense() ? size_of(a.k.type) : sizeof(uint32_t);
    int n = end - begin < kWide ? end - begin : kWide;
    size_t bytes = n > 0 ? n * a.k.row * element : 0;
    auto* at = static_cast<const char*>(a.k.data) + place(t, a.k, begin) * element;
    for (size_t i = 0; i < bytes && bytes <= kMost; i += 64) {
      __builtin_prefetch(at + i, 0, 2);
    }
  }

  // Whether the exact vectors are others than these.
  bool uniform(const Tile& t, int begin, int end) const {
    return begin >= t.start + a.first && end <= a.keys - a.recent;
  }

  // Keys or values of the tile from the begin-th on, rows or in `out`.
  Chunk vectors(const Tile& t, const Vectors& x, const Vectors& first, const Vectors& recent,
      int dim, int begin, int n, float* out) const {
    size_t stride = padded(dim);
    if (stride > size_t(dim)) {
      std::memset(out, 0, sizeof(float) * n * stride);
    }
    if (uniform(t, begin, begin + n)) {
      if (x.format.dense() && x.type != Float::bf16 && stride == size_t(dim)) {
        return {
            static_cast<const char*>(x.data) + place(t, x, begin) * size_of(x.type), x.row, x.type};
      }
      decode(x, place(t, x, begin), n, dim, out);
      return {out, stride, Float::f32};
    }
    int exact = t.start + a.first, inexact = a.keys - a.recent;
    for (int j = begin; j < begin + n; j++) {
      bool late = j >= inexact, early = j < exact;
      const Vectors& from = late ? recent : early ? first : x;
      int token = j - (late ? inexact : early ? t.start : 0);
      decode(from, place(t, from, token), 1, dim, out + (j - begin) * stride);
    }
    return {out, stride, Float::f32};
  }

  // kWide keys or fewer, a key per column.
  void key_columns(const Tile& t, int begin, int n, const Room& room) const {
    if (a.k.format.dense() || !uniform(t, begin, begin + n)) {
      Chunk rows = vectors(t, a.k, a.first_k, a.recent_k, a.dim, begin, n, room.chunk);
      return of_type(
          rows, [&]<Float TYPE>() { transpose_rows<TYPE>(rows, n, a.dim, room.columns); });
    }
    at_width(a.k.format.bits, [&]<int BITS>(Width<BITS>) {
      auto* records = static_cast<const uint32_t*>(a.k.data) + place(t, a.k, begin);
      unpack_keys<BITS>(records, a.k.row, n, a.dim, a.k.format.group_size, room.columns);
    });
  }

  // out[r, :] = softmax-weighted values of one split, not yet divided by the sum.
  void partial(const Tile& t, int split, const Room& room, Partial* state, float* out) const {
    int begin = t.start + split * kSplit;
    int n = t.end - begin < kSplit ? t.end - begin : kSplit;
    n = n < 0 ? 0 : n;
    int ours = split_up ? begin + n : t.end; // keys beyond it are read by other tasks
    for (int j = 0; j < n; j += kWide) {
      ask_for_keys(t, begin + j + 2 * kWide, ours);
      key_columns(t, begin + j, n - j < kWide ? n - j : kWide, room);
      for (int r = 0; r < t.rows; r += kDotRows) {
        dot_rows(t.rows - r < kDotRows ? t.rows - r : kDotRows, room.q + r * a.dim, room.columns,
            room.scores + r * kSplit + j);
      }
    }
    for (int r = 0; r < t.rows; r++) {
      state[r] = weigh(t, r, begin, n, room.scores + r * kSplit);
    }
    std::memset(out, 0, sizeof(float) * t.rows * width);
    for (int c = 0; c < n; c += kChunk) {
      int some = n - c < kChunk ? n - c : kChunk;
      Chunk v = vectors(t, a.v, a.first_v, a.recent_v, a.value_dim, begin + c, some, room.chunk);
      of_type(v, [&]<Float TYPE>() { add_values<TYPE>(t, v, some, room.scores + c, out); });
    }
  }

  OPTIQ_INLINE void dot_rows(int rows, const float* q, const float* columns, float* scores) const {
    rows == 1   ? dots<1>(q, columns, scores)
    : rows == 2 ? dots<2>(q, columns, scores)
    : rows == 3 ? dots<kDotRows == 4 ? 3 : 2>(q, columns, scores)
                : dots<kDotRows>(q, columns, scores);
  }

  // scores[r, 0:kWide] = q[r] . keys, always the same four sums.
  template <int ROWS>
  OPTIQ_INLINE void dots(const float* q, const float* columns, float* scores) const {
    fw acc[ROWS][4] = {};
    for (int i = 0; i < a.dim; i += 4) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        fw k = load<fw>(columns + size_t(i + c) * kWide);
        for (int r = 0; r < ROWS; r++) {
          acc[r][c] += q[r * a.dim + i + c] * k;
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      store(scores + r * kSplit, (acc[r][0] + acc[r][2]) + (acc[r][1] + acc[r][3]));
    }
  }

  template <Float TYPE>
  void add_values(const Tile& t, Chunk v, int n, const float* weights, float* out) const {
    for (int d = 0; d < width; d += 4 * kWide) {
      int vectors = width - d < 4 * kWide ? (width - d) / kWide : 4;
      Chunk part = {static_cast<const char*>(v.rows) + d * size_of(TYPE), v.stride, TYPE};
      for (int r = 0; r < t.rows; r += 4) {
        int rows = t.rows - r < 4 ? t.rows - r : 4;
        const float* p = weights + r * kSplit;
        float* o = out + r * width + d;
        vectors == 4 ? rows == 4   ? weighted<TYPE, 4, 4>(p, part, n, o)
                       : rows == 3 ? weighted<TYPE, 3, 4>(p, part, n, o)
                       : rows == 2 ? weighted<TYPE, 2, 4>(p, part, n, o)
                                   : weighted<TYPE, 1, 4>(p, part, n, o)
                     : ragged<TYPE>(p, part, n, rows, vectors, o);
      }
    }
  }

  // Scores become exp(score - maximum), the excluded ones and those past n zero.
  Partial weigh(const Tile& t, int r, int begin, int n, float* s) const {
    int padded = (n + kWide - 1) / kWide * kWide, i = query(t, r);
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
    fw largest = fw{} - kInfinity, sums = {};
    for (int j = 0; j < padded; j += kWide) {
      largest = max(largest, load<fw>(s + j));
    }
    float m = largest[0];
    for (int j = 1; j < kWide; j++) {
      m = largest[j] > m ? largest[j] : m;
    }
    for (int j = 0; j < padded; j += kWide) {
      fw p = exp_negative(load<fw>(s + j) - m);
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
  template <Float TYPE, int ROWS, int VECTORS>
  OPTIQ_INLINE void weighted(const float* p, Chunk v, int n, float* o) const {
    fw acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
      for (int d = 0; d < VECTORS; d++) {
        acc[r][d] = load<fw>(o + r * width + kWide * d);
      }
    }
    for (int j = 0; j < n; j++) {
      fw vj[VECTORS];
      for (int d = 0; d < VECTORS; d++) {
        vj[d] = load_wide<TYPE>(v.rows, j * v.stride + kWide * d);
      }
      for (int r = 0; r < ROWS; r++) {
        for (int d = 0; d < VECTORS; d++) {
          acc[r][d] += p[r * kSplit + j] * vj[d];
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int d = 0; d < VECTORS; d++) {
        store(o + r * width + kWide * d, acc[r][d]);
      }
    }
  }

  template <Float TYPE>
  void ragged(const float* p, Chunk v, int n, int rows, int vectors, float* o) const {
    for (int r = 0; r < rows; r++) {
      for (int d = 0; d < vectors; d++) {
        Chunk part = {static_cast<const char*>(v.rows) + kWide * d * size_of(TYPE), v.stride, TYPE};
        weighted<TYPE, 1, 1>(p + r * kSplit, part, n, o + r * width + kWide * d);
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
      float* y = sums + r * width;
      for (int d = 0; d < width; d += kWide) {
        fw more = load<fw>(next + r * width + d) * take;
        store(y + d, load<fw>(y + d) * keep + more);
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
        f32x8 y = load<f32x8>(sums + r * width + d) * factor;
        char* out = static_cast<char*>(a.y) + (row * a.value_dim + d) * size_of(a.type);
        narrow(reinterpret_cast<float*>(&y), 8, out, a.type);
      }
    }
  }
};

// Where the tasks of one of several attentions begin, and the partial results of its splits.
struct AttentionShare {
  int tasks, tiles_before;
  size_t partials; // before it
  int base;        // tiles in all batch entries and key heads
  int height, tiles, splits;
  bool split_up;
};

// `count` of them in one pass, so that sequences with caches of their own keep all threads busy.
// All have the same dtypes and value_dim.
inline void attention(const Attention* all, int count) {
  Scratch<AttentionShare> shares(count + 1);
  double flops = 0;
  int base = 0;
  for (int i = 0; i < count; i++) {
    const Attention& a = all[i];
    AttentionShare& s = shares[i];
    int rows = a.heads / a.kv_heads * a.rows;
    s.tiles = (rows + kTileRows - 1) / kTileRows;
    s.height = (rows + s.tiles - 1) / s.tiles;
    s.height = s.tiles > 1 ? (s.height + kDotRows - 1) / kDotRows * kDotRows : s.height;
    s.splits = (a.keys + kSplit - 1) / kSplit;
    s.base = a.batch * a.kv_heads * s.tiles;
    s.tiles_before = base;
    base += s.base;
    flops += 2.0 * a.batch * a.heads * a.rows * a.keys * (a.dim + a.value_dim);
  }
  bool serial = flops < kSerialFlops;
  int tasks = 0;
  size_t partials = 0;
  for (int i = 0; i < count; i++) {
    AttentionShare& s = shares[i];
    s.split_up = !serial && s.splits > 1 && base < kWholeTiles * num_threads();
    s.tasks = tasks;
    s.partials = partials;
    tasks += s.split_up ? s.base * s.splits : s.base;
    partials += s.split_up ? size_t(s.base) * s.splits * s.height : 0;
  }
  shares[count].tasks = tasks;
  int width = padded(all[0].value_dim);
  Scratch<Partial> states(partials + 1);
  Scratch<float> values(partials * width + 1);
  Scratch<int> done(base);
  std::memset(done, 0, sizeof(int) * base);
  auto work = [&](int i) {
    const AttentionShare& s = shares[i];
    int group = all[i].heads / all[i].kv_heads;
    return AttentionTiles{all[i], group, s.height, s.tiles, s.splits, s.split_up,
        states + s.partials, values + s.partials * width, done + s.tiles_before, width};
  };
  auto run = [&](int task) {
    int i = 0;
    while (task >= shares[i + 1].tasks) {
      i++;
    }
    work(i)(task - shares[i].tasks);
  };
  if (serial) {
    for (int task = 0; task < tasks; task++) {
      run(task);
    }
    return;
  }
  parallel_for(tasks, run);
}

} // namespace optiq::cpu::OPTIQ_ISA
