// Codes, scales and biases improved by coordinate descent on a layer's output error.
//
// With H the second moments of the layer's inputs, a row w that is stored as v has the error
//     E = (v - w)' H (v - w).
// Along one code E is a parabola, and its best grid point is a rounding away (QuantEase, Behdin et
// al. 2023, section 3). Groups are taken in turn: scale and bias are fitted to the group's codes (a
// quadratic in two unknowns) and stored, each code in turn moves to its best grid point, and the
// group changes only if E falls, once with the new scale and bias and once with the old ones. So
// E never rises. What a change does to the slope H (v - w) is added up for a tile of rows at once,
// as a matrix product (hessian.h).
#pragma once

#include <atomic>

#include "decode.h"
#include "hessian.h"
#include "quantize_group.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

// Takes the steps of some rows at a time; a tile is such rows.
class RowDescent {
 public:
  static constexpr int kMostRows = 32;
  const Descent& a;
  const Hessian h;
  const size_t groups;

  explicit RowDescent(const Descent& a) : a(a), h(a), groups(a.cols / h.group) {}

  struct Tile {
    Tile(size_t rows, const RowDescent& of)
        : codes(rows * of.a.cols),
          error(rows * of.a.cols),
          reach(rows * of.h.width),
          scale(rows * of.groups),
          bias(rows * of.groups) {
      std::memset(&error[0], 0, rows * of.a.cols * sizeof(float));
      std::memset(&reach[0], 0, rows * of.h.width * sizeof(float));
      std::memset(change, 0, sizeof(change));
      std::memset(slope, 0, sizeof(slope));
    }
    Scratch<float> codes, error; // [rows, cols]: codes and v - w
    Scratch<float> reach;        // [rows, h.width]: (v - w) times H or the samples
    Scratch<float> scale, bias;  // [rows, groups]
    // Of one group: the change of v and the slope (v - w) H.
    float change[kMostRows][kMaxGroup], slope[kMostRows][kMaxGroup];
  };

  // The reach of the start: as if all had just changed from the exact weights.
  void start(Tile& tile, int rows) const {
    for (size_t k = 0; k < groups; k++) {
      for (int r = 0; r < rows; r++) {
        std::memcpy(tile.change[r], &tile.error[r * a.cols + k * h.group], sizeof(float) * h.group);
      }
      h.spread(tile.change[0], k, &tile.reach[0], rows);
    }
  }

  void sweep(Tile& tile, int rows) const {
    for (size_t k = 0; k < groups; k++) {
      std::memset(tile.change, 0, sizeof(tile.change));
      h.slope(&tile.reach[0], &tile.error[0], k, tile.slope[0], rows);
      std::atomic<bool> changed = false;
      auto some = [&](int part) {
        const int first = part * kRowsTogether;
        for (int r = first; r < std::min(first + kRowsTogether, rows); r++) {
          if (improve(tile, r, k)) {
            changed = true;
          }
        }
      };
      parallel_for((rows + kRowsTogether - 1) / kRowsTogether, some);
      if (changed) {
        h.spread(tile.change[0], k, &tile.reach[0], rows);
      }
    }
  }

  void read(size_t row, int r, Tile& tile) const {
    for (size_t k = 0; k < groups; k++) {
      tile.scale[r * groups + k] = load_one(a.scales, row * groups + k);
      tile.bias[r * groups + k] = load_one(a.biases, row * groups + k);
    }
    const uint8_t* in = a.codes + row * (a.cols / 8) * a.format.bits;
    at_width(a.format.bits, [&]<int BITS>(Width<BITS>) {
      for (size_t i = 0; i < a.cols; i += 8, in += BITS) {
        f32x8 codes = decode_last_codes<BITS>(in);
        size_t at = r * groups + i / a.format.group_size;
        f32x8 w = load_float(a.w, a.type, row * a.cols + i);
        store(&tile.codes[r * a.cols + i], codes);
        store(&tile.error[r * a.cols + i], codes * tile.scale[at] + tile.bias[at] - w);
      }
    });
  }

  void write(size_t row, int r, const Tile& tile) const {
    const Packer pack(a.format.bits);
    uint8_t* out = a.codes + row * (a.cols / 8) * a.format.bits;
    for (size_t i = 0; i < a.cols; i += 8, out += a.format.bits) {
      pack(load<f32x8>(&tile.codes[r * a.cols + i]), out);
    }
    for (size_t k = 0; k < groups; k++) {
      store_float(a.scales, a.type, row * groups + k, tile.scale[r * groups + k]);
      store_float(a.biases, a.type, row * groups + k, tile.bias[r * groups + k]);
    }
  }

 private:
  // A group as it would be with another scale and bias.
  struct Trial {
    Trial(float scale, float bias) : scale(scale), bias(bias) {}
    float scale, bias;
    float gain = 0; // by how much E falls
    f32x8 codes[kMaxGroup / 8], change[kMaxGroup / 8], slope[kMaxGroup / 8];
  };

  float load_one(const void* base, size_t i) const {
    return load_tail(base, a.type, i, 1)[0];
  }

