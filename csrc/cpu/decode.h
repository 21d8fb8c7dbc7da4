// Affine codes -> float lanes.
//
// A row of codes is one little-endian bit stream, so eight codes of b bits fill b bytes.
// Shifting each code down to bit 0 would cost an instruction per eight weights; instead each
// code is masked where it lies, giving code * 2^shift, and the activations are scaled by
// 2^-shift once per call ("swizzled"). Both are exact.
#pragma once

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

// Eight consecutive codes at a time, in natural order, for any width.
template <int BITS>
struct Natural {
  static constexpr int kStep = 8;            // codes per decode()
  static constexpr int kOverread = 8 - BITS; // bytes touched past the last code

  // Bit offset of lane i inside the two bytes gathered for it.
  static constexpr int shift(int i) {
    return i * BITS % 8;
  }
  static constexpr u32x8 mask() {
    u32x8 m{};
    for (int i = 0; i < 8; i++) {
      m[i] = ((1u << BITS) - 1) << shift(i);
    }
    return m;
  }

  OPTIQ_INLINE static void decode(const uint8_t* p, f32x8* out) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    typedef uint64_t u64x4 __attribute__((vector_size(32)));
    u8x32 bytes = u8x32(u64x4{word, word, word, word});
// Lane i takes the byte its code starts in and the next one.
#define OPTIQ_LANE(i) i *BITS / 8, i *BITS / 8 + 1 < 8 ? i * BITS / 8 + 1 : 7, 32, 32
#define OPTIQ_LANE_HIGH(i) \
  16 + i *BITS / 8, 16 + (i * BITS / 8 + 1 < 8 ? i * BITS / 8 + 1 : 7), 32, 32
    u8x32 gathered = __builtin_shufflevector(bytes, u8x32{}, OPTIQ_LANE(0), OPTIQ_LANE(1),
        OPTIQ_LANE(2), OPTIQ_LANE(3), OPTIQ_LANE_HIGH(4), OPTIQ_LANE_HIGH(5), OPTIQ_LANE_HIGH(6),
        OPTIQ_LANE_HIGH(7));
#undef OPTIQ_LANE
#undef OPTIQ_LANE_HIGH
    out[0] = __builtin_convertvector(i32x8(u32x8(gathered) & mask()), f32x8);
  }

  static void swizzle(const float* x, float* out, int n) {
    for (int i = 0; i < n; i++) {
      out[i] = x[i] / float(1 << shift(i % 8));
    }
  }
};

// Four-bit codes, 64 at a time: lane i holds the i-th 32-bit word, vector j its j-th code.
struct Strided4 {
  static constexpr int kStep = 64;
  static constexpr int kOverread = 0;

  OPTIQ_INLINE static void decode(const uint8_t* p, f32x8* out) {
    u32x8 words = load<u32x8>(p);
    for (int j = 0; j < 7; j++) {
      out[j] = __builtin_convertvector(i32x8(words & (0xfu << (4 * j))), f32x8);
    }
    out[7] = __builtin_convertvector(i32x8(words >> 28), f32x8); // masking would set the sign
  }

  static void swizzle(const float* x, float* out, int n) {
    for (int base = 0; base < n; base += 64) {
      for (int j = 0; j < 8; j++) {
        float scale = j < 7 ? 1.0f / float(1u << (4 * j)) : 1.0f;
        for (int i = 0; i < 8; i++) {
          out[base + 8 * j + i] = x[base + 8 * i + j] * scale;
        }
      }
    }
  }
};

// Codes as they are: for building dequantized tiles, where there is no activation to scale.
template <int BITS>
OPTIQ_INLINE f32x8 decode_codes(const uint8_t* p) {
  f32x8 scaled;
  Natural<BITS>::decode(p, &scaled);
  f32x8 unscale{};
  for (int i = 0; i < 8; i++) {
    unscale[i] = 1.0f / float(1 << Natural<BITS>::shift(i));
  }
  return scaled * unscale;
}

} // namespace optiq::cpu::OPTIQ_ISA
