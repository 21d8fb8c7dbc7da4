// The weights that codes, scales and biases stand for.
#pragma once

#include "decode.h"
#include "pool.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

struct DequantizeRows {
  static constexpr int kElements = 1 << 14; // of a task
  const Weight& w;
  float* y; // [rows, cols]

  int rows_of_task() const {
    return std::max(1, kElements / w.cols);
  }

  void operator()(int task) const {
    const int first = task * rows_of_task(), last = std::min(w.rows, first + rows_of_task());
    for (int r = first; r < last; r++) {
      at_width(w.format.bits, [&]<int BITS>(Width<BITS>) { row<BITS>(r); });
    }
  }

 private:
  template <int BITS>
  void row(int r) const {
    auto* codes = static_cast<const uint8_t*>(w.data) + r * w.row_bytes();
    float* out = y + size_t(r) * w.cols;
    for (size_t g = 0; g < w.groups(); g++) {
      const float scale = load_tail(w.scales, w.type, r * w.groups() + g, 1)[0];
      const float bias = load_tail(w.biases, w.type, r * w.groups() + g, 1)[0];
      for (int i = 0; i < w.format.group_size; i += 8, codes += BITS, out += 8) {
        store(out, decode_last_codes<BITS>(codes) * scale + bias);
      }
    }
  }
};

inline void dequantize(const Weight& w, float* y) {
  DequantizeRows body{w, y};
  parallel_for((w.rows + body.rows_of_task() - 1) / body.rows_of_task(), body);
}

} // namespace optiq::cpu::OPTIQ_ISA
