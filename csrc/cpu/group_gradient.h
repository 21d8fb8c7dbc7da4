// The gradient at the scales and biases of a quantized weight.
//
// With G the gradient at the dequantized weight, that at a bias is the sum of G over its group, and
// that at a scale the sum of G * code. A tile of G is reduced while it is in the cache: G as a
// whole is as large as the dequantized weight and never exists.
#pragma once

#include "gemm.h"

namespace optiq::cpu::OPTIQ_ISA {

struct GroupGradientTiles {
  const GroupGradient& a;
  // Of the rows of the weight, that share a reading of `in`.
  static constexpr int kStrip = 4 * Rows::kOfBlock;

  void operator()(int task) {
    const int first = task * kStrip;
    const int rows = first + kStrip < a.rows ? kStrip : a.rows - first;
    const int groups = a.cols / a.format.group_size;
    Scratch<float> out(size_t(kStrip) * a.m); // out[:, first:], transposed
    for (int t = 0; t < a.m; t++) {
      for (int r = 0; r < rows; r++) {
        out[size_t(r) * a.m + t] = a.out[size_t(t) * a.rows + first + r];
      }
    }
    const Rows strip(out, a.m, rows, a.m, false);
    const Weight in{.data = a.in, .rows = a.m, .cols = a.cols};
    const int width = a.format.group_size;
    Scratch<float> tile(size_t(kStrip) * width); // of G
    for (int g = 0; g < groups; g++) {
      multiply_part(strip, PartOfProduct<PackColumns<0>>{0, rows, g * width, (g + 1) * width, a.m,
                               tile, size_t(width), false, {{in}}});
      for (int r = 0; r < rows; r++) {
        reduce(first + r, g, tile + size_t(r) * width);
      }
    }
  }

 private:
  void reduce(int row, int g, const float* gradient) const {
    const size_t at = size_t(row) * (a.cols / a.format.group_size) + g;
    const uint8_t* codes = a.codes + at * (a.format.group_size / 8) * a.format.bits;
    f32x8 by_codes{}, by_ones{};
    at_width(a.format.bits, [&]<int BITS>(Width<BITS>) {
      for (int i = 0; i < a.format.group_size; i += 8, codes += BITS) {
        f32x8 v = load<f32x8>(gradient + i);
        by_codes += v * decode_last_codes<BITS>(codes);
        by_ones += v;
      }
    });
    a.scales[at] = sum(by_codes);
    a.biases[at] = sum(by_ones);
  }
};

inline void group_gradient(const GroupGradient& a) {
  GroupGradientTiles body{a};
  parallel_for((a.rows + body.kStrip - 1) / body.kStrip, body);
}

} // namespace optiq::cpu::OPTIQ_ISA
