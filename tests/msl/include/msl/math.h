// <metal_math> and <metal_geometric>: float and half, scalar and vector.
//
// As in Metal there is no overload for bfloat: convert to float. Functions are libm's, exact where
// Apple's are approximate; on another chip than 0 they are off by up to 2 ulp (__msl_near).
#pragma once

#ifndef __msl_near
extern "C" {
float __msl_near(float value, float x); // what a chip may make of a function of x
}
#endif

namespace metal {
#define MSL_UNARY_FOR(T, name, expression) \
  MSL_FN T name(T value) {                 \
    const float x = float(value);          \
    return T(expression);                  \
  }
#define MSL_UNARY(name, expression)      \
  MSL_UNARY_FOR(float, name, expression) \
  MSL_UNARY_FOR(half, name, expression)  \
  template <class T, int N>              \
  MSL_FN vec<T, N> name(vec<T, N> v) {   \
    for (int i = 0; i < N; i++) {        \
      v[i] = name(T(v[i]));              \
    }                                    \
    return v;                            \
  }
#define MSL_BINARY_FOR(T, name, expression)        \
  MSL_FN T name(T left, T right) {                 \
    const float x = float(left), y = float(right); \
    return T(expression);                          \
  }
#define MSL_BINARY(name, expression)                \
  MSL_BINARY_FOR(float, name, expression)           \
  MSL_BINARY_FOR(half, name, expression)            \
  template <class T, int N>                         \
  MSL_FN vec<T, N> name(vec<T, N> v, vec<T, N> w) { \
    for (int i = 0; i < N; i++) {                   \
      v[i] = name(T(v[i]), T(w[i]));                \
    }                                               \
    return v;                                       \
  }

#define MSL_APPROXIMATE(name, expression) MSL_UNARY(name, __msl_near(expression, x))

#define MSL_MATH                                                          \
  MSL_APPROXIMATE(exp, __builtin_expf(x))                                 \
  MSL_APPROXIMATE(exp2, __builtin_exp2f(x))                               \
  MSL_APPROXIMATE(exp10, __builtin_powf(10.0f, x))                        \
  MSL_APPROXIMATE(log, __builtin_logf(x))                                 \
  MSL_APPROXIMATE(log2, __builtin_log2f(x))                               \
  MSL_APPROXIMATE(log10, __builtin_log10f(x))                             \
  MSL_UNARY(sqrt, __builtin_sqrtf(x))                                     \
  MSL_APPROXIMATE(rsqrt, 1.0f / __builtin_sqrtf(x))                       \
  MSL_APPROXIMATE(sin, __builtin_sinf(x))                                 \
  MSL_APPROXIMATE(cos, __builtin_cosf(x))                                 \
  MSL_APPROXIMATE(tan, __builtin_tanf(x))                                 \
  MSL_APPROXIMATE(asin, __builtin_asinf(x))                               \
  MSL_APPROXIMATE(acos, __builtin_acosf(x))                               \
  MSL_APPROXIMATE(atan, __builtin_atanf(x))                               \
  MSL_APPROXIMATE(sinh, __builtin_sinhf(x))                               \
  MSL_APPROXIMATE(cosh, __builtin_coshf(x))                               \
  MSL_APPROXIMATE(tanh, __builtin_tanhf(x))                               \
  MSL_APPROXIMATE(asinh, __builtin_asinhf(x))                             \
  MSL_APPROXIMATE(acosh, __builtin_acoshf(x))                             \
  MSL_APPROXIMATE(atanh, __builtin_atanhf(x))                             \
  MSL_APPROXIMATE(sinpi, __builtin_sinf(x* M_PI_F))                       \
  MSL_APPROXIMATE(cospi, __builtin_cosf(x* M_PI_F))                       \
  MSL_APPROXIMATE(tanpi, __builtin_tanf(x* M_PI_F))                       \
  MSL_UNARY(floor, __builtin_floorf(x))                                   \
  MSL_UNARY(ceil, __builtin_ceilf(x))                                     \
  MSL_UNARY(trunc, __builtin_truncf(x))                                   \
  MSL_UNARY(round, __builtin_roundf(x))                                   \
  MSL_UNARY(rint, __builtin_rintf(x))                                     \
  MSL_UNARY(fabs, __builtin_fabsf(x))                                     \
  MSL_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0.99999994f)) \
  MSL_BINARY(atan2, __msl_near(__builtin_atan2f(x, y), x))                \
  MSL_BINARY(pow, __msl_near(__builtin_powf(x, y), x))                    \
  MSL_BINARY(powr, __msl_near(__builtin_powf(x, y), x))                   \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                                 \
  MSL_BINARY(fmin, __builtin_fminf(x, y))                                 \
  MSL_BINARY(fmax, __builtin_fmaxf(x, y))                                 \
  MSL_BINARY(fdim, __builtin_fdimf(x, y))                                 \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))                         \
  MSL_BINARY(divide, x / y)                                               \
  MSL_FN float fma(float x, float y, float z) {                           \
    return __builtin_fmaf(x, y, z);                                       \
  }                                                                       \
  MSL_FN half fma(half x, half y, half z) {                               \
    return half(__builtin_fmaf(float(x), float(y), float(z)));            \
  }                                                                       \
  template <class T, int N>                                               \
  MSL_FN vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {           \
    for (int i = 0; i < N; i++) {                                         \
      x[i] = fma(T(x[i]), T(y[i]), T(z[i]));                              \
    }                                                                     \
    return x;                                                             \
  }
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}
#undef MSL_MATH
#undef MSL_APPROXIMATE
#undef MSL_UNARY
#undef MSL_UNARY_FOR
#undef MSL_BINARY
#undef MSL_BINARY_FOR

