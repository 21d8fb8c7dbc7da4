// OpenCL built-in functions, by the names that llvm-spirv turns into SPIR-V operations. The
// default header of clang is not included: its min, max, ... would clash with Metal's.
#pragma once

#define AGX_PURE __attribute__((const))
AGX_PURE float native_exp2(float);
AGX_PURE float native_log2(float);
AGX_PURE float native_sqrt(float);
AGX_PURE float native_rsqrt(float);
AGX_PURE float native_sin(float);
AGX_PURE float native_cos(float);
AGX_PURE float native_recip(float);

// All through exp2 and log2, as the GPU has them.
#define __builtin_expf(x) ::native_exp2((x) * 1.44269504088896340736f)
#define __builtin_exp2f(x) ::native_exp2(x)
#define __builtin_logf(x) (::native_log2(x) * 0.69314718055994530942f)
#define __builtin_log2f(x) ::native_log2(x)
#define __builtin_log10f(x) (::native_log2(x) * 0.30102999566398119521f)
#define __builtin_powf(x, y) ::native_exp2((y) * ::native_log2(x))
#define __builtin_tanhf(x) (1.0f - 2.0f / (__builtin_expf(2.0f * (x)) + 1.0f))
#define __builtin_sqrtf(x) ::native_sqrt(x)
#define __msl_near(value, x) (value)
#define __builtin_sinf(x) ::native_sin(x)
#define __builtin_cosf(x) ::native_cos(x)

// Positions.
AGX_PURE ulong get_group_id(uint);
AGX_PURE ulong get_num_groups(uint);
AGX_PURE ulong get_local_id(uint);
AGX_PURE ulong get_local_size(uint);
AGX_PURE ulong get_global_id(uint);
AGX_PURE ulong get_global_size(uint);
AGX_PURE ulong get_local_linear_id();
AGX_PURE uint get_sub_group_id();
AGX_PURE uint get_sub_group_local_id();
AGX_PURE uint get_num_sub_groups();
