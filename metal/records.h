// Keys and values: records of few bits (python/optiq/ops/attention.py) or plain vectors.
#pragma once

#include <metal_stdlib>
using namespace metal;

#include "affine.h"

constant constexpr int kDense = 16; // BITS of plain vectors

template <typename X, int BITS>
struct Stored {
  typedef uint type;
};
template <typename X>
struct Stored<X, kDense> {
  typedef X type;
};

// The tokens of one batch entry and head.
template <typename X, int BITS>
struct Tokens {
  const device typename Stored<X, BITS>::type* stored;
  int64_t stride;
  const device X* first;  // exact vectors of the tokens from `start` on
  const device X* recent; // and of those from `recent_from` on
  int start, first_end, recent_from;
};

template <typename X, int DIM>
METAL_FUNC void copy_chunk(const device X* vector, int chunk, threadgroup float* to) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    if (32 * chunk + i < DIM) {
      to[i] = float(vector[32 * chunk + i]);
    }
  }
}

template <int BITS, int GROUP, int DIM>
METAL_FUNC void decode_chunk(
    const device uint* record, int chunk, thread uint& header, threadgroup float* to) {
  constexpr int groups = (DIM + GROUP - 1) / GROUP;
  constexpr int code_words = (DIM * BITS + 31) / 32;
  uint words[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) {
    words[i] = BITS * chunk + i < code_words ? record[groups + BITS * chunk + i] : 0u;
  }
  const half2 grid = as_type<half2>(header);
#pragma unroll
  for (int eighth = 0; eighth < 4; eighth++) {
    float values[8];
    decode8<BITS>(words, eighth, float(grid.x), float(grid.y), values);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      to[8 * eighth + i] = values[i];
    }
  }
}

// Elements 32 * chunk ... + 31 of a token's vector, as far as it goes; zeros if it is not there.
// `header` is that of the group, kept between chunks of it by the same thread (IN_ORDER).
template <typename X, int BITS, int GROUP, int DIM, bool IN_ORDER>
METAL_FUNC void load_chunk(Tokens<X, BITS> tokens, int token, bool there, int chunk,
    thread uint& header, threadgroup float* to) {
  if (!there) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      to[i] = 0;
    }
  } else if (token >= tokens.recent_from) {
    copy_chunk<X, DIM>(tokens.recent + int64_t(token - tokens.recent_from) * DIM, chunk, to);
  } else if (token < tokens.first_end) {
    copy_chunk<X, DIM>(tokens.first + int64_t(token - tokens.start) * DIM, chunk, to);
  } else if constexpr (BITS == kDense) {
    copy_chunk<X, DIM>(tokens.stored + token * tokens.stride, chunk, to);
  } else {
    const device uint* record = tokens.stored + token * tokens.stride;
    if (!IN_ORDER || chunk % (GROUP / 32) == 0) {
      header = record[32 * chunk / GROUP];
    }
    decode_chunk<BITS, GROUP, DIM>(record, chunk, header, to);
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
