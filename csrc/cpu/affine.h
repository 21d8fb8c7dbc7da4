// y = x @ W.T for affine codes, any number of rows of x and several weights that share x.
//
//   y[m, n] = sum_g step[m, g] scale[n, g] (sum_{k in g} i[m, k] code[n, k]) + bias[n, g] sum[m, g]
//
// A tile is kWide rows of W, a row per lane. Its words are transposed and unpacked once: on the way
// for as many rows of x as are in flight, into memory for more. The inner sums are integers
// (fixed.h).
#pragma once

#include "fixed.h"
#include "pool.h"
#include "tiled.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

// Rows of x in flight, each with an accumulator in a register for each plane.
#if defined(__AVX512F__)
template <bool EXACT>
constexpr int kMostRows = EXACT ? 8 : 16;
#elif defined(__AVX2__) || defined(__aarch64__)
template <bool EXACT>
constexpr int kMostRows = 8;
#else // vectors are arrays, and code for many rows takes half of the time of the whole build
template <bool EXACT>
constexpr int kMostRows = 2;
#endif

// The number of rows for which code exists and `rows` fit.
constexpr int padded_rows(int rows) {
  return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : rows <= 12 ? 12 : 16;
}

// The next smaller one.
constexpr int fewer_rows(int rows) {
  return rows <= 4 ? rows - 1 : rows <= 8 ? rows - 2 : rows - 4;
}

// kWide rows of a weight. The last tile begins early where the rows do not fill it; of a weight
// with less than kWide rows each row is a tile by itself, in every lane.
struct Tile {
  const Weight& w;
  int first, lanes;
  const uint8_t* rows; // `stride` bytes apart
  size_t stride;
  float* scales; // [groups][kWide]
  float* biases;

  // Of a tiled weight: the words of group g, then its scales and biases.
  const uw* group(int g) const {
    return reinterpret_cast<const uw*>(rows) + g * vectors_of_group(w);
  }
  OPTIQ_INLINE void scale_and_bias(int g, fw& scale, fw& bias) const {
    if (!w.tiled) {
      scale = load<fw>(scales + size_t(g) * kWide);
      bias = load<fw>(biases + size_t(g) * kWide);
      return;
    }
    const uw* end = group(g + 1);
    switch (w.type) {
      case Float::f32:
        scale = fw(end[-2]);
        bias = fw(end[-1]);
        break;
      case Float::bf16:
        scale = fw(end[-1] << 16);
        bias = fw(end[-1] & 0xffff0000);
        break;
      case Float::f16:
        scale = from_f16(end[-1] & 0xffff);
        bias = from_f16(end[-1] >> 16);
        break;
    }
  }

  static int count(const Weight& w) {
    return w.rows < kWide ? w.rows : (w.rows + kWide - 1) / kWide;
  }

  Tile(const Weight& w, int index, float* scales, float* biases)
      : w(w), lanes(w.rows < kWide ? 1 : kWide), scales(scales), biases(biases) {
    if (w.tiled) {
      first = index * kWide;
      stride = w.groups() * vectors_of_group(w) * sizeof(uw) / kWide;
      rows = static_cast<const uint8_t*>(w.data) + size_t(first) * stride;
      return;
    }
    first = lanes == 1 ? index : (index + 1) * kWide < w.rows ? index * kWide : w.rows - kWide;
    rows = static_cast<const uint8_t*>(w.data) + size_t(first) * w.row_bytes();
    stride = lanes == 1 ? 0 : w.row_bytes();
    if (w.type == Float::f32) {
      for (auto [from, to] : {std::pair(w.scales, scales), {w.biases, biases}}) {
        auto* words = static_cast<const uint32_t*>(from);
        float* out = to; // a structured binding is not captured by every compiler
        lay([=](size_t i, int n) { return load_words(words + i, n); },
            [=](size_t at, uw values) { store(out + at, values); });
      }
      return;
    }
    // Of 16 bits: both are transposed at once, as the halves of a word.
    auto* scale = static_cast<const uint16_t*>(w.scales);
    auto* bias = static_cast<const uint16_t*>(w.biases);
    bool bf16 = w.type == Float::bf16;
    lay([=](size_t i, int n) { return load_halves(scale + i, n) | load_halves(bias + i, n) << 16; },
        [=](size_t at, uw both) {
          store(scales + at, bf16 ? fw(both << 16) : from_f16(both & 0xffff));
          store(biases + at, bf16 ? fw(both & 0xffff0000) : from_f16(both >> 16));
        });
  }

