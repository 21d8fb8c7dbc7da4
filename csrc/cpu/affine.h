// y = x @ W.T for affine codes, any number of rows of x and several weights that share x.
//
//   y[m, n] = sum_g step[m, g] scale[n, g] (sum_{k in g} i[m, k] code[n, k]) + bias[n, g] sum[m, g]
//
// A tile is kWide rows of W, a row per lane. Its words are transposed and unpacked once for up to
// kMostRows rows of x, and the inner sums are integers (fixed.h).
#pragma once

#include "fixed.h"
#include "pool.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

// Rows of x in flight, each with an accumulator in a register.
#if defined(__AVX512F__)
constexpr int kMostRows = 16;
#else
constexpr int kMostRows = 8;
#endif

// The number of rows for which code exists and `rows` fit.
constexpr int padded_rows(int rows) {
  return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : rows <= 12 ? 12 : 16;
}

// Words of the groups that are transposed together.
template <int BITS>
constexpr int kLongestSpan =
    least_multiple_of_block(BITS) > 4 * BITS ? least_multiple_of_block(BITS) : 4 * BITS;

// kWide rows of a weight. The last tile begins early where the rows do not fill it; of a weight
// with less than kWide rows each row is a tile by itself, in every lane.
struct Tile {
  const Weight& w;
  int first, lanes;
  const uint8_t* rows; // `stride` bytes apart
  size_t stride;
  float* scales; // [groups][kWide]
  float* biases;

  static int count(const Weight& w) {
    return w.rows < kWide ? w.rows : (w.rows + kWide - 1) / kWide;
  }

