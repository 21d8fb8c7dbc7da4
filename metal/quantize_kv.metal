// Records from vectors; the launches are planned in csrc/launch/attention.cpp. A thread takes one
// group.
#include <metal_stdlib>

#include "kv_shape.h"
#include "records.h"

using namespace metal;

// Threads: 64. Grid: x over vectors times groups.
template <typename X, int BITS, int GROUP>
[[kernel]] void quantize_kv(const device X* vectors [[buffer(0)]],
    device uint* records [[buffer(1)]], constant RecordShape& shape [[buffer(2)]],
    uint thread_index [[thread_position_in_grid]]) {
  const int dim = int(shape.dim), groups = (dim + GROUP - 1) / GROUP;
  const uint vector = thread_index / groups;
  const int group = thread_index % groups;
  if (vector >= shape.vectors) {
    return;
  }
  const int words = (dim * BITS + 31) / 32;
  write_group<BITS, GROUP>(vectors + int64_t(vector) * dim + group * GROUP, dim, group,
      records + int64_t(vector) * (groups + words));
}
