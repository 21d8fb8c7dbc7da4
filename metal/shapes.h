// What the quantized matmul kernels are told besides their arrays. Read by Metal and by C++
// (csrc/launch), so only `int`, which is 32 bits in both.
#pragma once

// One weight. Its output is cut into tiles of a threadgroup each; `first_tile` is where its
// tiles begin in the grid that all parts of a launch share, so that nothing is padded.
struct QuantizedPart {
  int n; // outputs
  int bits;
  int group_shift; // log2 of the group size
  int first_tile;
};

struct QuantizedShape {
  int m; // rows of x
  int k; // columns of x
  int parts;
  int experts; // weights stacked in each array, where rows choose one
  QuantizedPart part[4];
};
