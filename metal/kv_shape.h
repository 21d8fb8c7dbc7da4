// What the kernels of attention.metal and quantize_kv.metal are told. Read by Metal and by C++
// (csrc/launch), so only types that are the same in both.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

struct AttentionShape {
  int64_t k_strides[3]; // of batch entry, head and token, in words of records or in elements
  int64_t v_strides[3];
  int64_t mask_strides[4];
  int heads, kv_heads;
  int rows; // queries
  int keys;
  int splits, split_keys; // of the keys; each split is a threadgroup of its own
  int causal;
  int window;        // keys a query sees at most; 0: all
  int mask;          // 0: none, 1: bool, 2: added to the scores
  int starts, sinks; // whether there are any
  int first, recent; // keys that are there in full precision as well
  float scale;
  float softcap; // 0: none
};

struct RecordShape {
  unsigned int vectors;
  unsigned int dim;
};