  bool improve(Tile& tile, int r, size_t k) const {
    const size_t g = h.group, at = r * groups + k, start = r * a.cols + k * g;
    const int vectors = int(g / 8);
    const float *block = h.block(k), *ones = h.ones(k), *slope = tile.slope[r];
    f32x8 by_codes[kMaxGroup / 8] = {}; // H q
    for (size_t j = 0; j < g; j++) {
      const float q = tile.codes[start + j];
      for (int i = 0; i < vectors; i++) {
        by_codes[i] += q * load<f32x8>(block + j * g + 8 * i);
      }
    }
    f32x8 qhq{}, qh1{}, one_h1{}, q_slope{}, one_slope{};
    for (int i = 0; i < vectors; i++) {
      f32x8 q = load<f32x8>(&tile.codes[start + 8 * i]);
      f32x8 y = load<f32x8>(slope + 8 * i);
      qhq += q * by_codes[i];
      qh1 += by_codes[i];
      one_h1 += load<f32x8>(ones + 8 * i);
      q_slope += q * y;
      one_slope += y;
    }
    const float scale = tile.scale[at], bias = tile.bias[at];
    Trial best(scale, bias);
    move_codes(tile, r, k, by_codes, 0, 0, best);
    const double A = sum(qhq), B = sum(qh1), C = sum(one_h1), determinant = A * C - B * B;
    if (determinant > 1e-9 * A * C) {
      // The bias is fitted to the scale as it is stored.
      double step = (sum(one_slope) * B - sum(q_slope) * C) / determinant;
      Trial trial(stored(a.type, float(scale + step)), 0);
      step = double(trial.scale) - scale;
      trial.bias = stored(a.type, float(bias - (sum(one_slope) + B * step) / C));
      move_codes(tile, r, k, by_codes, trial.scale - scale, trial.bias - bias, trial);
      if (trial.gain > best.gain) {
        best = trial;
      }
    }
    if (!(best.gain > 0)) {
      return false;
    }
    tile.scale[at] = best.scale;
    tile.bias[at] = best.bias;
    for (int i = 0; i < vectors; i++) {
      store(&tile.codes[start + 8 * i], best.codes[i]);
      store(&tile.change[r][8 * i], best.change[i]);
      store(&tile.error[start + 8 * i], load<f32x8>(&tile.error[start + 8 * i]) + best.change[i]);
    }
    return true;
  }

  // Scale and bias change by so much; then every code in turn moves to its best grid point.
  void move_codes(const Tile& tile, int r, size_t k, const f32x8* by_codes, float by_scale,
      float by_bias, Trial& t) const {
    const size_t g = h.group, start = r * a.cols + k * g;
    const int vectors = int(g / 8);
    const float top = float((1 << a.format.bits) - 1);
    const float *block = h.block(k), *ones = h.ones(k), *before = tile.slope[r];
    for (int i = 0; i < vectors; i++) {
      t.codes[i] = load<f32x8>(&tile.codes[start + 8 * i]);
      t.change[i] = t.codes[i] * by_scale + by_bias;
      t.slope[i] = load<f32x8>(before + 8 * i) + by_scale * by_codes[i] +
                   by_bias * load<f32x8>(ones + 8 * i);
    }
    auto* codes = reinterpret_cast<float*>(t.codes);
    auto* change = reinterpret_cast<float*>(t.change);
    auto* slope = reinterpret_cast<const float*>(t.slope);
    for (size_t j = 0; j < g; j++) {
      const float* row = block + j * g;
      const float curve = row[j] * t.scale;
      if (!(curve != 0)) { // also NaN
        continue;
      }
      float code = codes[j] + __builtin_rintf(-slope[j] / curve);
      code = code > 0 ? code : 0;
      code = code < top ? code : top;
      const float step = (code - codes[j]) * t.scale;
      if (!(step != 0)) {
        continue;
      }
      codes[j] = code;
      change[j] += step;
      for (int i = 0; i < vectors; i++) {
        t.slope[i] += step * load<f32x8>(row + 8 * i);
      }
    }
    // E(v + d) - E(v) = d' (2 H (v - w) + H d) = d' (slope before + slope after)
    f32x8 rise{};
    for (int i = 0; i < vectors; i++) {
      rise += t.change[i] * (load<f32x8>(before + 8 * i) + t.slope[i]);
    }
    t.gain = -sum(rise);
  }
};

inline int rows_of_a_tile(size_t rows) { // fewer where a thread would have none
  const size_t each = rows / num_threads() / kRowsTogether * kRowsTogether;
  return each < kRowsTogether           ? kRowsTogether
         : each < RowDescent::kMostRows ? int(each)
                                        : RowDescent::kMostRows;
}

// work(first row, rows, tile) for all rows, tile by tile, each read and started.
template <typename Work>
void for_tiles(const RowDescent& by_rows, Work work) {
  const size_t all = by_rows.a.rows, of_tile = rows_of_a_tile(all);
  auto tiles = [&](int task) {
    const size_t first = size_t(task) * of_tile;
    const int rows = int(std::min(of_tile, all - first));
    RowDescent::Tile tile(of_tile, by_rows);
    for (int r = 0; r < rows; r++) {
      by_rows.read(first + r, r, tile);
    }
    by_rows.start(tile, rows);
    work(first, rows, tile);
  };
  parallel_for(int((all + of_tile - 1) / of_tile), tiles);
}

inline void descend_rows(const Descent& a) {
  const RowDescent by_rows(a);
  for_tiles(by_rows, [&](size_t first, int rows, RowDescent::Tile& tile) {
    for (int sweep = 0; sweep < a.sweeps; sweep++) {
      by_rows.sweep(tile, rows);
    }
    for (int r = 0; r < rows; r++) {
      by_rows.write(first + r, r, tile);
    }
  });
}

} // namespace optiq::cpu::OPTIQ_ISA
