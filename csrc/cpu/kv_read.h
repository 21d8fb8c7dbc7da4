// Keys and values as attention takes them, from plain vectors or records: values in rows, keys in
// columns, a key per lane.
#pragma once

#include "kv_records.h"
#include "unpack.h"

namespace optiq::cpu::OPTIQ_ISA {

inline constexpr int padded(int dim) {
  return (dim + kWide - 1) / kWide * kWide;
}

// Some consecutive keys or values of a head, in float32 or float16, `stride` elements apart.
struct Chunk {
  const void* rows;
  size_t stride;
  Float type;
};

// f.template operator()<TYPE>() with the type of the chunk.
template <class F>
OPTIQ_INLINE void of_type(const Chunk& x, F&& f) {
  if (x.type == Float::f32) {
    f.template operator()<Float::f32>();
  } else {
    f.template operator()<Float::f16>();
  }
}

// `n` tokens of a head from the at-th element on, as floats padded(dim) apart.
inline void decode(const Vectors& x, size_t at, int n, int dim, float* out) {
  size_t stride = padded(dim);
  if (x.format.dense()) {
    for (int j = 0; j < n; j++) {
      widen(x.data, x.type, at + j * x.row, dim, out + j * stride);
    }
    return;
  }
  int groups = (dim + x.format.group_size - 1) / x.format.group_size;
  at_width(x.format.bits, [&]<int BITS>(Width<BITS>) {
    for (int j = 0; j < n; j++) {
      auto* record = static_cast<const uint32_t*>(x.data) + at + j * x.row;
      decode_record<BITS>(record, dim, groups, x.format.group_size, out + j * stride);
    }
  });
}

// `n` <= kWide rows, the last one in place of those that are missing, as columns out[dim][kWide].
template <Float TYPE>
void transpose_rows(Chunk x, int n, int dim, float* out) {
  for (int i = 0; i < dim; i += kWide) {
    uw block[kWide];
    for (int r = 0; r < kWide; r++) {
      block[r] = uw(load_wide<TYPE>(x.rows, (r < n ? r : n - 1) * x.stride + i));
    }
    transpose(block);
    for (int j = 0; j < kWide && i + j < dim; j++) {
      store(out + size_t(i + j) * kWide, block[j]);
    }
  }
}

// Words of so many units as fill whole blocks.
constexpr int least_multiple_of_block(int words) {
  int n = words;
  while (n % kBlock) {
    n += words;
  }
  return n;
}

// The same for records, whose words are transposed before their codes are unpacked, a key per lane.
template <int BITS>
void unpack_keys(const uint32_t* first, size_t stride, int n, int dim, int group_size, float* out) {
  const int groups = (dim + group_size - 1) / group_size, count = (dim * BITS + 31) / 32;
  const uint32_t* record[kWide];
  for (int r = 0; r < kWide; r++) {
    record[r] = first + (r < n ? r : n - 1) * stride;
  }
  constexpr int span = least_multiple_of_block(BITS);
  uw words[span];
  fw scale = {}, bias = {};
  for (int at = 0, i = 0; at < count; at += span) {
    for (int begin = 0; begin < span && at + begin < count; begin += kBlock) {
      uw block[kBlock];
      for (int r = 0; r < kWide; r++) {
        block[r] = load_words(record[r] + groups + at + begin, count - at - begin);
      }
      transpose(block);
      for (int j = 0; j < kBlock; j++) {
        words[begin + j] = block[j];
      }
    }
    for (const uw* unit = words; unit < words + span && i < dim; unit += BITS) {
      if (i % group_size == 0) {
        uw header;
        for (int r = 0; r < kWide; r++) {
          header[r] = record[r][i / group_size];
        }
        scale = from_f16(header & 0xffff);
        bias = from_f16(header >> 16);
      }
#pragma GCC unroll 4
      for (int eight = 0; eight < kUnit; eight += 8) {
        if (i == dim) {
          break;
        }
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
          iw codes = iw(code_at<BITS>(unit, (eight + c) * BITS, 0));
          store(out + size_t(i + c) * kWide, __builtin_convertvector(codes, fw) * scale + bias);
        }
        i += 8;
      }
    }
  }
}

} // namespace optiq::cpu::OPTIQ_ISA