 private:
  // load(i, n): words of n groups from the i-th value on; keep(at, words): those of one group for
  // all rows, which go to the at-th place.
  template <class Load, class Keep>
  void lay(Load&& load, Keep&& keep) const {
    int groups = w.groups();
    for (int g = 0; g < groups; g += kWide) {
      uw block[kWide];
      for (int r = 0; r < kWide; r++) {
        block[r] = load(size_t(first + (lanes == 1 ? 0 : r)) * groups + g, groups - g);
      }
      transpose(block);
      for (int j = 0; j < kWide && g + j < groups; j++) {
        keep(size_t(g + j) * kWide, block[j]);
      }
    }
  }
};

// What a group adds to y: all that is rounded of a product, so it is one function, or a row's bits
// would depend on the number of rows beside it.
template <bool EXACT>
OPTIQ_INLINE void add_group(fw& y, PlaneSums products, fw scale, fw bias, float step, float sum) {
  y += bias * sum;
  y += to_float<EXACT>(products) * scale * step;
}

// Asks for a stretch of memory bit by bit, while something else is computed in `steps` steps. The
// rows of a tile are too many streams for the processor to foresee, and without this a weight that
// comes from memory takes up to three times as long.
class Prefetch {
 public:
  // As many bytes as the tile has, from the next one on, in `steps`; from nearer on where all is in
  // reading order.
  Prefetch(const Tile& tile, size_t steps) {
    size_t bytes = kWide * tile.stride;
    at_ = tile.rows + (tile.w.tiled ? kAhead : bytes);
    end_ = bytes <= kMost ? at_ + bytes : at_;
    each_ = (bytes / 64 + steps) / steps * 64;
  }

