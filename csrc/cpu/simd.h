// Eight float lanes on every instruction set, by GCC/Clang vector extensions: one source gives
// AVX2, NEON and plain C++. Included once per instruction set, inside namespace OPTIQ_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "types.h"

#define OPTIQ_INLINE inline __attribute__((always_inline))

namespace optiq::cpu::OPTIQ_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));

template <class V>
OPTIQ_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
OPTIQ_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

OPTIQ_INLINE f32x8 splat(float x) {
  return f32x8{x, x, x, x, x, x, x, x};
}

OPTIQ_INLINE f32x8 select(i32x8 mask, f32x8 a, f32x8 b) {
  return f32x8((i32x8(a) & mask) | (i32x8(b) & ~mask));
}

OPTIQ_INLINE f32x8 max(f32x8 a, f32x8 b) {
  return select(a > b, a, b);
}

// Always the same tree, so a sum does not depend on the instruction set.
OPTIQ_INLINE float sum(f32x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

OPTIQ_INLINE float bf16_to_f32(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
OPTIQ_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) {
    return uint16_t((bits >> 16) | 0x40);
  }
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest even, without a 16-bit float type: not every compiler has one.
OPTIQ_INLINE uint16_t f32_to_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) { // 2^16 and above, Inf, NaN
    return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
  }
  if (bits < 0x38800000) { // subnormal: adding 0.5 lines its last bit up with that of a float
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xc8000fff + (bits >> 13 & 1); // exponent from bias 127 to 15, and the rounding
  return uint16_t(sign | bits >> 13);
}

OPTIQ_INLINE f32x8 load_bf16(const void* p) {
  return f32x8(__builtin_convertvector(load<u16x8>(p), u32x8) << 16);
}

OPTIQ_INLINE f32x8 load_f16(const void* p) {
#if defined(__F16C__)
  return f32x8(_mm256_cvtph_ps(load<__m128i>(p)));
#elif defined(__aarch64__)
  auto h = load<float16x8_t>(p);
  f32x8 out;
  store(&out, vcvt_f32_f16(vget_low_f16(h)));
  store(reinterpret_cast<char*>(&out) + 16, vcvt_f32_f16(vget_high_f16(h)));
  return out;
#else
  // Shift exponent and mantissa into place, then rescale by 2^112; exact, subnormals included.
  u32x8 h = __builtin_convertvector(load<u16x8>(p), u32x8);
  u32x8 magnitude = (h & 0x7fff) << 13;
  f32x8 value = f32x8(magnitude) * splat(0x1p112f);
  i32x8 special = i32x8(magnitude) >= 0x0f800000; // Inf and NaN keep an all-ones exponent
  value = select(special, f32x8(magnitude | 0x7f800000), value);
  return f32x8(u32x8(value) | ((h & 0x8000) << 16));
#endif
}

OPTIQ_INLINE f32x8 load_float(const void* base, Float type, size_t i) {
  switch (type) {
    case Float::f32:
      return load<f32x8>(static_cast<const float*>(base) + i);
    case Float::f16:
      return load_f16(static_cast<const uint16_t*>(base) + i);
    default:
      return load_bf16(static_cast<const uint16_t*>(base) + i);
  }
}

// The n < 8 values at the end of an array, the other lanes zero.
OPTIQ_INLINE f32x8 load_tail(const void* base, Float type, size_t i, size_t n) {
  char buffer[32] = {};
  std::memcpy(buffer, static_cast<const char*>(base) + i * size_of(type), n * size_of(type));
  return load_float(buffer, type, 0);
}

// Eight rows of eight become columns.
OPTIQ_INLINE void transpose(f32x8* v) {
#define OPTIQ_SHUFFLE __builtin_shufflevector
  f32x8 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = OPTIQ_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = OPTIQ_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  f32x8 u[8];
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = OPTIQ_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = OPTIQ_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; i++) {
    v[i] = OPTIQ_SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = OPTIQ_SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#undef OPTIQ_SHUFFLE
}

// A cache-line aligned buffer of uninitialised values. (Not std::vector: a standard template
// compiled here with wide instructions could be the copy the linker keeps for everyone.)
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t n)
      : data_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}))) {}
  ~Scratch() {
    ::operator delete(data_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() {
    return data_;
  }

 private:
  T* data_;
};

} // namespace optiq::cpu::OPTIQ_ISA
