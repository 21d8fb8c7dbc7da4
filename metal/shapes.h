// What kernels are told besides their arrays. Read by Metal and by C++ (csrc/launch), so only
// types that are the same in both.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

// One weight. Its output is cut into tiles of a threadgroup each; `first_tile` is where its
// tiles begin in the grid that all parts of a launch share, so that nothing is padded. Where its
// sums are split, the tiles of a split come after those of the one before.
struct QuantizedPart {
  int n; // outputs
  int bits;
  int group_shift; // log2 of the group size
  int first_tile;
  int columns; // of x whose products a threadgroup adds up, all of them unless the sums are split
};

struct QuantizedShape {
  int m; // rows of x
  int k; // columns of x
  int parts;
  int experts; // weights stacked in each array, where rows choose one
  QuantizedPart part[4];
};

struct CopyShape {
  int64_t size;
  int64_t shape[8];
  int64_t strides[8]; // in items
  int axes;
  int unused;
};
