// Codes, scale and bias for each group between its least and its largest weight: exactly those of
// mx.quantize, on all cores and eight weights at a time.
#pragma once

#include "quantize_group.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

template <int BITS>
struct MinMaxGroups {
  const Quantize& a;
  static constexpr size_t kGroupsPerTask = 512;

  void operator()(int task) {
    size_t begin = size_t(task) * kGroupsPerTask, end = begin + kGroupsPerTask;
    size_t groups = a.rows * (a.cols / a.format.group_size);
    end = end < groups ? end : groups;
    switch (a.type) {
      case Float::f32:
        return run<Float::f32>(begin, end);
      case Float::f16:
        return run<Float::f16>(begin, end);
      default:
        return run<Float::bf16>(begin, end);
    }
  }

 private:
  template <Float TYPE>
  void run(size_t begin, size_t end) const {
    constexpr float top = float((1 << BITS) - 1);
    const Packer pack(BITS);
    const int vectors = a.format.group_size / 8;
    uint8_t* codes = a.codes + begin * vectors * BITS;
    for (size_t g = begin; g < end; g++) {
      f32x8 w[kMaxGroup / 8];
      for (int i = 0; i < vectors; i++) {
        w[i] = load_float(a.w, TYPE, g * a.format.group_size + 8 * i);
      }
      Grid grid = stock_grid(range(w, vectors), top);
      for (int i = 0; i < vectors; i++, codes += BITS) {
        pack(clamp(round((w[i] - grid.bias) / grid.scale), top), codes);
      }
      store_float(a.scales, TYPE, g, grid.scale);
      store_float(a.biases, TYPE, g, grid.bias);
    }
  }
};

template <int BITS>
void minmax(const Quantize& a) {
  MinMaxGroups<BITS> body{a};
  size_t groups = a.rows * (a.cols / a.format.group_size);
  constexpr size_t each = MinMaxGroups<BITS>::kGroupsPerTask;
  parallel_for(int((groups + each - 1) / each), body);
}

inline void quantize_minmax(const Quantize& a) {
  at_width(a.format.bits, [&]<int BITS>(Width<BITS>) { minmax<BITS>(a); });
}

} // namespace optiq::cpu::OPTIQ_ISA
