// Address spaces, scalar and vector types, and the macros of <metal_types>.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

// `constant`, `half` and `kernel` are keywords already; the other spaces have OpenCL spellings.
#define device __global
#define threadgroup __local
#define thread __private

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST constant
#define METAL_THREAD thread
#define METAL_INLINE METAL_FUNC
#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif
#define __HAVE_BFLOAT__ 1
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

// Functions of this library.
#define MSL_FN inline __attribute__((always_inline, nodebug))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;

#ifndef INFINITY
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define HALF_MAX 65504.0h
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_E_F 2.71828182845904523536f
#define M_SQRT2_F 1.41421356237309504880f
#endif
#define M_LN10_F 2.30258509299404568402f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
} // namespace metal

#define MSL_VECTORS(T)           \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
#undef MSL_VECTORS

// A comparison of OpenCL vectors gives an integer vector (0 or -1): there is no vector of bool.
typedef metal::vec<int, 2> bool2;
typedef metal::vec<int, 3> bool3;
typedef metal::vec<int, 4> bool4;

// OpenCL has no bfloat arithmetic of its own, so clang asks for this conversion; libgcc before 13
// lacks it. Round to nearest even; a NaN stays one.
extern "C" __attribute__((weak, nodebug, no_sanitize("thread"))) __bf16 __truncsfbf2(float value) {
  const uint bits = __builtin_bit_cast(uint, value);
  const uint rounded = (bits & 0x7fffffff) > 0x7f800000
                           ? (bits >> 16) | 0x40
                           : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_bit_cast(__bf16, ushort(rounded));
}
