// Eight float lanes on every instruction set, by GCC/Clang vector extensions: one source gives
// AVX2, NEON and plain C++. Included once per instruction set, inside namespace OPTIQ_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "memory.h"
#include "types.h"

#define OPTIQ_INLINE inline __attribute__((always_inline))

namespace optiq::cpu::OPTIQ_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));

// As many lanes as the registers have.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif
typedef float fw __attribute__((vector_size(4 * kWide)));
typedef int32_t iw __attribute__((vector_size(4 * kWide)));
typedef uint32_t uw __attribute__((vector_size(4 * kWide)));
typedef int16_t i16w __attribute__((vector_size(2 * kWide)));
typedef uint16_t u16ww __attribute__((vector_size(4 * kWide)));

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

OPTIQ_INLINE f32x8 min(f32x8 a, f32x8 b) {
  return select(a < b, a, b);
}

OPTIQ_INLINE f32x8 square_root(f32x8 v) {
  for (int i = 0; i < 8; i++) {
    v[i] = __builtin_sqrtf(v[i]);
  }
  return v;
}

#if defined(__AVX512F__)
OPTIQ_INLINE fw max(fw a, fw b) {
  return a > b ? a : b;
}

OPTIQ_INLINE fw min(fw a, fw b) {
  return a < b ? a : b;
}
#endif

// The first n words at p, if that many are in a vector, the others zero.
OPTIQ_INLINE uw load_words(const uint32_t* p, int n) {
  if (n >= kWide) {
    return load<uw>(p);
  }
#if defined(__AVX512F__)
  return uw(_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p));
#else
  uw v{};
  for (int i = 0; i < n; i++) {
    v[i] = p[i];
  }
  return v;
#endif
}

// The first n 16-bit words at p, a word per lane, if that many are in a vector, the others zero.
OPTIQ_INLINE uw load_halves(const uint16_t* p, int n) {
#if defined(__AVX512F__)
  __mmask16 mask = n >= kWide ? 0xffff : __mmask16((1u << n) - 1);
  return uw(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)));
#else
  uint16_t words[kWide] = {};
  std::memcpy(words, p, sizeof(uint16_t) * (n < kWide ? n : kWide));
  uw v;
  for (int i = 0; i < kWide; i++) {
    v[i] = words[i];
  }
  return v;
#endif
}

// acc + the products of the two codes of each lane, 0 to 255, with the signed integers of x.
OPTIQ_INLINE iw dot_pairs(iw acc, uw codes, iw x) {
#if defined(__AVX512VNNI__)
  return iw(_mm512_dpwssd_epi32(__m512i(acc), __m512i(codes), __m512i(x)));
#elif defined(__AVX2__)
  return acc + iw(_mm256_madd_epi16(__m256i(codes), __m256i(x)));
#elif defined(__aarch64__)
  // Two halves of four lanes; each product of eight 16-bit integers is added up in pairs.
  iw out;
  for (int h = 0; h < 32; h += 16) {
    int16x8_t a = load<int16x8_t>(reinterpret_cast<const char*>(&codes) + h);
    int16x8_t b = load<int16x8_t>(reinterpret_cast<const char*>(&x) + h);
    int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
    store(reinterpret_cast<char*>(&out) + h, vpaddq_s32(low, vmull_high_s16(a, b)));
  }
  return acc + out;
#elif defined(__SSE2__)
  // Every x86-64 has it. Spelled out in plain C++ this makes the compiler write 3 MB of code.
  iw out;
  for (int h = 0; h < 32; h += 16) {
    __m128i a = load<__m128i>(reinterpret_cast<const char*>(&codes) + h);
    __m128i b = load<__m128i>(reinterpret_cast<const char*>(&x) + h);
    store(reinterpret_cast<char*>(&out) + h, _mm_madd_epi16(a, b));
  }
  return acc + out;
#else
  return acc + iw(codes & 0xffff) * ((x << 16) >> 16) + iw(codes >> 16) * (x >> 16);
#endif
}

#if defined(__AVX512VNNI__)
// The same of four codes.
OPTIQ_INLINE iw dot_quads(iw acc, uw codes, iw x) {
  return iw(_mm512_dpbusd_epi32(__m512i(acc), __m512i(codes), __m512i(x)));
}
#endif

