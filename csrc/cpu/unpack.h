// Packed codes -> pairs of 16-bit integers, kWide rows of a weight at a time, a row per lane.
//
// A row of codes is one little-endian bit stream; 32 codes of b bits fill b words, whatever b is:
// that is a unit. With word j of each row in lane r of vector j, a pair of codes whose places
// differ by 16 bits modulo 32 is one mask and one shift away from being two 16-bit integers of
// its lane. So the codes of a unit are paired in the order that is cheapest to unpack, and the
// activations are put into the same order once per call (fixed.h).
#pragma once

#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kUnit = 32;         // codes
constexpr int kPairs = kUnit / 2; // vectors they unpack to
constexpr int kBlock = kWide;     // words of a row that are transposed at a time

struct CodePair {
  int low, high; // places in the unit
};

// Widths whose codes never straddle words, with 16 bytes of codes or more in a unit.
template <int BITS>
constexpr bool kWholeWords = BITS == 4 || BITS == 8;

// The codes of the i-th vector of a unit.
template <int BITS>
constexpr CodePair code_pair(int i) {
  // Codes this far apart lie 16 bits apart modulo 32.
  constexpr int distance = BITS % 2 ? 16 : BITS == 6 ? 8 : 16 / BITS;
  if (kWholeWords<BITS>) { // the same places of four words in turn, as dot_row() takes them
    int quad = i / (4 * distance), place = i / 4 % distance, word = i % 4;
    int k = (4 * quad + word) * 2 * distance + place;
    return {k, k + distance};
  }
  int k = i / distance * 2 * distance + i % distance;
  return {k, k + distance};
}

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

// The codes at bits [bit, bit + BITS) of both halves of a lane.
template <int BITS>
OPTIQ_INLINE iw codes_at(uw words, int bit) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  if (bit + BITS == 16) { // shifted within 16 bits nothing is left to mask
    return iw(u16ww(words) >> bit);
  }
  return iw((words >> bit) & (mask | mask << 16));
}

template <int BITS>
OPTIQ_INLINE iw unpack(const uw* words, int i) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  CodePair codes = code_pair<BITS>(i);
  int low = codes.low * BITS, high = codes.high * BITS;
  int bit = low % 32;
  if (bit + BITS <= 16) { // both shift by the same amount
    const uw& a = words[low / 32];
    const uw& b = words[high / 32];
    if (low / 32 == high / 32) {
      return codes_at<BITS>(a, bit);
    }
    return iw(((a & (mask << bit)) | (b & (mask << (bit + 16)))) >> bit);
  }
  return iw(code_at<BITS>(words, low, 0) | code_at<BITS>(words, high, 16));
}

constexpr int least_multiple_of_block(int words) {
  int n = words;
  while (n % kBlock) {
    n += words;
  }
  return n;
}

// `count` words of kWide rows, `stride` bytes apart -> out[word][row], in whole blocks. The rows
// hold `available` words; what a block takes beyond them is undefined.
OPTIQ_INLINE void transpose_words(
    const uint8_t* row, size_t stride, int count, int available, uw* out) {
  for (int at = 0; at < count; at += kBlock) {
    uw block[kBlock];
    for (int r = 0; r < kWide; r++) {
      const uint8_t* p = row + r * stride + 4 * at;
      if (at + kBlock <= available) {
        block[r] = load<uw>(p);
      } else {
        std::memcpy(&block[r], p, size_t(available - at) * 4);
      }
    }
    transpose(block);
    for (int j = 0; j < kBlock; j++) {
      out[at + j] = block[j];
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
