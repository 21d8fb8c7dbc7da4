// A weight in the order in which products read it, one stream of memory for each task. Of each
// kWide rows, group after group: the words of the group, kWide rows side by side, then their scales
// and biases; those of 16 bits are the halves of a word. It takes as many bytes as the weight.
#pragma once

#include "unpack.h"

namespace optiq::cpu::OPTIQ_ISA {

inline bool can_tile(const Weight& w) {
  return !w.dense() && w.rows % kWide == 0;
}

inline int words_of_group(const Weight& w) {
  return w.format.group_size / 32 * w.format.bits;
}
inline size_t vectors_of_group(const Weight& w) {
  return size_t(words_of_group(w)) + (w.type == Float::f32 ? 2 : 1);
}

// f(first row, what a tile of `tiled` begins with, which is a pointer to uw).
template <class Vectors, class F>
void each_tile(const Weight& w, Vectors* tiled, F&& f) {
  for (int row = 0; row < w.rows; row += kWide) {
    f(size_t(row), tiled);
    tiled += w.groups() * vectors_of_group(w);
  }
}

inline void tile(const Weight& w, void* tiled) {
  size_t words = words_of_group(w), each = vectors_of_group(w), in_row = w.groups() * words;
  each_tile(w, static_cast<uw*>(tiled), [&](size_t first, uw* out) {
    auto* rows = static_cast<const uint8_t*>(w.data) + first * w.row_bytes();
    for (size_t at = 0; at < in_row; at += kBlock) {
      uw block[kBlock];
      transpose_words(rows + 4 * at, w.row_bytes(), int(in_row - at), block);
      for (size_t i = at; i < at + kBlock && i < in_row; i++) {
        store(out + i / words * each + i % words, block[i - at]);
      }
    }
    for (size_t g = 0; g < w.groups(); g++) {
      uw last[2] = {};
      for (int r = 0; r < kWide; r++) {
        size_t at = (first + r) * w.groups() + g;
        if (w.type == Float::f32) {
          last[0][r] = static_cast<const uint32_t*>(w.scales)[at];
          last[1][r] = static_cast<const uint32_t*>(w.biases)[at];
        } else {
          last[0][r] = static_cast<const uint16_t*>(w.scales)[at] |
                       uint32_t(static_cast<const uint16_t*>(w.biases)[at]) << 16;
        }
      }
      for (size_t i = words; i < each; i++) {
        store(out + g * each + i, last[i - words]);
      }
    }
  });
}

inline void untile(const Weight& w, void* codes, void* scales, void* biases) {
  size_t words = words_of_group(w), each = vectors_of_group(w), in_row = w.groups() * words;
  each_tile(w, static_cast<const uw*>(w.data), [&](size_t first, const uw* in) {
    for (size_t r = 0; r < kWide; r++) {
      auto* row = static_cast<uint32_t*>(codes) + (first + r) * in_row;
      for (size_t g = 0; g < w.groups(); g++) {
        const uw* group = in + g * each;
        for (size_t i = 0; i < words; i++) {
          row[g * words + i] = group[i][r];
        }
        size_t at = (first + r) * w.groups() + g;
        if (w.type == Float::f32) {
          static_cast<uint32_t*>(scales)[at] = group[words][r];
          static_cast<uint32_t*>(biases)[at] = group[words + 1][r];
        } else {
          static_cast<uint16_t*>(scales)[at] = uint16_t(group[words][r]);
          static_cast<uint16_t*>(biases)[at] = uint16_t(group[words][r] >> 16);
        }
      }
    }
  });
}

} // namespace optiq::cpu::OPTIQ_ISA
