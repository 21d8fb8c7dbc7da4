// Codes, scales and biases improved by coordinate descent on a layer's output error.
//
// With H the second moments of the layer's inputs, a row w that is stored as v has the error
//     E = (v - w)' H (v - w).
// Along one code E is a parabola, and its best grid point is a rounding away (QuantEase, Behdin et
// al. 2023, section 3). Groups are taken in turn: scale and bias are fitted to the group's codes (a
// quadratic in two unknowns) and stored, each code in turn moves to its best grid point, and the
// group changes only if E falls, once with the new scale and bias and once with the old ones. So
// E never rises. What a change does to the slope H (v - w) of all columns is added up for a tile of
// rows at once, as a matrix product.
#pragma once

#include "decode.h"
#include "quantize_group.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

struct DescentRows {
  const Descent& a;
  static constexpr int kMostRows = 32, kTogether = 8;
  const int tile_rows; // that share a reading of H; fewer where a thread would have none

  explicit DescentRows(const Descent& a) : a(a), tile_rows(rows_of_a_tile(a.rows)), ones_(a.cols) {
    const size_t g = a.format.group_size;
    for (size_t i = 0; i < a.cols; i++) {
      const float* h = a.hessian + i * a.cols + i / g * g;
      f32x8 total{};
      for (size_t j = 0; j < g; j += 8) {
        total += load<f32x8>(h + j);
      }
      ones_[i] = sum(total);
    }
  }

  void operator()(int task) {
    const size_t first = size_t(task) * tile_rows;
    const int rows = int(first + tile_rows < a.rows ? tile_rows : a.rows - first);
    const size_t groups = a.cols / a.format.group_size;
    Tile tile(tile_rows, a.cols, groups);
    for (int r = 0; r < rows; r++) {
      read(first + r, r, tile);
    }
    // The slope of the start: as if all had just changed from the exact weights.
    for (size_t k = 0; k < groups; k++) {
      for (int r = 0; r < rows; r++) {
        std::memcpy(tile.change[r], &tile.error[r * a.cols + k * a.format.group_size],
            sizeof(float) * a.format.group_size);
      }
      spread(tile, k, rows);
    }
    for (int sweep = 0; sweep < a.sweeps; sweep++) {
      for (size_t k = 0; k < groups; k++) {
        std::memset(tile.change, 0, sizeof(tile.change));
        bool changed = false;
        for (int r = 0; r < rows; r++) {
          changed |= improve(tile, r, k);
        }
        if (changed) {
          spread(tile, k, rows);
        }
      }
    }
    for (int r = 0; r < rows; r++) {
      write(first + r, r, tile);
    }
  }

 private:
  Scratch<float> ones_; // per column, the sum of H over the columns of its group

  static int rows_of_a_tile(size_t rows) {
    const size_t each = rows / num_threads() / kTogether * kTogether;
    return each < kTogether ? kTogether : each < kMostRows ? int(each) : kMostRows;
  }

  struct Tile {
    Tile(size_t rows, size_t cols, size_t groups)
        : codes(rows * cols),
          error(rows * cols),
          slope(rows * cols),
          scale(rows * groups),
          bias(rows * groups) {
      std::memset(&error[0], 0, rows * cols * sizeof(float));
      std::memset(&slope[0], 0, rows * cols * sizeof(float));
      std::memset(change, 0, sizeof(change));
    }
    Scratch<float> codes, error, slope; // [rows, cols]: codes, v - w and H (v - w)
    Scratch<float> scale, bias;         // [rows, groups]
    float change[kMostRows][kMaxGroup]; // of v in one group
  };

  // A group as it would be with another scale and bias.
  struct Trial {
    Trial(float scale, float bias) : scale(scale), bias(bias) {}
    float scale, bias;
    float gain = 0; // by how much E falls
    f32x8 codes[kMaxGroup / 8], change[kMaxGroup / 8], slope[kMaxGroup / 8];
  };