OPTIQ_INLINE iw splat(int32_t x) {
  return iw{} + x;
}

// The same 16 bytes in every 128 bits.
OPTIQ_INLINE iw splat_quad(const int32_t* p) {
#if defined(__AVX512F__)
  return iw(_mm512_broadcast_i32x4(load<__m128i>(p)));
#else
  return iw{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]};
#endif
}

// 16 bytes from each of kWide / 4 places, `stride` bytes apart.
OPTIQ_INLINE uw load_quads(const uint8_t* p, size_t stride) {
#if defined(__AVX2__)
  auto pair = [&](const uint8_t* q) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(load<__m128i>(q)), load<__m128i>(q + stride), 1);
  };
#if defined(__AVX512F__)
  return uw(_mm512_inserti64x4(_mm512_castsi256_si512(pair(p)), pair(p + 2 * stride), 1));
#else
  return uw(pair(p));
#endif
#else
  uw v;
  for (int i = 0; i < kWide / 4; i++) {
    std::memcpy(reinterpret_cast<char*>(&v) + 16 * i, p + i * stride, 16);
  }
  return v;
#endif
}

// The same for the next kWide / 4 times 16 bytes at once, reading each row in one piece.
OPTIQ_INLINE void load_quads(const uint8_t* p, size_t stride, uw* out) {
#if defined(__AVX512F__)
  auto row = [&](int i) { return load<__m512i>(p + i * stride); };
  __m512i a = _mm512_shuffle_i32x4(row(0), row(1), 0x44);
  __m512i b = _mm512_shuffle_i32x4(row(2), row(3), 0x44);
  __m512i c = _mm512_shuffle_i32x4(row(0), row(1), 0xee);
  __m512i d = _mm512_shuffle_i32x4(row(2), row(3), 0xee);
  out[0] = uw(_mm512_shuffle_i32x4(a, b, 0x88));
  out[1] = uw(_mm512_shuffle_i32x4(a, b, 0xdd));
  out[2] = uw(_mm512_shuffle_i32x4(c, d, 0x88));
  out[3] = uw(_mm512_shuffle_i32x4(c, d, 0xdd));
#else
  for (int i = 0; i < kWide / 4; i++) {
    out[i] = load_quads(p + 16 * i, stride);
  }
#endif
}

// Sums of the four lanes in each 128 bits: lane 4 i + j of the result is the i-th of v[j].
OPTIQ_INLINE iw sum_quads(const iw* v) {
#if defined(__AVX512F__)
  auto add = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
  auto pairs = [&](iw a, iw b) {
    return add(_mm512_unpacklo_epi32(__m512i(a), __m512i(b)),
        _mm512_unpackhi_epi32(__m512i(a), __m512i(b)));
  };
  __m512i low = pairs(v[0], v[1]), high = pairs(v[2], v[3]);
  return iw(add(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high)));
