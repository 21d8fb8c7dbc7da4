// Keys and values in few bits. The record of a vector is a row of uint32 words:
//
//   word 0 ... G-1   of each group: its scale (low half) and bias (high half), float16
//   the others       codes, one little-endian bit stream
//
// A value is scale * code + bias. The last group may be a shorter multiple of eight values.
#pragma once

#include "decode.h"
#include "elementwise.h"
#include "quantize_group.h"
#include "widths.h"

namespace optiq::cpu::OPTIQ_ISA {

// The bytes of eight codes, the last of those read. They lie within the record: before the codes is
// a header of one word or more, behind them there may be nothing.
template <int BITS>
OPTIQ_INLINE u8x32 record_bytes(const uint8_t* p) {
  if constexpr (BITS >= 4) {
    return splat_bytes(load<uint64_t>(p + BITS - 8));
  } else {
    return splat_bytes(load<uint32_t>(p + BITS - 4));
  }
}

// Codes times 2^shift.
template <int BITS, int LANES>
OPTIQ_INLINE typename Vector<LANES>::Floats record_codes(const uint8_t* p) {
  constexpr int first = (BITS >= 4 ? 8 : 4) - BITS;
  if constexpr (LANES == 8) {
    return Natural<BITS>::template scaled<first>(record_bytes<BITS>(p));
  } else {
    auto both = [&]<int... BYTE>(std::integer_sequence<int, BYTE...>) {
      return __builtin_shufflevector(record_bytes<BITS>(p), record_bytes<BITS>(p + BITS), BYTE...);
    };
    auto bytes = both(std::make_integer_sequence<int, 64>{});
    return Natural<BITS, 16>::template scaled<first>(bytes);
  }
}

OPTIQ_INLINE Grid record_grid(uint32_t word) {
  u32x8 halves = {word};
  f32x8 both = load_f16(&halves);
  return {both[0], both[1]};
}

template <int BITS, int LANES>
OPTIQ_INLINE void decode_values(const uint8_t* codes, Grid grid, float* out) {
  auto scale = Natural<BITS, LANES>::unscale() * grid.scale;
  store(out, record_codes<BITS, LANES>(codes) * scale + grid.bias);
}

#if defined(__AVX512F__)
// 32 values of four bits, whose bytes need no gathering. The results are those of decode_values().
OPTIQ_INLINE void decode_nibbles(const uint8_t* codes, Grid grid, float* out) {
  __m256i bytes = _mm256_cvtepu8_epi16(load<__m128i>(codes));
  __m256i pairs = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)); // of each byte, low first
  __m256i nibbles = _mm256_and_si256(pairs, _mm256_set1_epi8(0x0f));
  __m128i halves[2] = {_mm256_castsi256_si128(nibbles), _mm256_extracti128_si256(nibbles, 1)};
  for (int i = 0; i < 2; i++) {
    fw values = fw(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(halves[i])));
    store(out + i * kWide, values * grid.scale + grid.bias);
  }
}
#endif

template <int BITS>
OPTIQ_INLINE void decode_record(
    const uint32_t* record, int dim, int groups, int group_size, float* out) {
  auto* codes = reinterpret_cast<const uint8_t*>(record + groups);
  for (int g = 0, i = 0; g < groups; g++) {
    Grid grid = record_grid(record[g]);
    int end = i + group_size < dim ? i + group_size : dim;
    for (; i + 32 <= end; i += 32, codes += 4 * BITS) {
#if defined(__AVX512F__)
      if constexpr (BITS == 4) {
        decode_nibbles(codes, grid, out + i);
        continue;
      }
#endif
#pragma GCC unroll 4
      for (int j = 0; j < 32; j += kWide) {
        decode_values<BITS, kWide>(codes + j / 8 * BITS, grid, out + i + j);
      }
    }
    for (; i < end; i += 8, codes += BITS) {
      decode_values<BITS, 8>(codes, grid, out + i);
    }
  }
}

// Records are independent, so they are shared out among the threads as it suits.
template <class F>
void for_records(const Records& a, F&& one) {
  constexpr size_t each = 64;
  auto task = [&](int t) {
    size_t end = size_t(t + 1) * each < a.count ? size_t(t + 1) * each : a.count;
    for (size_t i = size_t(t) * each; i < end; i++) {
      one(i);
    }
  };
  int tasks = int((a.count + each - 1) / each);
  if (a.count * a.dim < kSerialValues) {
    for (int t = 0; t < tasks; t++) {
      task(t);
    }
  } else {
    parallel_for(tasks, task);
  }
}

// Scale and bias between the least and the largest value of a group, rounded to float16 before
// the codes are derived from them.
inline void quantize_kv(const Records& a) {
  const int groups = (a.dim + a.format.group_size - 1) / a.format.group_size;
  const int words = record_words(a.dim, a.format);
  const float top = float((1 << a.format.bits) - 1);
  const Packer pack(a.format.bits);
  for_records(a, [&](size_t index) {
    uint32_t* record = a.words + index * words;
    record[words - 1] = 0; // its spare bits
    auto* codes = reinterpret_cast<uint8_t*>(record + groups);
    for (int g = 0; g < groups; g++) {
      int begin = g * a.format.group_size, left = a.dim - begin;
      int vectors = (left < a.format.group_size ? left : a.format.group_size) / 8;
      f32x8 x[kMaxGroup / 8];
      for (int i = 0; i < vectors; i++) {
        x[i] = load_float(a.floats, a.type, index * a.dim + begin + 8 * i);
      }
      Range r = range(x, vectors);
      record[g] = f32_to_f16((r.most - r.least) / top) | uint32_t(f32_to_f16(r.least)) << 16;
      Grid grid = record_grid(record[g]);
      for (int i = 0; i < vectors; i++, codes += a.format.bits) {
        f32x8 steps = round((x[i] - grid.bias) / grid.scale);
        pack(grid.scale == 0 ? f32x8{} : clamp(steps, top), codes);
      }
    }
  });
}

// The floats that records stand for, in `type`.
inline void dequantize_kv(const Records& a) {
  const int groups = (a.dim + a.format.group_size - 1) / a.format.group_size;
  const int words = record_words(a.dim, a.format);
  auto* out = static_cast<char*>(const_cast<void*>(a.floats));
  for_records(a, [&](size_t index) {
    Scratch<float> values(a.dim);
    at_width(a.format.bits, [&]<int BITS>(Width<BITS>) {
      decode_record<BITS>(a.words + index * words, a.dim, groups, a.format.group_size, values);
    });
    narrow(values, a.dim, out + index * a.dim * size_of(a.type), a.type);
  });
}

} // namespace optiq::cpu::OPTIQ_ISA
