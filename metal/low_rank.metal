// x @ a @ b with the term in the slot of each row; the launches are planned in
// csrc/launch/low_rank.cpp. A row's sums have one order, whatever rows stand beside it.
#include <metal_stdlib>

#include "low_rank_shape.h"

using namespace metal;

// h = x @ a. Threads: 256. Grid: x over ranks in eights, y over rows. Eight threads side by side
// read eight ranks at one input, and the 32 such groups take inputs in turn.
template <typename T>
[[kernel]] void low_rank_down(const device float* x [[buffer(0)]], const device T* a [[buffer(1)]],
    const device uint* slots [[buffer(2)]], device float* h [[buffer(3)]],
    constant LowRankShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[8][8];
  const uint slot = slots[group.y];
  if (slot == 0 || slot >= uint(shape.slots)) { // the same in all threads; low_rank_up knows
    return;
  }
  const int rank = int(group.x) * 8 + int(index % 8);
  const device float* row = x + size_t(group.y) * shape.in;
  const device T* column = a + size_t(slot) * shape.in * shape.rank + rank;
  float sum = 0;
  for (int k = int(index / 8); k < shape.in; k += 32) {
    sum = fma(row[k], float(column[size_t(k) * shape.rank]), sum);
  }
  sum += simd_shuffle_xor(sum, ushort(8));
  sum += simd_shuffle_xor(sum, ushort(16));
  if (lane < 8) {
    sums[simdgroup][lane] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index < 8) {
    float total = 0;
    for (int i = 0; i < 8; i++) {
      total += sums[i][index];
    }
    h[size_t(group.y) * shape.rank + rank] = total;
  }
}

// y = h @ b. Threads: 256. Grid: x over outputs, y over rows.
template <typename T>
[[kernel]] void low_rank_up(const device float* h [[buffer(0)]], const device T* b [[buffer(1)]],
    const device uint* slots [[buffer(2)]], device float* y [[buffer(3)]],
    constant LowRankShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const int n = int(group.x * 256 + index);
  if (n >= shape.out) {
    return;
  }
  const uint slot = slots[group.y];
  float sum = slot < uint(shape.slots) ? 0.0f : NAN; // not a crash, and visible in the result
  if (slot > 0 && slot < uint(shape.slots)) {
    const device float* row = h + size_t(group.y) * shape.rank;
    const device T* column = b + size_t(slot) * shape.rank * shape.out + n;
    for (int r = 0; r < shape.rank; r++) {
      sum = fma(row[r], float(column[size_t(r) * shape.out]), sum);
    }
  }
  y[size_t(group.y) * shape.out + n] = sum;
}
