// The functions that Apple's compiler leaves to the GPU, by ours of the same name (air.py). They are
// put where they are called, so that a report names the kernel.
#include <metal_stdlib>
#include <metal_simdgroup>

using namespace metal;

#define SHIM(type, name, label, parameters) \
  extern "C" [[gnu::always_inline]] type name parameters __asm__("air." label); \
  extern "C" type name parameters

SHIM(float, air_fabs, "fabs.f32", (float x)) { return fabs(x); }
SHIM(float, air_round, "round.f32", (float x)) { return round(x); }
SHIM(float, air_fmin, "fmin.f32", (float x, float y)) { return fmin(x, y); }
SHIM(float, air_fmax, "fmax.f32", (float x, float y)) { return fmax(x, y); }
SHIM(float, air_exp, "fast_exp.f32", (float x)) { return exp(x); }
SHIM(int, air_min, "min.s.i32", (int x, int y)) { return min(x, y); }
SHIM(float, air_from_int, "convert.f.f32.s.i32", (int x)) { return float(x); }
SHIM(uchar, air_to_uchar, "convert.u.i8.f.f32", (float x)) { return uchar(x); }
SHIM(uchar, air_defined, "normalize_function_constant_predicate.i8", (uchar x)) { return x != 0; }

SHIM(float, air_simd_sum, "simd_sum.f32", (float x)) { return simd_sum(x); }
SHIM(float, air_simd_min, "simd_min.f32", (float x)) { return simd_min(x); }
SHIM(float, air_simd_max, "simd_max.f32", (float x)) { return simd_max(x); }
SHIM(int, air_simd_sum_int, "simd_sum.s.i32", (int x)) { return simd_sum(x); }
SHIM(int, air_prefix, "simd_prefix_inclusive_sum.s.i32", (int x)) {
  return simd_prefix_inclusive_sum(x);
}
SHIM(int, air_shuffle, "simd_shuffle.s.i32", (int x, ushort lane)) { return simd_shuffle(x, lane); }
SHIM(uchar, air_shuffle_down, "simd_shuffle_down.u.i8", (uchar x, ushort delta)) {
  return simd_shuffle_down(x, delta);
}
SHIM(void, air_barrier, "wg.barrier", (int flags, int scope)) {
  threadgroup_barrier(mem_flags(flags));
}
SHIM(void, air_simdgroup_barrier, "simdgroup.barrier", (int flags, int scope)) {
  simdgroup_barrier(mem_flags(flags));
}
