// Apple's internal builtins, which MLX's bf16_math.h calls by name.
#pragma once

#define MSL_BUILTIN_1(name)                   \
  MSL_FN float __metal_##name(float x, int) { \
    return metal::name(x);                    \
  }
#define MSL_BUILTIN_2(name)                            \
  MSL_FN float __metal_##name(float x, float y, int) { \
    return metal::name(x, y);                          \
  }
MSL_BUILTIN_1(fabs)
MSL_BUILTIN_1(acos)
MSL_BUILTIN_1(acosh)
MSL_BUILTIN_1(asin)
MSL_BUILTIN_1(asinh)
MSL_BUILTIN_1(atan)
MSL_BUILTIN_1(atanh)
MSL_BUILTIN_1(ceil)
MSL_BUILTIN_1(cos)
MSL_BUILTIN_1(cosh)
MSL_BUILTIN_1(cospi)
MSL_BUILTIN_1(exp)
MSL_BUILTIN_1(exp10)
MSL_BUILTIN_1(exp2)
MSL_BUILTIN_1(floor)
MSL_BUILTIN_1(fract)
MSL_BUILTIN_1(log)
MSL_BUILTIN_1(log10)
MSL_BUILTIN_1(log2)
MSL_BUILTIN_1(rint)
MSL_BUILTIN_1(round)
MSL_BUILTIN_1(rsqrt)
MSL_BUILTIN_1(sin)
MSL_BUILTIN_1(sinh)
MSL_BUILTIN_1(sinpi)
MSL_BUILTIN_1(sqrt)
MSL_BUILTIN_1(tan)
MSL_BUILTIN_1(tanh)
MSL_BUILTIN_1(tanpi)
MSL_BUILTIN_1(trunc)
MSL_BUILTIN_2(atan2)
MSL_BUILTIN_2(divide)
MSL_BUILTIN_2(fmax)
MSL_BUILTIN_2(fmin)
MSL_BUILTIN_2(fmod)
MSL_BUILTIN_2(pow)
MSL_BUILTIN_2(powr)
#undef MSL_BUILTIN_1
#undef MSL_BUILTIN_2

MSL_FN float __metal_nextafter(float x, float y) {
  return metal::nextafter(x, y);
}
MSL_FN float __metal_fma(float x, float y, float z) {
  return metal::fma(x, y, z);
}
MSL_FN float __metal_fmax3(float a, float b, float c, int) {
  return metal::fmax(metal::fmax(a, b), c);
}
MSL_FN float __metal_fmin3(float a, float b, float c, int) {
  return metal::fmin(metal::fmin(a, b), c);
}
MSL_FN float __metal_fmedian3(float a, float b, float c, int) {
  return metal::fmax(metal::fmin(a, b), metal::fmin(metal::fmax(a, b), c));
}
MSL_FN float __metal_ldexp(float x, int k, int) {
  return __builtin_ldexpf(x, k);
}
MSL_FN float __metal_frexp(float x, thread int* exponent, int = 0) {
  *exponent = x == 0 ? 0 : int(metal::floor(metal::log2(metal::fabs(x)))) + 1;
  return __builtin_ldexpf(x, -*exponent);
}
MSL_FN float __metal_frexp(float x, thread int& exponent, int = 0) {
  return __metal_frexp(x, &exponent, 0);
}
MSL_FN ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}

#define MSL_BUILTIN_SIMD(name)       \
  template <class T>                 \
  MSL_FN T __metal_##name(T value) { \
    return metal::name(value);       \
  }
#define MSL_BUILTIN_SHUFFLE(name)                 \
  template <class T>                              \
  MSL_FN T __metal_##name(T value, ushort lane) { \
    return metal::name(value, lane);              \
  }
#define MSL_BUILTIN_FILL(name)                                            \
  template <class T>                                                      \
  MSL_FN T __metal_##name(T value, T fill, ushort delta, ushort modulo) { \
    return metal::name(value, fill, delta, modulo);                       \
  }
MSL_BUILTIN_SIMD(simd_sum)
MSL_BUILTIN_SIMD(simd_max)
MSL_BUILTIN_SIMD(simd_min)
MSL_BUILTIN_SIMD(simd_product)
MSL_BUILTIN_SIMD(simd_prefix_exclusive_product)
MSL_BUILTIN_SIMD(simd_prefix_exclusive_sum)
MSL_BUILTIN_SIMD(simd_prefix_inclusive_product)
MSL_BUILTIN_SIMD(simd_prefix_inclusive_sum)
MSL_BUILTIN_SHUFFLE(simd_broadcast)
MSL_BUILTIN_SHUFFLE(simd_shuffle)
MSL_BUILTIN_SHUFFLE(simd_shuffle_down)
MSL_BUILTIN_SHUFFLE(simd_shuffle_up)
MSL_BUILTIN_SHUFFLE(simd_shuffle_rotate_down)
MSL_BUILTIN_SHUFFLE(simd_shuffle_rotate_up)
MSL_BUILTIN_SHUFFLE(simd_shuffle_xor)
MSL_BUILTIN_FILL(simd_shuffle_and_fill_down)
MSL_BUILTIN_FILL(simd_shuffle_and_fill_up)
#undef MSL_BUILTIN_SIMD
#undef MSL_BUILTIN_SHUFFLE
#undef MSL_BUILTIN_FILL
MSL_FN float __metal_simd_xor(float value) {
  return as_type<float>(metal::simd_xor(as_type<uint>(value)));
}
