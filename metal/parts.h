// Several weights in one grid.
#pragma once

#include <metal_stdlib>
using namespace metal;

#include "shapes.h"

// The part a threadgroup of the shared grid works on.
METAL_FUNC int find_part(constant QuantizedShape& shape, int tile) {
  int p = 0;
  while (p + 1 < shape.parts && tile >= shape.part[p + 1].first_tile) {
    p++;
  }
  return p;
}
