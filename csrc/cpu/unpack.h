// Packed codes -> two or four small integers in each lane, kWide rows of a weight at a time, a row
// per lane.
//
// A row of codes is one little-endian bit stream; 32 codes of b bits fill b words, whatever b is:
// that is a unit. With word j of each row in lane r of vector j, codes whose places differ by a
// slot (8 or 16 bits) modulo 32 are one mask and one shift away from being the integers of a lane.
// So the codes of a unit are taken in the order that is cheapest to unpack, and the activations are
// put into the same order once per call (fixed.h).
#pragma once

#include <array>
#include <utility>

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kUnit = 32;     // codes
constexpr int kBlock = kWide; // words of a row that are transposed at a time

// With so many codes in a lane: vectors that a unit unpacks to, and bits of a slot.
template <int CODES>
constexpr int kVectors = kUnit / CODES;
template <int CODES>
constexpr int kSlot = 32 / CODES;

// f(0), f(1), ... as constants.
template <int N, class F>
OPTIQ_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Widths whose codes never straddle words, with 16 bytes of codes or more in a unit.
template <int BITS>
constexpr bool kWholeWords = BITS == 4 || BITS == 8;

// Of each vector of a unit: the places of its codes, slot by slot.
template <int CODES>
using Order = std::array<std::array<int, CODES>, kVectors<CODES>>;

template <int BITS, int CODES>
constexpr Order<CODES> order_of_codes() {
  Order<CODES> order{};
  bool taken[kUnit] = {};
  for (int i = 0; i < kVectors<CODES>; i++) {
    int first = 0;
    while (taken[first]) {
      first++;
    }
    for (int slot = 0; slot < CODES; slot++) {
      int k = 0;
      if (kWholeWords<BITS>) { // the same places of four words in turn, as add_quads() takes them
        constexpr int places = kWholeWords<BITS> ? kSlot<CODES> / BITS : 1;
        int word = i / (4 * places) * 4 + i % 4;
        k = word * (32 / BITS) + i / 4 % places + slot * places;
      } else {
        int bit = first * BITS % kSlot<CODES> + slot * kSlot<CODES>;
        while (taken[k] || k * BITS % 32 != bit) {
          k++;
        }
      }
      taken[k] = true;
      order[i][slot] = k;
    }
  }
  return order;
}

template <int BITS, int CODES>
constexpr Order<CODES> kOrder = order_of_codes<BITS, CODES>();

// The code at bit `place` of the unit, moved to bit `target` of its lane.
template <int BITS>
OPTIQ_INLINE uw code_at(const uw* words, int place, int target) {
  int word = place / 32, bit = place % 32;
  uw v = bit >= target ? words[word] >> (bit - target) : words[word] << (target - bit);
  if (bit + BITS > 32) {
    v |= words[word + 1] << (32 - bit + target);
  }
  return v & (((1u << BITS) - 1) << target);
}

// The codes at bits [bit, bit + BITS) of each slot of a lane.
template <int BITS, int CODES>
OPTIQ_INLINE uw codes_at(uw words, int bit) {
  if (CODES == 2 && bit + BITS == 16) { // shifted within 16 bits nothing is left to mask
    return uw(u16ww(words) >> bit);
  }
  constexpr uint32_t mask = (1u << BITS) - 1;
  return (words >> bit) & (CODES == 4 ? mask * 0x01010101u : mask * 0x00010001u);
}

// Vector I of a unit.
template <int BITS, int CODES, int I>
OPTIQ_INLINE uw unpack(const uw* words) {
  constexpr std::array<int, CODES> codes = kOrder<BITS, CODES>[I];
  constexpr int bit = codes[0] * BITS % 32, slot_bits = kSlot<CODES>;
  constexpr uint32_t mask = (1u << BITS) - 1;
  if constexpr (kWholeWords<BITS>) {
    return codes_at<BITS, CODES>(words[codes[0] * BITS / 32], bit);
  } else if constexpr (bit + BITS <= slot_bits) { // all shift by the same amount
    uw v = words[codes[0] * BITS / 32] & (mask << bit);
    for (int slot = 1; slot < CODES; slot++) {
      v |= words[codes[slot] * BITS / 32] & (mask << (bit + slot * slot_bits));
    }
    return v >> bit;
  } else {
    uw v = code_at<BITS>(words, codes[0] * BITS, 0);
    for (int slot = 1; slot < CODES; slot++) {
      v |= code_at<BITS>(words, codes[slot] * BITS, slot * slot_bits);
    }
    return v;
  }
}

// kBlock words of kWide rows, `stride` bytes apart -> out[word][row]. The rows hold `available`
// words; what comes after them is undefined.
OPTIQ_INLINE void transpose_words(const uint8_t* row, size_t stride, int available, uw* out) {
  uw block[kBlock];
  for (int r = 0; r < kWide; r++) {
    const uint8_t* p = row + r * stride;
    if (available >= kBlock) {
      block[r] = load<uw>(p);
    } else {
      std::memcpy(&block[r], p, size_t(available) * 4);
    }
  }
  transpose(block);
  for (int j = 0; j < kBlock; j++) {
    out[j] = block[j];
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
