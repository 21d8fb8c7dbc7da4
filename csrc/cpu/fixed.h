// Activations in fixed point.
//
// Each group of a row is read as x = step * i with integers i of 16 bits, or of 24 where the
// product has to be as exact as one of floats. So the products with the codes are exact sums of
// integers, in any order: a row's result does not depend on the rows beside it, and prefill agrees
// with decoding to the bit. With 16 bits the step is about 2^-15 of the largest activation of the
// group; rounding to it is 180 times finer than the rounding of bfloat16. With 24 bits it is about
// 2^-23, half of what separates floats of that size.
//
// Integers of 24 bits are split into signed planes, i = plane[0] + (plane[1] << kPlaneBits) + ...,
// of bytes where there are products of bytes.
#pragma once

#include <utility>

#include "unpack.h"

namespace optiq::cpu::OPTIQ_ISA {

// f(constant): products as exact as of floats, or of 16 bits.
template <class F>
OPTIQ_INLINE void at_precision(bool exact, F&& f) {
  if (exact) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

#if defined(__AVX512VNNI__)
constexpr int kPlaneBits = 8;
template <bool EXACT>
constexpr int kPlanes = EXACT ? 3 : 1;
template <bool EXACT>
constexpr int kCodes = EXACT ? 4 : 2; // in a lane
typedef int8_t ExactInteger;
#else
constexpr int kPlaneBits = 12;
template <bool EXACT>
constexpr int kPlanes = EXACT ? 2 : 1;
template <bool EXACT>
constexpr int kCodes = 2;
typedef int16_t ExactInteger;
#endif

// Of a plane.
template <bool EXACT>
using Integer = std::conditional_t<EXACT, ExactInteger, int16_t>;

template <bool EXACT>
OPTIQ_INLINE iw dot(iw acc, uw codes, iw x) {
#if defined(__AVX512VNNI__)
  if constexpr (EXACT) {
    return dot_quads(acc, codes, x);
  }
#endif
  return dot_pairs(acc, codes, x);
}

// What the largest activation becomes. The highest plane of 24 bits is a signed byte, also where
// rounding adds one.
template <bool EXACT>
constexpr int32_t kTop = EXACT ? 127 << 16 | 127 << 8 : 32767;

// Sums of products as sum + (high << the bits of the other planes); high is 0 unless EXACT.
struct PlaneSums {
  iw sum, high;
};

template <bool EXACT>
OPTIQ_INLINE PlaneSums joined(const iw* planes) {
  constexpr int low = kPlanes<EXACT> - EXACT; // planes that 32 bits have room for
  iw sum = planes[0];
  for (int p = 1; p < low; p++) {
    sum += planes[p] << (p * kPlaneBits);
  }
  return {sum, EXACT ? planes[low] : iw{}};
}

template <bool EXACT>
OPTIQ_INLINE fw to_float(PlaneSums s) {
  fw value = __builtin_convertvector(s.sum, fw);
  constexpr float unit = 1 << (kPlanes<EXACT> - 1) * kPlaneBits;
  return EXACT ? __builtin_convertvector(s.high, fw) * unit + value : value;
}

// Rows [begin, begin + rows) of x, ready for codes of one width and group size:
// `words[unit][row][plane][i]` in the order in which codes are unpacked, `step[group][row]` and
// `sum[group][row]` = step * (sum of i over the group). Rows up to `padded` are zero.
struct FixedRows {
  int32_t* words;
  float* step;
  float* sum;
  int padded;

  template <bool EXACT>
  static size_t word_count(int cols, int padded) {
    return size_t(cols) / kCodes<EXACT> * padded * kPlanes<EXACT>;
  }
};

// The nearest integers, of at most 23 bits and a sign.
template <bool EXACT>
OPTIQ_INLINE iw rounded(fw x) {
  if constexpr (EXACT) {
    iw half = (iw(x) & int32_t(0x80000000)) | 0x3f000000; // 0.5 with the sign of x
    return __builtin_convertvector(x + fw(half), iw);
  } else {
    constexpr float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    return iw(x + shift) - iw(fw{} + shift);
  }
}

// One group: the planes of its integers, `stride` apart, their sum and the step. Not-a-number and
// infinity make the step NaN.
template <bool EXACT>
void fix_group(const float* x, int n, Integer<EXACT>* out, size_t stride, float* step, float* sum) {
  iw largest = {}; // of the magnitudes, as bits: they are in the order of the values
  for (int k = 0; k < n; k += kWide) {
    iw magnitude = load<iw>(x + k) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = max_lane(largest);
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  constexpr float kTiny = 1e-30f; // below it all is zero: 1 / top would overflow
  constexpr int32_t kInfinity = 0x7f800000;
  if (bits >= kInfinity || top <= kTiny) {
    for (int p = 0; p < kPlanes<EXACT>; p++) {
      std::memset(out + p * stride, 0, n * sizeof(*out));
    }
    *step = *sum = bits >= kInfinity ? __builtin_nanf("") : 0;
    return;
  }
  float inverse = float(kTop<EXACT>) / top;
  iw total = {};
  for (int k = 0; k < n; k += kWide) {
    iw i = rounded<EXACT>(load<fw>(x + k) * inverse);
    total += i;
    for (int p = 0; p < kPlanes<EXACT>; p++) {
      constexpr int unused = 32 - kPlaneBits;
      iw plane = p + 1 < kPlanes<EXACT> ? (i << unused) >> unused : i;
      typedef Integer<EXACT> Integers __attribute__((vector_size(kWide * sizeof(*out))));
      store(out + p * stride + k, __builtin_convertvector(plane, Integers));
      i = (i - plane) >> kPlaneBits;
    }
  }
  *step = top / float(kTop<EXACT>);
  *sum = *step * float(sum_lanes(total));
}

// The integers of a unit in the order of its codes.
template <int BITS, int CODES, class Unit, int... I>
OPTIQ_INLINE Unit in_order(Unit x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, kOrder<BITS, CODES>[I / CODES][I % CODES]...);
}

template <int BITS, bool EXACT>
void fix_rows(const float* x, int rows, int cols, int group_size, const FixedRows& out) {
  constexpr int planes = kPlanes<EXACT>, codes = kCodes<EXACT>, vectors = kVectors<codes>;
  typedef Integer<EXACT> Unit __attribute__((vector_size(kUnit * sizeof(Integer<EXACT>))));
  Scratch<Integer<EXACT>> row(size_t(planes) * cols);
  for (int r = 0; r < out.padded; r++) {
    int groups = cols / group_size;
    for (int g = 0; g < groups; g++) {
      float* step = out.step + size_t(g) * out.padded + r;
      float* sum = out.sum + size_t(g) * out.padded + r;
      if (r < rows) {
        fix_group<EXACT>(x + size_t(r) * cols + size_t(g) * group_size, group_size,
            row + g * group_size, cols, step, sum);
      } else {
        *step = *sum = 0;
      }
    }
    for (int p = 0; p < planes; p++) {
      int32_t* words = out.words + (size_t(r) * planes + p) * vectors;
      for (int k = 0; k < cols; k += kUnit, words += size_t(vectors) * planes * out.padded) {
        Unit unit = r < rows ? load<Unit>(row + size_t(p) * cols + k) : Unit{};
        store(words, in_order<BITS, codes>(unit, std::make_integer_sequence<int, kUnit>{}));
      }
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