#else
#define OPTIQ_SHUFFLE __builtin_shufflevector
  iw low = OPTIQ_SHUFFLE(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
           OPTIQ_SHUFFLE(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  iw high = OPTIQ_SHUFFLE(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
            OPTIQ_SHUFFLE(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  return OPTIQ_SHUFFLE(low, high, 0, 1, 8, 9, 4, 5, 12, 13) +
         OPTIQ_SHUFFLE(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
#undef OPTIQ_SHUFFLE
#endif
}

OPTIQ_INLINE int32_t max_lane(iw v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(__m512i(v));
#else
  int32_t m = v[0];
  for (int i = 1; i < kWide; i++) {
    m = v[i] > m ? v[i] : m;
  }
  return m;
#endif
}

OPTIQ_INLINE int32_t sum_lanes(iw v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(__m512i(v));
#else
  int32_t s = 0;
  for (int i = 0; i < kWide; i++) {
    s += v[i];
  }
  return s;
#endif
}

// Always the same tree, so a sum does not depend on the instruction set.
OPTIQ_INLINE float sum(f32x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

#if defined(__AVX512F__)
OPTIQ_INLINE float sum(fw v) {
  return sum(load<f32x8>(&v) + load<f32x8>(reinterpret_cast<float*>(&v) + 8));
}
#endif

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

OPTIQ_INLINE float f16_to_f32(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint16_t halves[8] = {h};
  return load_f16(halves)[0];
#endif
}

// Each lane from the float16 in its low half.
OPTIQ_INLINE fw from_f16(uw halves) {
#if defined(__AVX512F__)
  return fw(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(__m512i(halves))));
#else
  uint16_t packed[kWide];
  for (int i = 0; i < kWide; i++) {
    packed[i] = uint16_t(halves[i]);
  }
  fw out;
  for (int i = 0; i < kWide; i += 8) {
    store(reinterpret_cast<float*>(&out) + i, load_f16(packed + i));
  }
  return out;
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

// kWide values; TYPE is f32 or f16.
template <Float TYPE>
OPTIQ_INLINE fw load_wide(const void* base, size_t i) {
  if constexpr (TYPE == Float::f32) {
    return load<fw>(static_cast<const float*>(base) + i);
  } else {
#if defined(__AVX512F__)
    return fw(_mm512_cvtph_ps(load<__m256i>(static_cast<const uint16_t*>(base) + i)));
#else
    return load_float(base, TYPE, i);
#endif
  }
}

// The n < 8 values at the end of an array, the other lanes zero.
OPTIQ_INLINE f32x8 load_tail(const void* base, Float type, size_t i, size_t n) {
  char buffer[32] = {};
  std::memcpy(buffer, static_cast<const char*>(base) + i * size_of(type), n * size_of(type));
  return load_float(buffer, type, 0);
}

// n values from the at-th on.
inline void widen(const void* in, Float type, size_t at, size_t n, float* out) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    store(out + i, load_float(in, type, at + i));
  }
  if (i < n) {
    f32x8 tail = load_tail(in, type, at + i, n - i);
    std::memcpy(out + i, &tail, (n - i) * sizeof(float));
  }
}

// The inverse, rounded.
inline void narrow(const float* in, size_t n, void* out, Float type) {
  if (type == Float::f32) {
    std::memcpy(out, in, n * sizeof(float));
    return;
  }
  auto* halves = static_cast<uint16_t*>(out);
  size_t i = 0;
#if defined(__F16C__)
  for (; type == Float::f16 && i + 8 <= n; i += 8) {
    store(halves + i, _mm256_cvtps_ph(__m256(load<f32x8>(in + i)), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; i++) {
    halves[i] = type == Float::bf16 ? f32_to_bf16(in[i]) : f32_to_f16(in[i]);
  }
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

// kWide rows of kWide words become columns.
OPTIQ_INLINE void transpose(uw* v) {
#if defined(__AVX512F__)
  // Pairs of words, then pairs of pairs within 128 bits; then the 128-bit pieces themselves.
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(__m512i(v[i]), __m512i(v[i + 1]));
    t[i + 1] = _mm512_unpackhi_epi32(__m512i(v[i]), __m512i(v[i + 1]));
  }
  for (int i = 0; i < 16; i += 4) { // u[i + j] holds word j of each piece of rows i .. i + 3
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88),
            b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88),
            d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    v[j] = uw(_mm512_shuffle_i32x4(a, c, 0x88));
    v[4 + j] = uw(_mm512_shuffle_i32x4(b, d, 0x88));
    v[8 + j] = uw(_mm512_shuffle_i32x4(a, c, 0xdd));
    v[12 + j] = uw(_mm512_shuffle_i32x4(b, d, 0xdd));
  }
#else
  f32x8 t[8];
  std::memcpy(t, v, sizeof(t));
  transpose(t);
  std::memcpy(v, t, sizeof(t));
#endif
}

// A cache-line aligned buffer of uninitialised values. (Not std::vector: a standard template
// compiled here with wide instructions could be the copy the linker keeps for everyone.)
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t n) : bytes_(n * sizeof(T)), data_(static_cast<T*>(take_memory(bytes_))) {}
  ~Scratch() {
    give_memory(data_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const {
    return data_;
  }

 private:
  size_t bytes_;
  T* data_;
};

} // namespace optiq::cpu::OPTIQ_ISA
