// A row-major copy of an array with strides: MLX keeps its own to itself.
#include <metal_stdlib>

#include "shapes.h"

using namespace metal;

template <typename T>
[[kernel]] void copy_rows(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
    constant CopyShape& shape [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const int64_t at = int64_t(group) * 256 + index;
  if (at >= shape.size) {
    return;
  }
  int64_t rest = at, from = 0;
  for (int axis = shape.axes - 1; axis >= 0; axis--) {
    from += rest % shape.shape[axis] * shape.strides[axis];
    rest /= shape.shape[axis];
  }
  out[at] = in[from];
}
