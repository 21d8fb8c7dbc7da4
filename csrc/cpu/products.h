// One parallel region over the tiles of several affine weights that share x.
#pragma once

#include <algorithm>

#include "affine.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kMostParts = 8;

struct AffineProducts {
  const Part* parts;
  int count;
  FixedMatrix* x[kMostParts]; // for each part
  int first_tile[kMostParts + 1];
  int tiles_each;

  void operator()(int task) {
    int begin = task * tiles_each, end = begin + tiles_each;
    end = end < first_tile[count] ? end : first_tile[count];
    size_t groups = 0, words = 0, cols = parts[0].w.cols;
    for (int p = 0; p < count; p++) {
      const AffineFormat& format = parts[p].w.format;
      groups = std::max(groups, cols / format.group_size);
      words = std::max(words, cols / 32 * format.bits + kBlock);
    }
    Scratch<float> scales(groups * kWide), biases(groups * kWide);
    bool many = x[0]->blocks() > 1;
    Scratch<uw> transposed(words),
        unpacked(many ? cols / (x[0]->exact ? kCodes<true> : kCodes<false>) : 0);
    for (int p = 0; p < count; p++) {
      int from = begin > first_tile[p] ? begin : first_tile[p];
      int to = end < first_tile[p + 1] ? end : first_tile[p + 1];
      for (int t = from; t < to; t++) {
        Tile tile(parts[p].w, t - first_tile[p], scales, biases);
        multiply_tile(tile, parts[p].y, *x[p], transposed, unpacked);
      }
    }
  }

 private:
  static void multiply_tile(
      const Tile& tile, float* y, FixedMatrix& x, uw* transposed, uw* unpacked) {
    at_width(tile.w.format.bits, [&]<int BITS>(Width<BITS>) {
      at_precision(x.exact, [&]<bool EXACT>(std::bool_constant<EXACT>) {
        constexpr int codes = kCodes<EXACT>;
        fw out[kMostRows<EXACT>];
        FixedRows first = x.block(0);
        if (tile.w.tiled) {
          TiledCodes<BITS, codes> tiled(tile);
          return multiply_codes<EXACT>(tile, y, x, tiled, unpacked);
        }
        if constexpr (kWholeWords<BITS>) {
          if (first.padded == 1) {
            *out = multiply_one<BITS, EXACT>(tile, first);
            return keep(tile, out, 1, y);
          }
        }
        PackedCodes<BITS, codes> packed(tile, transposed);
        multiply_codes<EXACT>(tile, y, x, packed, unpacked);
      });
    });
  }

  template <bool EXACT, class Codes>
  static void multiply_codes(
      const Tile& tile, float* y, FixedMatrix& x, Codes& codes, uw* unpacked) {
    fw out[kMostRows<EXACT>];
    FixedRows first = x.block(0);
    if (x.blocks() == 1) {
      multiply<EXACT>(first.padded, tile, codes, first, out);
      return keep(tile, out, x.rows_in(0), y);
    }
    codes.unpack_all(unpacked);
    UnpackedCodes<kCodes<EXACT>> vectors(unpacked);
    for (int i = 0; i < x.blocks(); i++) {
      FixedRows block = x.block(i);
      multiply<EXACT>(block.padded, tile, vectors, block, out);
      keep(tile, out, x.rows_in(i), y + size_t(i) * x.most() * tile.w.rows);
    }
  }

  static void keep(const Tile& tile, const fw* out, int rows, float* y) {
    for (int r = 0; r < rows; r++) {
      float* to = y + size_t(r) * tile.w.rows + tile.first;
      if (tile.lanes == kWide) {
        store(to, out[r]);
      } else {
        *to = out[r][0];
      }
    }
  }
};

inline void affine_products(const float* x, int m, const Part* parts, int count) {
  if (m == 0 || count == 0) {
    return;
  }
  if (count > kMostParts) {
    affine_products(x, m, parts + kMostParts, count - kMostParts);
    count = kMostParts;
  }
  AffineProducts work{parts, count, {}, {}, 0};
  alignas(FixedMatrix) char storage[kMostParts][sizeof(FixedMatrix)];
  int made = 0;
  double flops = 0;
  for (int p = 0; p < count; p++) {
    const Weight& w = parts[p].w;
    for (int q = 0; q < p && !work.x[p]; q++) {
      work.x[p] = work.x[q]->fits(w) ? work.x[q] : nullptr;
    }
    if (!work.x[p]) {
      work.x[p] = new (storage[made++]) FixedMatrix(x, m, w);
    }
    work.first_tile[p + 1] = work.first_tile[p] + Tile::count(w);
    flops += 2.0 * m * w.rows * w.cols;
  }
  int tiles = work.first_tile[count];
  int tasks = flops < kSerialFlops ? 1 : num_threads() * kTasksPerThread;
  work.tiles_each = (tiles + tasks - 1) / tasks;
  parallel_for((tiles + work.tiles_each - 1) / work.tiles_each, work);
  for (int i = 0; i < made; i++) {
    reinterpret_cast<FixedMatrix*>(storage[i])->~FixedMatrix();
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
