// Products by the matrix unit of Intel processors (AMX), which multiplies tiles of bf16 values and
// adds them up in float32. It does 16 times the work of float32 instructions.
//
// A float32 is the sum of three bf16 values, which hold 8 bits of it each. Products of such pieces
// that lie below the last bit of a float32 are left out, so the result is as exact as a product in
// float32. Six products of pieces remain; where the weight is bf16, which is one piece, three.
//
// Numbers below the smallest normal float32 count as zero, those above 3.39e38 as infinite. A
// result that float32 would give as infinite may be NaN.
#pragma once

#include "panels.h"
#include "unpack.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kAmxRows = 16, kAmxDepth = 32, kAmxTile = kAmxRows * kAmxDepth;
constexpr int kAmxStep = 2 * kAmxTile; // values of one piece that are multiplied at a time
constexpr int kPieces = 3;             // of a float32
static_assert(kPanel == 2 * kAmxRows && kDepth % kAmxDepth == 0);

struct alignas(64) TileConfig {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While one lives, its thread may use the tiles.
class TileRegisters {
 public:
  TileRegisters() {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() {
    _tile_release();
  }
};

// Takes the next piece off 16 floats: what it holds, as words whose low half is zero. Nothing is
// left of a value that is not finite.
OPTIQ_INLINE uw take_piece(fw& x) {
  uw words = uw(_mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(x))))) << 16;
  auto finite = (words & 0x7f800000) != 0x7f800000;
  x = fw(iw(x - fw(words)) & finite);
  return words;
}

OPTIQ_INLINE fw load_floats(const float* p, int n) {
  return n >= kWide ? load<fw>(p)
                    : fw(load_words(reinterpret_cast<const uint32_t*>(p), n > 0 ? n : 0));
}

// c[32, 32] (+)= a b, in so many steps of kAmxDepth. The pieces of a step lie one after the other:
// of `a` two tiles of rows, of `b` two tiles of columns, in which pairs of rows are interleaved.
template <int PIECES>
void multiply_tiles(
    const uint16_t* a, const uint16_t* b, int steps, float* c, size_t ldc, bool accumulate) {
  asm volatile("" ::: "memory"); // GCC is not told that tiles are read from memory
  size_t row = ldc * sizeof(float);
  float* below = c + kAmxRows * ldc;
  if (accumulate) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + kAmxRows, row);
    _tile_loadd(2, below, row);
    _tile_loadd(3, below + kAmxRows, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; step++) {
    unrolled<PIECES>([&](auto j) __attribute__((always_inline)) {
      constexpr int of_b = PIECES - 1 - j;
      _tile_loadd(6, b + of_b * kAmxStep, 64);
      _tile_loadd(7, b + of_b * kAmxStep + kAmxTile, 64);
      unrolled<kPieces - of_b>([&](auto of_a) __attribute__((always_inline)) {
        _tile_loadd(4, a + of_a * kAmxStep, 64);
        _tile_loadd(5, a + of_a * kAmxStep + kAmxTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      });
    });
    a += kPieces * kAmxStep;
    b += PIECES * kAmxStep;
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + kAmxRows, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + kAmxRows, row);
}

// A[m, k] in pieces, in the order of multiply_tiles(): blocks of kPanel rows, of each its steps.
class SplitRows {
 public:
  static constexpr int kOfBlock = kPanel;   // that share what is read of a panel
  static constexpr int kPanelsTogether = 8; // that share what is read of A

  // As many as take 32 MB.
  static int at_once(int, int k) {
    size_t blocks = (32 << 20) / (size_t(k + kAmxDepth) * kPieces * sizeof(uint16_t)) / kPanel;
    return int(blocks + 1) * kPanel;
  }

  SplitRows(const float* a, size_t lda, int m, int k, bool)
      : steps_((k + kAmxDepth - 1) / kAmxDepth), tiles_(blocks(m) * steps_ * kPieces * kAmxStep) {
    auto split = [&](int block) {
      for (int r = 0; r < kPanel; r++) {
        int row = block * kPanel + r;
        uint16_t* out = tiles_ + block * steps_ * kPieces * kAmxStep + r * kAmxDepth;
        for (int i = 0; i < int(steps_) * kAmxDepth; i += kWide) {
          fw x = row < m ? load_floats(a + row * lda + i, k - i) : fw{};
          uint16_t* to = out + size_t(i / kAmxDepth) * kPieces * kAmxStep + i % kAmxDepth;
          for (int piece = 0; piece < kPieces; piece++) {
            auto halves = _mm512_cvtepi32_epi16(__m512i(take_piece(x) >> 16));
            store(to + piece * kAmxStep, halves);
          }
        }
      }
    };
    for_rows(blocks(m), size_t(kPanel) * k, split);
  }

  const uint16_t* at(int row, int depth) const {
    return tiles_ + (row / kPanel * steps_ + depth / kAmxDepth) * kPieces * kAmxStep;
  }

 private:
  static size_t blocks(int m) {
    return (m + kPanel - 1) / kPanel;
  }

  size_t steps_;
  Scratch<uint16_t> tiles_;
};