MSL_FN float nextafter(float x, float y) {
  return __builtin_nextafterf(x, y);
}
MSL_FN float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
MSL_FN half ldexp(half x, int k) {
  return half(__builtin_ldexpf(float(x), k));
}

// A NaN loses to a number, as in Metal's fmin and fmax.
#define MSL_FLOAT(T)                                  \
  MSL_FN constexpr T max(T a, T b) {                  \
    return b != b ? a : (a < b || a != a) ? b : a;    \
  }                                                   \
  MSL_FN constexpr T min(T a, T b) {                  \
    return b != b ? a : (b < a || a != a) ? b : a;    \
  }                                                   \
  MSL_FN constexpr T clamp(T x, T low, T high) {      \
    return min(max(x, low), high);                    \
  }                                                   \
  MSL_FN T abs(T a) {                                 \
    return T(__builtin_fabsf(float(a)));              \
  }                                                   \
  MSL_FN T saturate(T a) {                            \
    return clamp(a, T(0), T(1));                      \
  }                                                   \
  MSL_FN T sign(T a) {                                \
    return a > T(0) ? T(1) : a < T(0) ? T(-1) : T(0); \
  }                                                   \
  MSL_FN T mix(T a, T b, T t) {                       \
    return a + (b - a) * t;                           \
  }                                                   \
  MSL_FN bool isnan(T x) {                            \
    return x != x;                                    \
  }                                                   \
  MSL_FN bool isinf(T x) {                            \
    return __builtin_isinf(float(x));                 \
  }                                                   \
  MSL_FN bool isfinite(T x) {                         \
    return __builtin_isfinite(float(x));              \
  }                                                   \
  MSL_FN bool signbit(T x) {                          \
    return __builtin_signbit(float(x));               \
  }
MSL_FLOAT(float)
MSL_FLOAT(half)
#undef MSL_FLOAT

MSL_FN bool isnan(bfloat x) {
  return float(x) != float(x);
}
MSL_FN bool isinf(bfloat x) {
  return __builtin_isinf(float(x));
}

template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) {
    sum += a[i] * b[i];
  }
  return sum;
}
template <class T, int N>
MSL_FN T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
MSL_FN T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
} // namespace metal
