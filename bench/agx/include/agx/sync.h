#pragma once

#include "msl/flags.h"

void barrier(uint flags);           // 1: threadgroup memory, 2: device memory
void sub_group_barrier(uint flags); // the same

extern "C" {
// compiler.py puts a workgroup variable in place of the call.
threadgroup void* __msl_threadgroup_slot(uint site, uint size, uint align);
// Never called, but named by headers that must parse.
void __msl_multiply(thread float* six);
ulong __msl_atomic(const volatile void* where, uint size, uint op, ulong operand, ulong expected);
}
MSL_FN uint __msl_lane() {
  return get_sub_group_local_id();
}

namespace metal {
MSL_FN constexpr uint _fence(mem_flags flags) {
  return ((uint(flags) & 2) ? 1 : 0) | ((uint(flags) & 1) ? 2 : 0);
}
MSL_FN void threadgroup_barrier(mem_flags flags) {
  ::barrier(_fence(flags));
}
MSL_FN void simdgroup_barrier(mem_flags flags) {
  ::sub_group_barrier(_fence(flags));
}
} // namespace metal
