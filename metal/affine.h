// Affine codes -> float weights: w = scale * code + bias.
//
// A row of codes is one little-endian bit stream, so 32 codes of b bits fill b words of 32 bits
// and 16 codes fill b of 16. Shifts are several times slower than masks and multiplications on
// these GPUs, so a code is masked where it lies, giving code * 2^shift, and the scale is taken
// times 2^-shift: exact, and shared by all packs of a group.
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

// Codes k ... k + COUNT - 1 of a row, COUNT being 16 or 32 and k a multiple of it. Rows begin on
// a word; nothing is assumed of the alignment beyond that, since arrays may be slices.
template <int BITS, int COUNT>
METAL_FUNC void load_codes(const device uint* row, int k, thread uint* words) {
  constexpr int halves = BITS * COUNT / 16;
  if constexpr (halves % 2 == 0) {
    const device uint* p = row + k / COUNT * (halves / 2);
#pragma unroll
    for (int i = 0; i < halves / 2; i++) {
      words[i] = p[i];
    }
  } else {
    const device ushort* p = (const device ushort*)row + k / COUNT * halves;
#pragma unroll
    for (int i = 0; i + 1 < halves; i += 2) {
      words[i / 2] = uint(p[i]) | uint(p[i + 1]) << 16;
    }
    words[halves / 2] = p[halves - 1];
  }
}

// Weights 8 * eighth ... 8 * eighth + 7 of the loaded codes. Unrolled, all shifts are constants,
// and there is one per 4 or 8 codes, or none.
template <int BITS>
METAL_FUNC void decode8(
    thread const uint* words, int eighth, float scale, float bias, thread float* w) {
  constexpr int pack = BITS <= 4 ? 8 : 4; // codes that fit a word wherever they begin
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
      const float scaled = scale * (1.0f / float(1u << (i * BITS)));
      w[p + i] = fma(scaled, float(v & (mask << (i * BITS))), bias);
    }
  }
}
