// Affine codes -> float lanes, for tiles of dequantized weights.
//
// A row of codes is one little-endian bit stream, so eight codes of b bits fill b bytes.
#pragma once

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

// Eight consecutive codes, in natural order, for any width.
template <int BITS>
struct Natural {
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
  static constexpr f32x8 unscale() {
    f32x8 u{};
    for (int i = 0; i < 8; i++) {
      u[i] = 1.0f / float(1 << shift(i));
    }
    return u;
  }

  // code * 2^shift, each masked where it lies; both halves of `bytes` hold the codes from byte
  // FIRST on.
  template <int FIRST = 0>
  OPTIQ_INLINE static f32x8 scaled(u8x32 bytes) {
// Lane i takes the byte its code starts in and the next one.
#define OPTIQ_BYTE(i) (FIRST + i * BITS / 8)
#define OPTIQ_LANE(i, half) \
  half + OPTIQ_BYTE(i), half + (OPTIQ_BYTE(i) + 1 < 8 ? OPTIQ_BYTE(i) + 1 : 7), 32, 32
    u8x32 gathered = __builtin_shufflevector(bytes, u8x32{}, OPTIQ_LANE(0, 0), OPTIQ_LANE(1, 0),
        OPTIQ_LANE(2, 0), OPTIQ_LANE(3, 0), OPTIQ_LANE(4, 16), OPTIQ_LANE(5, 16), OPTIQ_LANE(6, 16),
        OPTIQ_LANE(7, 16));
#undef OPTIQ_LANE
#undef OPTIQ_BYTE
    return __builtin_convertvector(i32x8(u32x8(gathered) & mask()), f32x8);
  }
};

// The same eight (four) bytes all over.
OPTIQ_INLINE u8x32 splat_bytes(uint64_t word) {
  typedef uint64_t u64x4 __attribute__((vector_size(32)));
  return u8x32(u64x4{word, word, word, word});
}
OPTIQ_INLINE u8x32 splat_bytes(uint32_t word) {
  return u8x32(u32x8{word, word, word, word, word, word, word, word});
}

// Scaling back is exact.
template <int BITS>
OPTIQ_INLINE f32x8 decode_codes(const uint8_t* p) {
  return Natural<BITS>::scaled(splat_bytes(load<uint64_t>(p))) * Natural<BITS>::unscale();
}

// The same where nothing may be read beyond the codes: decoding reads eight bytes.
template <int BITS>
OPTIQ_INLINE f32x8 decode_last_codes(const uint8_t* p) {
  uint8_t word[8] = {};
  std::memcpy(word, p, BITS);
  return decode_codes<BITS>(word);
}

} // namespace optiq::cpu::OPTIQ_ISA
