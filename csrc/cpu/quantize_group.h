// What both ways of rounding a group share: MLX's own scale and bias, and the packing of codes.
#pragma once

#include "pool.h"
#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kMaxGroup = 128;

// Exact for |x| < 2^22, to even in the middle; infinities and NaN stay.
template <class V>
OPTIQ_INLINE V round(V x) {
  constexpr float kShift = 12582912.0f; // 1.5 * 2^23
  return (x + kShift) - kShift;
}

// NaN becomes 0.
OPTIQ_INLINE f32x8 clamp(f32x8 x, float top) {
  x = select(x > 0.0f, x, f32x8{});
  return select(x < top, x, splat(top));
}

struct Range {
  float least = __builtin_inff(), most = -__builtin_inff();
};

// NaN is in no range, as in MLX.
OPTIQ_INLINE Range range(const f32x8* w, int vectors) {
  Range r;
  f32x8 low = splat(r.least), high = splat(r.most);
  for (int i = 0; i < vectors; i++) {
    low = select(w[i] < low, w[i], low);
    high = select(w[i] > high, w[i], high);
  }
  for (int j = 0; j < 8; j++) {
    r.least = low[j] < r.least ? low[j] : r.least;
    r.most = high[j] > r.most ? high[j] : r.most;
  }
  return r;
}

struct Grid {
  float scale, bias;
};

// Scale and bias of mx.quantize, operation by operation: the edge of larger magnitude is hit
// exactly, and zero is a code.
OPTIQ_INLINE Grid stock_grid(Range r, float top) {
  bool negative = __builtin_fabsf(r.least) > __builtin_fabsf(r.most);
  float scale = (r.most - r.least) / top;
  scale = scale < 1e-7f ? 1e-7f : scale;
  scale = negative ? scale : -scale;
  float edge = negative ? r.least : r.most;
  float steps = __builtin_rintf(edge / scale);
  return steps != 0 ? Grid{edge / steps, edge} : Grid{scale, 0};
}

OPTIQ_INLINE void store_float(void* base, Float type, size_t i, float x) {
  switch (type) {
    case Float::f32:
      static_cast<float*>(base)[i] = x;
      return;
    case Float::f16:
      static_cast<uint16_t*>(base)[i] = f32_to_f16(x);
      return;
    default:
      static_cast<uint16_t*>(base)[i] = f32_to_bf16(x);
  }
}

// As it will be read again.
OPTIQ_INLINE float stored(Float type, float x) {
  switch (type) {
    case Float::f32:
      return x;
    case Float::bf16:
      return bf16_to_f32(f32_to_bf16(x));
    default: {
      uint16_t half = f32_to_f16(x);
      return load_tail(&half, Float::f16, 0, 1)[0];
    }
  }
}

// Writes groups of eight codes, given as whole floats, as `bits` bytes each.
class Packer {
 public:
  explicit Packer(int bits) : bits_(bits) {
    for (int i = 0; i < 8; i++) {
      shift_[i] = i % 4 * bits;
    }
  }

  // Codes 0-3 and 4-7 are first brought together in a lane each.
  OPTIQ_INLINE void operator()(f32x8 codes, uint8_t* out) const {
    i32x8 v = __builtin_convertvector(codes, i32x8) << shift_;
    v |= __builtin_shufflevector(v, v, 2, 3, 2, 3, 6, 7, 6, 7);
    v |= __builtin_shufflevector(v, v, 1, 1, 1, 1, 5, 5, 5, 5);
    uint64_t word = uint32_t(v[0]) | uint64_t(uint32_t(v[4])) << (4 * bits_);
    std::memcpy(out, &word, bits_);
  }

 private:
  int bits_;
  i32x8 shift_;
};

} // namespace optiq::cpu::OPTIQ_ISA
