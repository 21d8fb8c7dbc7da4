// Keys and values: records of few bits (python/optiq/ops/attention.py) or plain vectors.
#pragma once

#include <metal_stdlib>
using namespace metal;

#include "affine.h"
#include "kv_shape.h"

constant constexpr int kDense = 16; // BITS of plain vectors

template <typename X, int BITS>
struct Stored {
  typedef uint type;
};
template <typename X>
struct Stored<X, kDense> {
  typedef X type;
};

// The tokens of one batch entry and head. EXACT: some are there in full precision as well.
template <typename X, int BITS, bool EXACT>
struct Tokens {
  const device typename Stored<X, BITS>::type* stored;
  int64_t stride;
  const device X* first;  // exact vectors of the tokens from `start` on
  const device X* recent; // and of those from `recent_from` on
  int start, first_end, recent_from;
};

template <typename X, int BITS, bool EXACT>
METAL_FUNC Tokens<X, BITS, EXACT> tokens_of(const device typename Stored<X, BITS>::type* stored,
    const constant int64_t* strides, const device X* first, const device X* recent, int dim,
    int batch, int kv_head, int start, constant AttentionShape& shape) {
  const int64_t sequence = batch * shape.kv_heads + kv_head;
  Tokens<X, BITS, EXACT> tokens;
  tokens.stored = stored + batch * strides[0] + kv_head * strides[1];
  tokens.stride = strides[2];
  tokens.first = first + sequence * shape.first * dim;
  tokens.recent = recent + sequence * shape.recent * dim;
  tokens.start = start;
  tokens.first_end = start + shape.first;
  tokens.recent_from = shape.keys - shape.recent;
  return tokens;
}

// Codes `at` ... `at` + 7 of a record, from the first bit on, and their scale and bias; `at` is a
// multiple of 8.
template <int BITS, int GROUP, int DIM>
METAL_FUNC float2 load_codes8(const device uint* record, int at, thread uint* words) {
  constexpr int groups = (DIM + GROUP - 1) / GROUP;
  const int shift = at * BITS % 32;
  const device uint* from = record + groups + at * BITS / 32;
  words[0] = from[0];
  words[1] = 0;
  if constexpr (BITS == 8) {
    words[1] = from[1];
  } else if constexpr (BITS != 4) {
    const uint next = shift + 8 * BITS > 32 ? from[1] : 0u;
    words[0] = words[0] >> shift | (shift == 0 ? 0u : next << (32 - shift));
    words[1] = next >> shift;
  }
  return float2(as_type<half2>(record[at / GROUP]));
}

template <typename X>
METAL_FUNC void copy8(const device X* vector, thread float* to) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    to[i] = float(vector[i]);
  }
}

// Elements `at` ... `at` + 7 of a token's vector; zeros if it is not there.
template <typename X, int BITS, int GROUP, int DIM, bool EXACT>
METAL_FUNC void load8(
    Tokens<X, BITS, EXACT> tokens, int token, bool there, int at, thread float* to) {
  if (!there) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      to[i] = 0;
    }
  } else if (EXACT && token >= tokens.recent_from) {
    copy8(tokens.recent + int64_t(token - tokens.recent_from) * DIM + at, to);
  } else if (EXACT && token < tokens.first_end) {
    copy8(tokens.first + int64_t(token - tokens.start) * DIM + at, to);
  } else if constexpr (BITS == kDense) {
    copy8(tokens.stored + token * tokens.stride + at, to);
  } else {
    uint words[2];
    const float2 grid =
        load_codes8<BITS, GROUP, DIM>(tokens.stored + token * tokens.stride, at, words);
    decode8<BITS>(words, 0, grid.x, grid.y, to);
  }
}

// Group `group` of a record from its values, bit for bit as quantize_kv in
// python/optiq/ops/attention.py.
template <int BITS, int GROUP, typename Values>
METAL_FUNC void write_group(Values x, int dim, int group, device uint* record) {
  constexpr float top = float((1 << BITS) - 1);
  const int n = min(GROUP, dim - group * GROUP);
  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < n; i++) {
    low = min(low, float(x[i]));
    high = max(high, float(x[i]));
  }
  const half2 grid = half2(half((high - low) / top), half(low));
  const float scale = float(grid.x), bias = float(grid.y);
  record[group] = as_type<uint>(grid);

  device uint* out = record + (dim + GROUP - 1) / GROUP + group * GROUP * BITS / 32;
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
