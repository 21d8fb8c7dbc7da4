// Records from vectors, bit for bit as quantize_kv in python/optiq/ops/attention.py; the launches
// are planned in csrc/launch/attention.cpp. A thread takes one group.
#include <metal_stdlib>

#include "kv_shape.h"

using namespace metal;

// Threads: 64. Grid: x over vectors times groups.
template <typename X, int BITS, int GROUP>
[[kernel]] void quantize_kv(const device X* vectors [[buffer(0)]],
    device uint* records [[buffer(1)]], constant RecordShape& shape [[buffer(2)]],
    uint thread_index [[thread_position_in_grid]]) {
  constexpr float top = float((1 << BITS) - 1);
  const int dim = int(shape.dim), groups = (dim + GROUP - 1) / GROUP;
  const uint vector = thread_index / groups;
  const int group = thread_index % groups;
  if (vector >= shape.vectors) {
    return;
  }
  const int words = (dim * BITS + 31) / 32;
  const device X* x = vectors + int64_t(vector) * dim + group * GROUP;
  device uint* record = records + int64_t(vector) * (groups + words);
  const int n = min(GROUP, dim - group * GROUP);

  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < n; i++) {
    low = min(low, float(x[i]));
    high = max(high, float(x[i]));
  }
  const half2 grid = half2(half((high - low) / top), half(low));
  const float scale = float(grid.x), bias = float(grid.y);
  record[group] = as_type<uint>(grid);

  device uint* out = record + groups + group * GROUP * BITS / 32;
  ulong pending = 0; // codes that do not fill a word yet
  int bits = 0;
  for (int i = 0; i < n; i++) {
    const float code = scale == 0 ? 0.0f : clamp(rint((float(x[i]) - bias) / scale), 0.0f, top);
    pending |= ulong(code) << bits;
    bits += BITS;
    if (bits >= 32) {
      *out++ = uint(pending);
      pending >>= 32;
      bits -= 32;
    }
  }
  if (bits > 0) { // a short last group; zeros fill the word
    *out = uint(pending);
  }
}