  void read(size_t row, int r, Tile& tile) const {
    const size_t groups = a.cols / a.format.group_size;
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
    const size_t groups = a.cols / a.format.group_size;
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

  float load_one(const void* base, size_t i) const {
    return load_tail(base, a.type, i, 1)[0];
  }

  // slope += change @ H, over the columns of group k, of so many rows and those up to the next 8th.
  void spread(Tile& tile, size_t k, int rows) const {
    constexpr int kColumns = 2 * kWide; // groups are multiples of 32
    const float* h = a.hessian + k * a.format.group_size * a.cols;
    for (size_t c = 0; c < a.cols; c += kColumns) {
      for (int r = 0; r < rows; r += kTogether) {
        fw low[kTogether], high[kTogether];
        for (int i = 0; i < kTogether; i++) {
          const float* slope = &tile.slope[(r + i) * a.cols + c];
          low[i] = load<fw>(slope);
          high[i] = load<fw>(slope + kWide);
        }
        for (int j = 0; j < a.format.group_size; j++) {
          fw h_low = load<fw>(h + j * a.cols + c), h_high = load<fw>(h + j * a.cols + c + kWide);
          for (int i = 0; i < kTogether; i++) {
            low[i] += tile.change[r + i][j] * h_low;
            high[i] += tile.change[r + i][j] * h_high;
          }
        }
        for (int i = 0; i < kTogether; i++) {
          float* slope = &tile.slope[(r + i) * a.cols + c];
          store(slope, low[i]);
          store(slope + kWide, high[i]);
        }
      }
    }
  }

  bool improve(Tile& tile, int r, size_t k) const {
    const size_t g = a.format.group_size, at = r * (a.cols / g) + k, start = r * a.cols + k * g;
    const int vectors = int(g / 8);
    const float* block = a.hessian + k * g * a.cols + k * g;
    f32x8 by_codes[kMaxGroup / 8] = {}; // H q
    for (size_t j = 0; j < g; j++) {
      const float q = tile.codes[start + j];
      for (int i = 0; i < vectors; i++) {
        by_codes[i] += q * load<f32x8>(block + j * a.cols + 8 * i);
      }
    }
    f32x8 qhq{}, qh1{}, one_h1{}, q_slope{}, one_slope{};
    for (int i = 0; i < vectors; i++) {
      f32x8 q = load<f32x8>(&tile.codes[start + 8 * i]);
      f32x8 y = load<f32x8>(&tile.slope[start + 8 * i]);
      qhq += q * by_codes[i];
      qh1 += by_codes[i];
      one_h1 += load<f32x8>(&ones_[k * g + 8 * i]);
      q_slope += q * y;
      one_slope += y;
    }
    const float scale = tile.scale[at], bias = tile.bias[at];
    Trial best(scale, bias);
    move_codes(tile, start, k, by_codes, 0, 0, best);
    const double A = sum(qhq), B = sum(qh1), C = sum(one_h1), determinant = A * C - B * B;
    if (determinant > 1e-9 * A * C) {
      // The bias is fitted to the scale as it is stored.
      double step = (sum(one_slope) * B - sum(q_slope) * C) / determinant;
      Trial trial(stored(a.type, float(scale + step)), 0);
      step = double(trial.scale) - scale;
      trial.bias = stored(a.type, float(bias - (sum(one_slope) + B * step) / C));
      move_codes(tile, start, k, by_codes, trial.scale - scale, trial.bias - bias, trial);
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
  void move_codes(const Tile& tile, size_t start, size_t k, const f32x8* by_codes, float by_scale,
      float by_bias, Trial& t) const {
    const size_t g = a.format.group_size;
    const int vectors = int(g / 8);
    const float top = float((1 << a.format.bits) - 1);
    const float* block = a.hessian + k * g * a.cols + k * g;
    for (int i = 0; i < vectors; i++) {
      t.codes[i] = load<f32x8>(&tile.codes[start + 8 * i]);
      t.change[i] = t.codes[i] * by_scale + by_bias;
      t.slope[i] = load<f32x8>(&tile.slope[start + 8 * i]) + by_scale * by_codes[i] +
                   by_bias * load<f32x8>(&ones_[k * g + 8 * i]);
    }
    auto* codes = reinterpret_cast<float*>(t.codes);
    auto* change = reinterpret_cast<float*>(t.change);
    auto* slope = reinterpret_cast<const float*>(t.slope);
    for (size_t j = 0; j < g; j++) {
      const float* h = block + j * a.cols;
      const float curve = h[j] * t.scale;
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
        t.slope[i] += step * load<f32x8>(h + 8 * i);
      }
    }
    // E(v + d) - E(v) = d' (2 H (v - w) + H d) = d' (slope before + slope after)
    f32x8 rise{};
    for (int i = 0; i < vectors; i++) {
      rise += t.change[i] * (load<f32x8>(&tile.slope[start + 8 * i]) + t.slope[i]);
    }
    t.gain = -sum(rise);
  }
};

inline void descend(const Descent& a) {
  DescentRows body(a);
  parallel_for(int((a.rows + body.tile_rows - 1) / body.tile_rows), body);
}

} // namespace optiq::cpu::OPTIQ_ISA
