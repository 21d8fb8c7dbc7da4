// Affine codes -> float lanes, for tiles of dequantized weights.
//
// A row of codes is one little-endian bit stream, so eight codes of b bits fill b bytes.
#pragma once

#include <utility>

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

template <int LANES>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
};

// Consecutive codes in natural order, for any width; eight of them fill as many bytes as bits.
template <int BITS, int LANES = 8>
struct Natural {
  using V = Vector<LANES>;

  // Bit offset of lane i inside the two bytes gathered for it.
  static constexpr int shift(int i) {
    return i % 8 * BITS % 8;
  }
  static constexpr typename V::Words mask() {
    typename V::Words m{};
    for (int i = 0; i < LANES; i++) {
      m[i] = ((1u << BITS) - 1) << shift(i);
    }
    return m;
  }
  static constexpr typename V::Floats unscale() {
    typename V::Floats u{};
    for (int i = 0; i < LANES; i++) {
      u[i] = 1.0f / float(1 << shift(i));
    }
    return u;
  }

  // code * 2^shift, each masked where it lies; both halves of each 256 bits hold the eight codes
  // of their lanes from byte FIRST on.
  template <int FIRST = 0>
  OPTIQ_INLINE static typename V::Floats scaled(typename V::Bytes bytes) {
    auto gathered = gather<FIRST>(bytes, std::make_integer_sequence<int, 4 * LANES>{});
    using Words = typename V::Words;
    using Ints = typename V::Ints;
    return __builtin_convertvector(Ints(Words(gathered) & mask()), typename V::Floats);
  }

 private:
  // Lane i takes the byte its code starts in and the next one; its upper half will be masked.
  template <int FIRST>
  static constexpr int source(int byte) {
    int lane = byte / 4, of_lane = byte % 4;
    int from = FIRST + lane % 8 * BITS / 8 + of_lane;
    return of_lane > 1 ? -1 : lane / 4 * 16 + (from < 8 ? from : 7);
  }

  template <int FIRST, int... BYTE>
  OPTIQ_INLINE static typename V::Bytes gather(
      typename V::Bytes bytes, std::integer_sequence<int, BYTE...>) {
    return __builtin_shufflevector(bytes, bytes, source<FIRST>(BYTE)...);
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
