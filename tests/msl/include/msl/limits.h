// <metal_limits>.
#pragma once

namespace metal {
template <class T>
struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, LOW, HIGH)                 \
  template <>                                            \
  struct numeric_limits<T> {                             \
    static constexpr constant bool is_integer = true;    \
    static constexpr constant bool has_infinity = false; \
    static constexpr T max() {                           \
      return HIGH;                                       \
    }                                                    \
    static constexpr T min() {                           \
      return LOW;                                        \
    }                                                    \
    static constexpr T lowest() {                        \
      return LOW;                                        \
    }                                                    \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(signed char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, -0x7fffffffffffffffL - 1, 0x7fffffffffffffffL)
MSL_INTEGER_LIMITS(ulong, 0, 0xffffffffffffffffUL)
#undef MSL_INTEGER_LIMITS

#define MSL_FLOAT_LIMITS(T, HIGH, TINY, EPSILON, DIGITS) \
  template <>                                            \
  struct numeric_limits<T> {                             \
    static constexpr constant bool is_integer = false;   \
    static constexpr constant bool has_infinity = true;  \
    static constexpr constant int digits = DIGITS;       \
    static constexpr T max() {                           \
      return T(HIGH);                                    \
    }                                                    \
    static constexpr T min() {                           \
      return T(TINY);                                    \
    }                                                    \
    static constexpr T lowest() {                        \
      return T(-(HIGH));                                 \
    }                                                    \
    static constexpr T epsilon() {                       \
      return T(EPSILON);                                 \
    }                                                    \
    static constexpr T infinity() {                      \
      return T(__builtin_inff());                        \
    }                                                    \
    static constexpr T quiet_NaN() {                     \
      return T(__builtin_nanf(""));                      \
    }                                                    \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.192092896e-07f, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 3.3895313892515355e+38f, 1.175494351e-38f, 7.8125e-03f, 8)
#undef MSL_FLOAT_LIMITS
} // namespace metal
