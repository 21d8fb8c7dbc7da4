// Affine codes -> float weights: w = scale * code + bias.
//
// A row of codes is one little-endian bit stream, so 32 codes of b bits fill b words of 32 bits
// and 16 codes fill b of 16. Shifts are several times slower than masks and multiplications on
// these GPUs, so a code is masked where it lies, giving code * 2^shift, and what it is multiplied
// with is taken times 2^-shift, which is exact.
#pragma once

#include <metal_stdlib>
using namespace metal;

// CODE(b); for the width that `bits` has at run time, one of the set WIDTHS (bit b: b-bit codes)
// known at compile time. The branch is uniform where `bits` is. Metal has no templated lambdas.
#define OPTIQ_AT_WIDTH(WIDTHS, bits, CODE) \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 2)       \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 3)       \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 4)       \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 5)       \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 6)       \
  OPTIQ_WIDTH(WIDTHS, bits, CODE, 8)
#define OPTIQ_WIDTH(WIDTHS, bits, CODE, BITS)  \
  if constexpr (((WIDTHS >> BITS) & 1) != 0) { \
    if ((bits) == BITS) {                      \
      CODE(BITS);                              \
    }                                          \
  }

// Codes k ... k + 15 of a row, k being a multiple of 16. Rows begin on a word; nothing is assumed
// of the alignment beyond that, since arrays may be slices.
template <int BITS>
METAL_FUNC void load_codes(const device uint* row, int k, thread uint* words) {
  if constexpr (BITS % 2 == 0) {
    const device uint* p = row + k / 16 * (BITS / 2);
#pragma unroll
    for (int i = 0; i < BITS / 2; i++) {
      words[i] = p[i];
    }
  } else {
    const device ushort* p = (const device ushort*)row + k / 16 * BITS;
#pragma unroll
    for (int i = 0; i + 1 < BITS; i += 2) {
      words[i / 2] = uint(p[i]) | uint(p[i + 1]) << 16;
    }
    words[BITS / 2] = p[BITS - 1];
  }
}

// Codes 8 * eighth ... 8 * eighth + 7 of the loaded ones, masked where they lie: code i of a pack
// is times 2^(i * BITS). Unrolled, all shifts are constants, and there is one per pack, or none.
template <int BITS>
METAL_FUNC constexpr int codes_of_pack() {
  return BITS <= 4 ? 8 : 4; // that fit a word wherever they begin
}
template <int BITS>
METAL_FUNC void codes8(thread const uint* words, int eighth, thread float* codes) {
  constexpr int pack = codes_of_pack<BITS>();
  constexpr uint mask = (1u << BITS) - 1;
#pragma unroll
  for (int p = 0; p < 8; p += pack) {
    const int bit = (8 * eighth + p) * BITS;
    uint v = words[bit / 32] >> (bit % 32);
    if (bit % 32 + pack * BITS > 32) {
      v |= words[bit / 32 + 1] << (32 - bit % 32);
    }
#pragma unroll
    for (int i = 0; i < pack; i++) {
      codes[p + i] = float(v & (mask << (i * BITS)));
    }
  }
}

// A factor of code i of 8, for the place where it lies.
template <int BITS>
METAL_FUNC float at_place(float factor, int i) {
  return factor * (1.0f / float(1u << (i % codes_of_pack<BITS>() * BITS)));
}

// Weights 8 * eighth ... 8 * eighth + 7 of the loaded codes.
template <int BITS>
METAL_FUNC void decode8(
    thread const uint* words, int eighth, float scale, float bias, thread float* w) {
  codes8<BITS>(words, eighth, w);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    w[i] = fma(at_place<BITS>(scale, i), w[i], bias);
  }
}