  OPTIQ_INLINE void some() {
    const uint8_t* until = at_ + each_ < end_ ? at_ + each_ : end_;
    for (; at_ < until; at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  // Larger ones push what is in use out of the first-level cache, and gain nothing.
  static constexpr size_t kMost = 1 << 15;
  static constexpr size_t kAhead = 6 << 10;
  const uint8_t* at_;
  const uint8_t* end_;
  size_t each_;
};

// The codes of a tile, from words that are transposed when they are needed.
template <int BITS, int CODES>
class PackedCodes {
 public:
  static constexpr int kStep = BITS; // words of a unit

  // `words` has room for all of them, in whole blocks.
  PackedCodes(const Tile& tile, uw* words)
      : tile_(tile), words_(words), count_(tile.w.cols / 32 * BITS) {}

  OPTIQ_INLINE const uw* group(int g, int units) {
    return ready((g + 1) * units * kStep) + g * units * kStep;
  }
  // Makes the first `count` words ready.
  OPTIQ_INLINE const uw* ready(int count) {
    for (; ready_ < count; ready_ += kBlock) {
      transpose_words(
          tile_.rows + 4 * size_t(ready_), tile_.stride, count_ - ready_, words_ + ready_);
    }
    return words_;
  }
  template <int I>
  OPTIQ_INLINE static uw vector(const uw* unit) {
    return unpack<BITS, CODES, I>(unit);
  }
  void unpack_all(uw* vectors) {
    const uw* words = ready(count_);
    for (int at = 0; at < count_; at += BITS, vectors += kVectors<CODES>) {
      unrolled<kVectors<CODES>>([&](auto i) __attribute__((always_inline)) {
        vectors[i] = unpack<BITS, CODES, i>(words + at);
      });
    }
  }

 private:
  const Tile& tile_;
  uw* words_;
  int count_, ready_ = 0;
};

// The codes of a tile of a tiled weight.
template <int BITS, int CODES>
class TiledCodes {
 public:
  static constexpr int kStep = BITS;

  explicit TiledCodes(const Tile& tile) : tile_(tile) {}

  OPTIQ_INLINE const uw* group(int g, int) const {
    return tile_.group(g);
  }
  template <int I>
  OPTIQ_INLINE static uw vector(const uw* unit) {
    return unpack<BITS, CODES, I>(unit);
  }
  void unpack_all(uw* vectors) {
    int groups = int(tile_.w.groups()), units = tile_.w.format.group_size / kUnit;
    for (int g = 0; g < groups; g++) {
      const uw* words = group(g, units);
      for (int u = 0; u < units; u++, words += BITS, vectors += kVectors<CODES>) {
        unrolled<kVectors<CODES>>([&](auto i) __attribute__((always_inline)) {
          vectors[i] = unpack<BITS, CODES, i>(words);
        });
      }
    }
  }

 private:
  const Tile& tile_;
};

// The same once they are unpacked, for many rows of x.
template <int CODES>
class UnpackedCodes {
 public:
  static constexpr int kStep = kVectors<CODES>;

  explicit UnpackedCodes(const uw* vectors) : vectors_(vectors) {}

  OPTIQ_INLINE const uw* group(int g, int units) const {
    return vectors_ + g * units * kStep;
  }
  template <int I>
  OPTIQ_INLINE static uw vector(const uw* unit) {
    return unit[I];
  }

 private:
  const uw* vectors_;
};

// ROWS rows of x times one tile, into out[row].
template <int ROWS, bool EXACT, class Codes>
void multiply(const Tile& tile, Codes& codes, const FixedRows& x, fw* out) {
  constexpr int planes = kPlanes<EXACT>, vectors = kVectors<kCodes<EXACT>>;
  // Sums in flight hide the latency of one.
  constexpr int chains = ROWS * planes < 4 ? 4 / (ROWS * planes) : 1;
  const int groups = int(tile.w.groups()), units = tile.w.format.group_size / kUnit;
  fw y[ROWS] = {};
  const int32_t* words = x.words;
  Prefetch next_tile(tile, groups * units);
  for (int g = 0; g < groups; g++) {
    const uw* unit = codes.group(g, units);
    iw acc[ROWS][planes][chains] = {};
    for (int u = 0; u < units; u++, unit += Codes::kStep, words += vectors * planes * ROWS) {
      next_tile.some();
      unrolled<vectors>([&](auto i) __attribute__((always_inline)) {
        uw vector = Codes::template vector<i>(unit);
#pragma GCC unroll 24
        for (int j = 0; j < ROWS * planes; j++) {
          iw& sum = acc[j / planes][j % planes][i % chains];
          sum = dot<EXACT>(sum, vector, splat(words[j * vectors + i]));
        }
      });
    }
    fw scale, bias;
    tile.scale_and_bias(g, scale, bias);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      iw sums[planes];
      for (int p = 0; p < planes; p++) {
        sums[p] = acc[r][p][0];
        for (int c = 1; c < chains; c++) {
          sums[p] += acc[r][p][c];
        }
      }
      add_group<EXACT>(
          y[r], joined<EXACT>(sums), scale, bias, x.step[g * ROWS + r], x.sum[g * ROWS + r]);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    out[r] = y[r];
  }
}

// Adds 16 bytes of each row of a tile, in the 128-bit pieces of words[0..4), to the sums.
template <int BITS, bool EXACT>
OPTIQ_INLINE void add_quads(const uw* words, const int32_t* x, iw (*acc)[4]) {
  constexpr int codes_each = kCodes<EXACT>;
#pragma GCC unroll 4
  for (int i = 0; i < kSlot<codes_each> / BITS; i++) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      uw codes = codes_at<BITS, codes_each>(words[s], i * BITS);
      for (int p = 0; p < kPlanes<EXACT>; p++) {
        iw at = splat_quad(x + p * kVectors<codes_each> + 4 * i);
        acc[p][s] = dot<EXACT>(acc[p][s], codes, at);
      }
    }
  }
}

