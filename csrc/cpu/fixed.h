// Activations as 16-bit fixed point.
//
// Each group of a row is read as x = step * i with integers |i| <= 32767, so the products with
// the codes are exact sums of integers, in any order: a row's result does not depend on the rows
// beside it, and prefill agrees with decoding to the bit. The step is 2^-15 of the largest
// activation of the group; rounding to it is 180 times finer than the rounding of bfloat16.
#pragma once

#include <utility>

#include "unpack.h"

namespace optiq::cpu::OPTIQ_ISA {

// Rows [begin, begin + rows) of x, ready for codes of one width and group size:
// `pairs[unit][row][i]` in the order in which codes are unpacked, `step[group][row]` and
// `sum[group][row]` = step * (sum of i over the group). Rows up to `padded` are zero.
struct FixedRows {
  int32_t* pairs;
  float* step;
  float* sum;
  int padded;

  static size_t pair_count(int cols, int padded) {
    return size_t(cols) / 2 * padded;
  }
};

// One group: integers of x, their sum and the step. Not-a-number and infinity make the step NaN.
inline void fix_group(const float* x, int n, int16_t* out, float* step, float* sum) {
  iw largest = {}; // of the magnitudes, as bits: they are in the order of the values
  for (int k = 0; k < n; k += kWide) {
    iw magnitude = load<iw>(x + k) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = max_lane(largest);
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  constexpr float kTop = 32767, kTiny = 1e-30f; // below it all is zero: 1 / top would overflow
  constexpr int32_t kInfinity = 0x7f800000;
  if (bits >= kInfinity || top <= kTiny) {
    std::memset(out, 0, n * sizeof(int16_t));
    *step = *sum = bits >= kInfinity ? __builtin_nanf("") : 0;
    return;
  }
  constexpr float kShift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  float inverse = kTop / top;
  iw total = {};
  for (int k = 0; k < n; k += kWide) {
    iw i = iw(load<fw>(x + k) * inverse + kShift) - iw(fw{} + kShift);
    total += i;
    store(out + k, __builtin_convertvector(i, i16w));
  }
  *step = top / kTop;
  *sum = *step * float(sum_lanes(total));
}

typedef int16_t Unit __attribute__((vector_size(2 * kUnit)));

// The integers of a unit in the order of its pairs, the low one of each first.
template <int BITS, int... I>
OPTIQ_INLINE Unit in_pairs(Unit x, std::integer_sequence<int, I...>) {
  constexpr auto place = [](int i) {
    return i % 2 ? code_pair<BITS>(i / 2).high : code_pair<BITS>(i / 2).low;
  };
  return __builtin_shufflevector(x, x, place(I)...);
}

template <int BITS>
void fix_rows(const float* x, int rows, int cols, int group_size, const FixedRows& out) {
  Scratch<int16_t> row(cols);
  for (int r = 0; r < out.padded; r++) {
    int groups = cols / group_size;
    for (int g = 0; g < groups; g++) {
      float* step = out.step + size_t(g) * out.padded + r;
      float* sum = out.sum + size_t(g) * out.padded + r;
      if (r < rows) {
        fix_group(x + size_t(r) * cols + size_t(g) * group_size, group_size, row + g * group_size,
            step, sum);
      } else {
        *step = *sum = 0;
      }
    }
    int32_t* pairs = out.pairs + size_t(r) * kPairs;
    for (int k = 0; k < cols; k += kUnit, pairs += size_t(kPairs) * out.padded) {
      Unit codes = r < rows ? load<Unit>(row + k) : Unit{};
      store(pairs, in_pairs<BITS>(codes, std::make_integer_sequence<int, kUnit>{}));
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
