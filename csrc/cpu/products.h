// One parallel region over the tiles of several affine weights that share x.
#pragma once

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
    size_t most = 0;
    for (int p = 0; p < count; p++) {
      size_t n = parts[p].w.groups() * kWide;
      most = n > most ? n : most;
    }
    Scratch<float> scales(most), biases(most);
    for (int p = 0; p < count; p++) {
      int from = begin > first_tile[p] ? begin : first_tile[p];
      int to = end < first_tile[p + 1] ? end : first_tile[p + 1];
      for (int t = from; t < to; t++) {
        multiply_tile(Tile(parts[p].w, t - first_tile[p], scales, biases), parts[p].y, *x[p]);
      }
    }
  }

 private:
  static void multiply_tile(const Tile& tile, float* y, FixedMatrix& x) {
    for (int i = 0; i < x.blocks(); i++) {
      FixedRows block = x.block(i);
      fw out[kMostRows];
      at_width(tile.w.format.bits,
          [&]<int BITS>(Width<BITS>) { multiply<BITS>(block.padded, tile, block, out); });
      for (int r = 0; r < x.rows_in(i); r++) {
        size_t row = size_t(i) * kMostRows + r;
        float* to = y + row * tile.w.rows + tile.first;
        if (tile.lanes == kWide) {
          store(to, out[r]);
        } else {
          *to = out[r][0];
        }
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
