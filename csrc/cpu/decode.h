// Affine codes -> float lanes, for tiles of dequantized weights.
//
// A row of codes is one little-endian bit stream, so eight codes of b bits fill b bytes.
#pragma once

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

// Eight consecutive codes at a time, in natural order, for any width.
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
};

// Each code is masked where it lies, giving code * 2^shift, and scaled back; both are exact.
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

// The same where nothing may be read beyond the codes: decoding reads eight bytes.
template <int BITS>
OPTIQ_INLINE f32x8 decode_last_codes(const uint8_t* p) {
  uint8_t word[8] = {};
  std::memcpy(word, p, BITS);
  return decode_codes<BITS>(word);
}

} // namespace optiq::cpu::OPTIQ_ISA
