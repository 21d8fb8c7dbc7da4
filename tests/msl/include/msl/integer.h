// <metal_integer>, <metal_relational> and <metal_pack>; min, max, clamp and abs on vectors.
#pragma once

namespace metal {
// One overload a type, as Metal has it: max(int, uint) is ambiguous there and here.
#define MSL_ORDER(T)                             \
  MSL_FN constexpr T max(T a, T b) {             \
    return a < b ? b : a;                        \
  }                                              \
  MSL_FN constexpr T min(T a, T b) {             \
    return b < a ? b : a;                        \
  }                                              \
  MSL_FN constexpr T clamp(T x, T low, T high) { \
    return min(max(x, low), high);               \
  }
#define MSL_SIGNED(T)           \
  MSL_ORDER(T)                  \
  MSL_FN constexpr T abs(T a) { \
    return a < 0 ? T(-a) : a;   \
  }
MSL_SIGNED(char)
MSL_SIGNED(short)
MSL_SIGNED(int)
MSL_SIGNED(long)
MSL_ORDER(uchar)
MSL_ORDER(ushort)
MSL_ORDER(uint)
MSL_ORDER(ulong)
#undef MSL_ORDER
#undef MSL_SIGNED

#define MSL_ELEMENTWISE(name)                       \
  template <class T, int N>                         \
  MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b) { \
    for (int i = 0; i < N; i++) {                   \
      a[i] = name(T(a[i]), T(b[i]));                \
    }                                               \
    return a;                                       \
  }                                                 \
  template <class T, int N>                         \
  MSL_FN vec<T, N> name(vec<T, N> a, T b) {         \
    return name(a, vec<T, N>(b));                   \
  }
MSL_ELEMENTWISE(max)
MSL_ELEMENTWISE(min)
#undef MSL_ELEMENTWISE
template <class T, int N>
MSL_FN vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) {
    a[i] = abs(T(a[i]));
  }
  return a;
}
template <class T, int N>
MSL_FN vec<T, N> clamp(vec<T, N> a, vec<T, N> low, vec<T, N> high) {
  return min(max(a, low), high);
}
template <class T, int N>
MSL_FN vec<T, N> clamp(vec<T, N> a, T low, T high) {
  return min(max(a, vec<T, N>(low)), vec<T, N>(high));
}
template <class T>
MSL_FN T max3(T a, T b, T c) {
  return max(max(a, b), c);
}
template <class T>
MSL_FN T min3(T a, T b, T c) {
  return min(min(a, b), c);
}

template <class T>
MSL_FN T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class C, int N>
MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  for (int i = 0; i < N; i++) {
    a[i] = c[i] ? b[i] : a[i];
  }
  return a;
}
template <class C, int N>
MSL_FN bool any(vec<C, N> a) {
  bool found = false;
  for (int i = 0; i < N; i++) {
    found |= a[i] != 0;
  }
  return found;
}
template <class C, int N>
MSL_FN bool all(vec<C, N> a) {
  bool every = true;
  for (int i = 0; i < N; i++) {
    every &= a[i] != 0;
  }
  return every;
}

MSL_FN int popcount(int x) {
  return __builtin_popcount(uint(x));
}
MSL_FN uint popcount(uint x) {
  return __builtin_popcount(x);
}
MSL_FN ulong popcount(ulong x) {
  return __builtin_popcountl(x);
}
MSL_FN uint clz(uint x) {
  return x ? __builtin_clz(x) : 32;
}
MSL_FN uint ctz(uint x) {
  return x ? __builtin_ctz(x) : 32;
}
MSL_FN uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1);
}
MSL_FN int extract_bits(int x, uint offset, uint bits) {
  return bits == 0 ? 0 : int(uint(x) << (32 - bits - offset)) >> (32 - bits);
}
MSL_FN uint mulhi(uint a, uint b) {
  return uint((ulong(a) * b) >> 32);
}
MSL_FN int mulhi(int a, int b) {
  return int((long(a) * b) >> 32);
}

MSL_FN float4 unpack_unorm4x8_to_float(uint packed) {
  float4 unpacked;
  for (int i = 0; i < 4; i++) {
    unpacked[i] = float((packed >> (8 * i)) & 255) / 255.0f;
  }
  return unpacked;
}
MSL_FN float4 unpack_snorm4x8_to_float(uint packed) {
  float4 unpacked;
  for (int i = 0; i < 4; i++) {
    unpacked[i] = max(float(char((packed >> (8 * i)) & 255)) / 127.0f, -1.0f);
  }
  return unpacked;
}
} // namespace metal