// One row of x times one tile, for codes that do not straddle words: 16 bytes of each row in a
// 128-bit piece of a vector need no transposing, only its four lanes be added up per group.
// QUADS: times 16 bytes in a group.
template <int BITS, int QUADS, bool EXACT>
fw multiply_one(const Tile& tile, const FixedRows& x) {
  constexpr int planes = kPlanes<EXACT>, vectors = kVectors<kCodes<EXACT>>;
  constexpr int kStep = kWide / 4;  // quads of a row in a vector
  constexpr int in_unit = BITS / 4; // quads
  const int groups = int(tile.w.groups());
  const uint8_t* row = tile.rows;
  fw y = {};
  iw acc[planes][4] = {};
  auto finish = [&](int g) __attribute__((always_inline)) {
    fw scale = load<fw>(tile.scales + size_t(g) * kWide);
    fw bias = load<fw>(tile.biases + size_t(g) * kWide);
    iw sums[planes];
    for (int p = 0; p < planes; p++) {
      sums[p] = sum_quads(acc[p]);
    }
    add_group<EXACT>(y, joined<EXACT>(sums), scale, bias, x.step[g], x.sum[g]);
    for (auto& plane : acc) {
      for (iw& a : plane) {
        a = iw{};
      }
    }
  };
  int done = 0; // quads
  auto activations = [&](int quad) __attribute__((always_inline)) {
    return x.words + quad / in_unit * vectors * planes + quad % in_unit * (vectors / in_unit);
  };
  Prefetch next_tile(tile, groups * QUADS);
  // Whole cache lines of the rows: with rows a power of two apart, 16 bytes of each in turn would
  // drive each other's lines out of the cache.
  for (int left = groups * QUADS; left >= kStep; left -= kStep, row += 16 * kStep) {
    uw words[4][kStep];
    for (int s = 0; s < 4; s++) {
      load_quads(row + s * tile.stride, 4 * tile.stride, words[s]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kStep; q++) {
      next_tile.some();
      uw at[4] = {words[0][q], words[1][q], words[2][q], words[3][q]};
      add_quads<BITS, EXACT>(at, activations(done), acc);
      if (++done % QUADS == 0) {
        finish(done / QUADS - 1);
      }
    }
  }
  for (; done < groups * QUADS; row += 16) {
    uw at[4];
    for (int s = 0; s < 4; s++) {
      at[s] = load_quads(row + s * tile.stride, 4 * tile.stride);
    }
    add_quads<BITS, EXACT>(at, activations(done), acc);
    if (++done % QUADS == 0) {
      finish(done / QUADS - 1);
    }
  }
  return y;
}

template <int BITS, bool EXACT>
fw multiply_one(const Tile& tile, const FixedRows& x) {
  switch (BITS * tile.w.format.group_size / 128) {
    case 1:
      return multiply_one<BITS, 1, EXACT>(tile, x);
    case 2:
      return multiply_one<BITS, 2, EXACT>(tile, x);
    case 4:
      return multiply_one<BITS, 4, EXACT>(tile, x);
    default:
      return multiply_one<BITS, 8, EXACT>(tile, x);
  }
}

template <bool EXACT, class Codes, int ROWS = kMostRows<EXACT>>
void multiply(int rows, const Tile& tile, Codes& codes, const FixedRows& x, fw* out) {
  if (rows == ROWS) {
    multiply<ROWS, EXACT, Codes>(tile, codes, x, out);
  } else if constexpr (ROWS > 1) {
    multiply<EXACT, Codes, fewer_rows(ROWS)>(rows, tile, codes, x, out);
  }
}

// All rows of x in fixed point, in blocks of as many as are in flight.
class FixedMatrix {
 public:
  FixedMatrix(const float* x, int rows, const Weight& w)
      : exact(w.exact),
        format_(w.format),
        rows_(rows),
        cols_(w.cols),
        x_(x),
        padded_((rows - 1) / most() * most() + padded_rows((rows - 1) % most() + 1)),
        words_(words_before(padded_)),
        step_(w.groups() * padded_),
        sum_(w.groups() * padded_) {
    auto fix = [this](int i) {
      at_width(format_.bits, [&]<int BITS>(Width<BITS>) {
        at_precision(this->exact, [&]<bool EXACT>(std::bool_constant<EXACT>) {
          fix_rows<BITS, EXACT>(
              x_ + size_t(i) * most() * cols_, rows_in(i), cols_, format_.group_size, block(i));
        });
      });
    };
    if (rows <= 16) {
      for (int i = 0; i < blocks(); i++) {
        fix(i);
      }
    } else {
      parallel_for(blocks(), fix);
    }
  }

  const bool exact;

  bool fits(const Weight& w) const {
    return w.format == format_ && w.exact == exact;
  }
  int most() const { // rows of a block
    return exact ? kMostRows<true> : kMostRows<false>;
  }
  int blocks() const {
    return (rows_ + most() - 1) / most();
  }
  int rows_in(int block) const {
    int left = rows_ - block * most();
    return left < most() ? left : most();
  }
  FixedRows block(int i) {
    size_t before = size_t(i) * most(), groups = cols_ / format_.group_size;
    return {words_ + words_before(int(before)), step_ + groups * before, sum_ + groups * before,
        padded_rows(rows_in(i))};
  }

 private:
  size_t words_before(int rows) const {
    return exact ? FixedRows::word_count<true>(cols_, rows)
                 : FixedRows::word_count<false>(cols_, rows);
  }

  AffineFormat format_;
  int rows_, cols_;
  const float* x_;
  int padded_;
  Scratch<int32_t> words_;
  Scratch<float> step_, sum_;
};

} // namespace optiq::cpu::OPTIQ_ISA