  Tile(const Weight& w, int index, float* scales, float* biases)
      : w(w), lanes(w.rows < kWide ? 1 : kWide), scales(scales), biases(biases) {
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
OPTIQ_INLINE void add_group(fw& y, iw products, fw scale, fw bias, float step, float sum) {
  y += bias * sum;
  y += __builtin_convertvector(products, fw) * scale * step;
}

// Asks for a stretch of memory bit by bit, while something else is computed in `steps` steps. The
// rows of a tile are too many streams for the processor to foresee, and without this a weight that
// comes from memory takes up to three times as long.
class Prefetch {
 public:
  // The tile after this one, in `steps`.
  Prefetch(const Tile& tile, size_t steps) : at_(tile.rows + kWide * tile.stride) {
    size_t bytes = kWide * tile.stride;
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
  const uint8_t* at_;
  const uint8_t* end_;
  size_t each_;
};

// ROWS rows of x times one tile, into out[row].
template <int BITS, int ROWS>
void multiply(const Tile& tile, const FixedRows& x, fw* out) {
  constexpr int chains = ROWS < 4 ? 4 / ROWS : 1; // sums in flight hide the latency of one
  const Weight& w = tile.w;
  const int words = BITS * w.format.group_size / 32; // of a group
  const int span = least_multiple_of_block(words), units = w.format.group_size / kUnit;
  const int groups = w.groups(), row_words = w.cols / 32 * BITS;
  uw transposed[kLongestSpan<BITS>];
  fw y[ROWS] = {};
  const int32_t* pairs = x.pairs;
  Prefetch next_tile(tile, groups * units);
  for (int g = 0, first = 0; g < groups; first += span) {
    int left = row_words - first, count = left < span ? left : span;
    transpose_words(tile.rows + 4 * size_t(first), tile.stride, count, left, transposed);
    for (const uw* at = transposed; at < transposed + count; g++) {
      iw acc[ROWS][chains] = {};
      for (int u = 0; u < units; u++, at += BITS) {
        next_tile.some();
#pragma GCC unroll 16
        for (int i = 0; i < kPairs; i++) {
          iw codes = unpack<BITS>(at, i);
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++) {
            acc[r][i % chains] = dot_pairs(acc[r][i % chains], codes, splat(pairs[r * kPairs + i]));
          }
        }
        pairs += kPairs * ROWS;
      }
      fw scale = load<fw>(tile.scales + size_t(g) * kWide);
      fw bias = load<fw>(tile.biases + size_t(g) * kWide);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        iw sum = acc[r][0];
        for (int c = 1; c < chains; c++) {
          sum += acc[r][c];
        }
        add_group(y[r], sum, scale, bias, x.step[g * ROWS + r], x.sum[g * ROWS + r]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    out[r] = y[r];
  }
}

// Adds 16 bytes of each row of a tile, in the 128-bit pieces of words[0..4), to the sums.
template <int BITS>
OPTIQ_INLINE void add_quads(const uw* words, const int32_t* pairs, iw* acc) {
#pragma GCC unroll 4
  for (int i = 0; i < 16 / BITS; i++) {
    iw x = splat_quad(pairs + 4 * i);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      acc[s] = dot_pairs(acc[s], codes_at<BITS>(words[s], i * BITS), x);
    }
  }
}

// One row of x times one tile, for codes that do not straddle words: 16 bytes of each row in a
// 128-bit piece of a vector need no transposing, only its four lanes be added up per group.
// QUADS: times 16 bytes in a group.
template <int BITS, int QUADS>
fw multiply_one(const Tile& tile, const FixedRows& x) {
  constexpr int kStep = kWide / 4; // quads of a row in a vector
  constexpr int kQuadPairs = 16 / BITS * 4;
  const int groups = tile.w.groups();
  const int32_t* pairs = x.pairs;
  const uint8_t* row = tile.rows;
  fw y = {};
  iw acc[4] = {};
  auto finish = [&](int g) __attribute__((always_inline)) {
    fw scale = load<fw>(tile.scales + size_t(g) * kWide);
    fw bias = load<fw>(tile.biases + size_t(g) * kWide);
    add_group(y, sum_quads(acc), scale, bias, x.step[g], x.sum[g]);
    for (iw& a : acc) {
      a = iw{};
    }
  };
  int g = 0, quad = 0; // the group, and the quads of it that are done
  Prefetch next_tile(tile, groups * QUADS);
  // Whole cache lines of the rows: with rows a power of two apart, 16 bytes of each in turn would
  // drive each other's lines out of the cache.
  for (int left = groups * QUADS; left >= kStep; left -= kStep, row += 16 * kStep) {
    uw words[4][kStep];
    for (int s = 0; s < 4; s++) {
      load_quads(row + s * tile.stride, 4 * tile.stride, words[s]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kStep; q++, pairs += kQuadPairs) {
      next_tile.some();
      uw at[4] = {words[0][q], words[1][q], words[2][q], words[3][q]};
      add_quads<BITS>(at, pairs, acc);
      if (QUADS <= kStep && (q + 1) % QUADS == 0) {
        finish(g++);
      }
    }
    if (QUADS > kStep && (quad += kStep) == QUADS) {
      finish(g++);
      quad = 0;
    }
  }
  for (; g < groups; g++) {
    for (int q = 0; q < QUADS; q++, row += 16, pairs += kQuadPairs) {
      uw at[4];
      for (int s = 0; s < 4; s++) {
        at[s] = load_quads(row + s * tile.stride, 4 * tile.stride);
      }
      add_quads<BITS>(at, pairs, acc);
    }
    finish(g);
  }
  return y;
}

template <int BITS>
fw multiply_one(const Tile& tile, const FixedRows& x) {
  switch (BITS * tile.w.format.group_size / 128) {
    case 1:
      return multiply_one<BITS, 1>(tile, x);
    case 2:
      return multiply_one<BITS, 2>(tile, x);
    case 4:
      return multiply_one<BITS, 4>(tile, x);
    default:
      return multiply_one<BITS, 8>(tile, x);
  }
}

template <int BITS>
void multiply(int rows, const Tile& tile, const FixedRows& x, fw* out) {
  switch (rows) {
    case 1:
      if constexpr (kWholeWords<BITS>) {
        *out = multiply_one<BITS>(tile, x);
        return;
      } else {
        return multiply<BITS, 1>(tile, x, out);
      }
    case 2:
      return multiply<BITS, 2>(tile, x, out);
    case 3:
      return multiply<BITS, 3>(tile, x, out);
    case 4:
      return multiply<BITS, 4>(tile, x, out);
    case 6:
      return multiply<BITS, 6>(tile, x, out);
    case 8:
      return multiply<BITS, 8>(tile, x, out);
#if defined(__AVX512F__)
    case 12:
      return multiply<BITS, 12>(tile, x, out);
    case 16:
      return multiply<BITS, 16>(tile, x, out);
#endif
  }
}

// All rows of x in fixed point, in blocks of kMostRows.
class FixedMatrix {
 public:
  FixedMatrix(const float* x, int rows, const Weight& w)
      : format_(w.format),
        rows_(rows),
        cols_(w.cols),
        x_(x),
        padded_((rows - 1) / kMostRows * kMostRows + padded_rows((rows - 1) % kMostRows + 1)),
        pairs_(FixedRows::pair_count(w.cols, padded_)),
        step_(w.groups() * padded_),
        sum_(w.groups() * padded_) {
    auto fix = [this](int i) {
      at_width(format_.bits, [&]<int BITS>(Width<BITS>) {
        fix_rows<BITS>(
            x_ + size_t(i) * kMostRows * cols_, rows_in(i), cols_, format_.group_size, block(i));
      });
    };
    if (rows <= kMostRows) {
      fix(0);
    } else {
      parallel_for(blocks(), fix);
    }
  }

  bool fits(const Weight& w) const {
    return w.format == format_;
  }
  int blocks() const {
    return (rows_ + kMostRows - 1) / kMostRows;
  }
  int rows_in(int block) const {
    int left = rows_ - block * kMostRows;
    return left < kMostRows ? left : kMostRows;
  }
  FixedRows block(int i) {
    size_t before = size_t(i) * kMostRows, groups = cols_ / format_.group_size;
    return {pairs_ + FixedRows::pair_count(cols_, int(before)), step_ + groups * before,
        sum_ + groups * before, padded_rows(rows_in(i))};
  }

 private:
  AffineFormat format_;
  int rows_, cols_;
  const float* x_;
  int padded_;
  Scratch<int32_t> pairs_;
  Scratch<float> step_, sum_;
};

} // namespace optiq::cpu::OPTIQ_ISA
