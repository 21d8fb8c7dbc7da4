// Entry points of the runtime (rt/runtime.h) and the barriers.
#pragma once

#include "flags.h"

extern "C" {
void __msl_threadgroup_barrier(uint flags);
void __msl_simdgroup_barrier(uint flags);
// Every live lane of the simdgroup hands in `size` (at most 32) bytes and waits for the others. The
// result points at 32 slots of 32 bytes, valid until this lane's next exchange.
thread const uchar* __msl_exchange(thread const void* mine, uint size, uint op);
uint __msl_lane(void);
uint __msl_active(void); // mask of the lanes that took part in the last exchange
float __msl_sum(float mine);
float __msl_max(float mine);
void __msl_multiply(thread float* six);
threadgroup void* __msl_threadgroup_slot(uint site, uint size, uint align);
ulong __msl_atomic(const volatile void* where, uint size, uint op, ulong operand, ulong expected);
}

namespace metal {
MSL_FN void threadgroup_barrier(mem_flags flags) {
  __msl_threadgroup_barrier(uint(flags));
}
MSL_FN void simdgroup_barrier(mem_flags flags) {
  __msl_simdgroup_barrier(uint(flags));
}
} // namespace metal
