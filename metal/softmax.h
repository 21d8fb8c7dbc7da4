// Scores of keys, and softmax over those that a row has seen.
#pragma once

#include <metal_stdlib>
using namespace metal;

#include "kv_shape.h"

constant constexpr int kSimdgroups = 4; // of a threadgroup

// An online softmax (Milakov and Gimelshein 2018) of one row: exponents, which are of base 2, have
// `most` removed.
struct Softmax {
  float most;
  float sum;
};

// What is to be removed from exponents: finite where nothing has been seen.
METAL_FUNC float removed(float most) {
  return most == -INFINITY ? 0.0f : most;
}

// The row a lane works on, and which keys it sees.
struct Query {
  int head;
  int index;       // of the query
  int first, last; // keys
  int64_t mask_at;
};

METAL_FUNC Query query_at(constant AttentionShape& shape, int batch, int kv_head, int row) {
  const int group = shape.heads / shape.kv_heads;
  Query q;
  q.index = min(row / group, shape.rows - 1);
  q.head = kv_head * group + row % group;
  const int own = shape.keys - shape.rows + q.index;
  q.last = shape.causal ? own : shape.keys - 1;
  q.first = shape.window > 0 ? own - shape.window + 1 : 0;
  q.mask_at = batch * shape.mask_strides[0] + q.head * shape.mask_strides[1] +
              q.index * shape.mask_strides[2];
  return q;
}

constant constexpr float kLog2E = 1.44269504088896340736f;

// The exponent of a key of the split; `x` is that of its product with the query alone.
METAL_FUNC float exponent(float x, constant AttentionShape& shape, Query q, int key,
    const device bool* seen, const device float* added) {
  if (key < q.first || key > q.last) {
    return -INFINITY;
  }
  if (shape.softcap > 0) {
    const float cap = shape.softcap * kLog2E;
    x = cap * tanh(x / cap);
  }
  if (shape.mask == 1) {
    return seen[q.mask_at + key * shape.mask_strides[3]] ? x : -INFINITY;
  }
  return shape.mask == 2 ? fma(added[q.mask_at + key * shape.mask_strides[3]], kLog2E, x) : x;
}

// The softmax of both, and by what the values of each are to be multiplied.
METAL_FUNC Softmax merged(Softmax a, Softmax b, thread float& by_a, thread float& by_b) {
  const float most = max(a.most, b.most);
  by_a = fast::exp2(a.most - removed(most));
  by_b = fast::exp2(b.most - removed(most));
  Softmax both = {most, fma(b.sum, by_b, a.sum * by_a)};
  return both;
}

// What values are multiplied by at the end; a sink is a score without a value. Zero for a row
// that saw nothing; not if its sum is NaN.
METAL_FUNC float normalizer(Softmax softmax, float sink_score) {
  const float sink = sink_score * kLog2E;
  const float most = removed(max(softmax.most, sink));
  const float by = fast::exp2(softmax.most - most);
  const float sum = fma(softmax.sum, by, fast::exp2(sink - most));
  return sum == 0 ? 0.0f : by / sum;
}