// The pieces of `depth` rows of a panel of B, as multiply_tiles() takes them.
template <int PIECES>
void split_panel(float* panel, int depth, uint16_t* tiles) {
  int steps = (depth + kAmxDepth - 1) / kAmxDepth;
  std::memset(
      panel + depth * kPanel, 0, size_t(steps * kAmxDepth - depth) * kPanel * sizeof(float));
  for (int k = 0; k < steps * kAmxDepth; k += 2) {
    for (int half = 0; half < 2; half++) {
      fw low = load<fw>(panel + k * kPanel + half * kWide);
      fw high = load<fw>(panel + (k + 1) * kPanel + half * kWide);
      uint16_t* to = tiles + size_t(k / kAmxDepth) * PIECES * kAmxStep + half * kAmxTile +
                     k % kAmxDepth * kAmxRows;
      for (int piece = 0; piece < PIECES; piece++) {
        uw first = take_piece(low), second = take_piece(high);
        store(to + piece * kAmxStep, second | first >> 16);
      }
    }
  }
}

// The same of a bf16 weight, whose columns are those of C or whose rows are.
inline void interleave_bf16(PackRows<0> pack, int n0, int k0, int depth, uint16_t* to) {
  const Weight& w = pack.read.w;
  auto* from = static_cast<const uint8_t*>(w.data) + n0 * w.row_bytes() + 2 * k0;
  for (int k = 0; k < depth; k += kAmxDepth) {
    for (int half = 0; half < 2; half++, to += kAmxTile) {
      uw words[kBlock];
      transpose_words(from + half * kAmxRows * w.row_bytes() + 2 * k, w.row_bytes(), kBlock, words);
      std::memcpy(to, words, sizeof(words));
    }
  }
}
inline void interleave_bf16(PackColumns<0> pack, int n0, int k0, int depth, uint16_t* to) {
  const Weight& w = pack.read.w;
  for (int k = 0; k < depth; k += 2) {
    auto* rows = static_cast<const char*>(w.data) + (k0 + k) * w.row_bytes() + 2 * n0;
    for (int half = 0; half < 2; half++) {
      auto read = [&](int row) {
        auto* p = reinterpret_cast<const uint16_t*>(rows + row * w.row_bytes());
        return load_halves(p + half * kAmxRows, kWide);
      };
      store(to + size_t(k / kAmxDepth) * kAmxStep + half * kAmxTile + k % kAmxDepth * kAmxRows,
          read(0) | read(1) << 16);
    }
  }
}

// multiply_part() with B of so many pieces.
template <int PIECES, class Pack>
struct TiledPart {
  const SplitRows& a;
  const PartOfProduct<Pack>& p;

  void run() const {
    const TileRegisters registers;
    constexpr size_t of_panel = size_t(kDepth) * kPanel * PIECES;
    int panels = (p.right - p.left + kPanel - 1) / kPanel;
    Scratch<uint16_t> tiles(panels * of_panel);
    Scratch<float> panel(size_t(kDepth) * kPanel);
    for (int k0 = 0; k0 < p.k; k0 += kDepth) {
      int depth = p.k - k0 < kDepth ? p.k - k0 : kDepth;
      for (int i = 0; i < panels; i++) {
        pack(p.left + i * kPanel, k0, depth, panel, tiles + i * of_panel);
      }
      int steps = (depth + kAmxDepth - 1) / kAmxDepth;
      for (int row = p.top; row < p.bottom; row += kPanel) {
        for (int i = 0; i < panels; i++) {
          multiply(row, p.left + i * kPanel, a.at(row, k0), tiles + i * of_panel, steps, k0 > 0);
        }
      }
    }
  }

 private:
  void pack(int n0, int k0, int depth, float* panel, uint16_t* tiles) const {
    int cols = p.right - n0 < kPanel ? p.right - n0 : kPanel;
    if constexpr (PIECES == 1) {
      if (cols == kPanel && depth % kAmxDepth == 0) {
        return interleave_bf16(p.pack, n0, k0, depth, tiles);
      }
    }
    p.pack(n0, cols, k0, depth, panel);
    split_panel<PIECES>(panel, depth, tiles);
  }

  void multiply(
      int row, int n0, const uint16_t* of_a, const uint16_t* of_b, int steps, bool again) const {
    int rows = p.bottom - row, cols = p.right - n0;
    bool accumulate = again || p.accumulate;
    float* c = p.c + (row - p.top) * p.ldc + (n0 - p.left);
    if (rows >= kPanel && cols >= kPanel) {
      return multiply_tiles<PIECES>(of_a, of_b, steps, c, p.ldc, accumulate);
    }
    float whole[kPanel * kPanel] = {};
    size_t bytes = sizeof(float) * (cols < kPanel ? cols : kPanel);
    for (int r = 0; accumulate && r < kPanel && r < rows; r++) {
      std::memcpy(whole + r * kPanel, c + r * p.ldc, bytes);
    }
    multiply_tiles<PIECES>(of_a, of_b, steps, whole, kPanel, accumulate);
    for (int r = 0; r < kPanel && r < rows; r++) {
      std::memcpy(c + r * p.ldc, whole + r * kPanel, bytes);
    }
  }
};

template <class Pack>
int pieces_of(const Pack& pack) {
  Float type = Pack::kDense ? pack.read.w.type : Float::f32;
  return type == Float::bf16 ? 1 : type == Float::f16 ? 2 : kPieces;
}

template <class Pack>
void multiply_part(const SplitRows& a, const PartOfProduct<Pack>& p) {
  if constexpr (Pack::kDense) {
    int pieces = pieces_of(p.pack);
    if (pieces < kPieces) {
      return pieces == 1 ? TiledPart<1, Pack>{a, p}.run() : TiledPart<2, Pack>{a, p}.run();
    }
  }
  TiledPart<kPieces, Pack>{a, p}.run();
}

} // namespace optiq::cpu::OPTIQ_ISA
