// What the kernels of layer.metal are told besides their arrays. Read by Metal and by C++
// (csrc/launch), so only types that are the same in both.
#pragma once

#include "shapes.h"

// A product whose x is normalized, and whose results go into rows of `width`: those of part p from
// column first[p] on.
struct NormedShape {
  QuantizedShape product;
  float eps;
  int width;
  int first[4];
};

// Queries, keys and values of one new token of each batch entry, side by side in rows of `width`.
struct HeadsShape {
  int64_t k_strides[3]; // of batch entry, head and token of the cache, in its items
  int64_t v_strides[3];
  int heads, kv_heads, dim;
  int width, k_first, v_first;
  int token;       // of the cache, where the new ones go
  int position;    // in the sequence
  int rotated;     // values of a head
  int traditional; // pairs are neighbours
  float magnitude; // of what is rotated
  int norm_q, norm_k, norm_v, bias;
  float eps_q, eps_k, eps_v;
  int unused;
};

// A product that is added to rows of the same width: h + gain * product.
struct ResidualShape {
  QuantizedShape product;
  float gain;
  int added; // or the product alone
};

// The same with its rows normalized.
struct PostShape {
  int width;
  float eps, gain;
  int unused;
};

// act(gate) * up. Where both are in one weight, the rows of `up` follow those of `gate`.
struct GatedShape {
  QuantizedShape product; // parts: gate and up
  float eps;
  int up_row; // the first one of `up`
  int gelu;   // the approximation by tanh, else SiLU
  int unused;
};
