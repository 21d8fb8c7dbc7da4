// Attention of 8 query rows a simdgroup over the keys of one split: the body of attention.metal.
#pragma once

#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

#include "kv_shape.h"
#include "records.h"

typedef simdgroup_matrix<float, 8, 8> Matrix;

constant constexpr int kSimdgroups = 4;
constant constexpr int kTileKeys = 32;       // a lane decodes the vectors of one
constant constexpr int kTileStride = 32 + 4; // padded against bank conflicts
constant constexpr int kChunk = kTileKeys * kTileStride;

// Where the two elements of a lane lie in an 8x8 matrix, which MLX's own attention relies on too:
// (row, column), (row, column + 1). The four lanes of a row differ in bits 0 and 3.
METAL_FUNC int matrix_row(int lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
METAL_FUNC int matrix_column(int lane) {
  return (lane / 2 & 4) + lane % 2 * 2;
}
METAL_FUNC float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// An online softmax (Milakov and Gimelshein 2018) of one row: exponents have `most` removed.
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

// One score of a key of the split.
METAL_FUNC float score(float dot, constant AttentionShape& shape, Query q, int key,
    const device bool* seen, const device float* added) {
  if (key < q.first || key > q.last) {
    return -INFINITY;
  }
  float x = dot * shape.scale;
  if (shape.softcap > 0) {
    x = shape.softcap * tanh(x / shape.softcap);
  }
  if (shape.mask == 1) {
    return seen[q.mask_at + key * shape.mask_strides[3]] ? x : -INFINITY;
  }
  return shape.mask == 2 ? x + added[q.mask_at + key * shape.mask_strides[3]] : x;
}

// SHARE simdgroups share a tile of keys or values and each decodes every SHARE-th chunk of it.
template <int SHARE>
METAL_FUNC void sync_tile() {
  if constexpr (SHARE == 1) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Columns `at` and up of the tile's tokens, 32 for each of the simdgroups that share it.
template <typename X, int BITS, int GROUP, int DIM, int SHARE>
METAL_FUNC void fill_tile(Tokens<X, BITS> tokens, int key, bool there, int at, int member, int lane,
    thread uint& header, threadgroup float* tile) {
  const int chunk = at / 32 + member;
  sync_tile<SHARE>();
  if (SHARE == 1 || 32 * chunk < DIM) {
    load_chunk<X, BITS, GROUP, DIM, SHARE == 1>(
        tokens, key, there, chunk, header, tile + member * kChunk + lane * kTileStride);
  }
  sync_tile<SHARE>();
}

// dots[n] = queries . keys of the tile, 8 rows by 8 keys each.
template <typename X, int BITS, int GROUP, int DIM, int SHARE>
METAL_FUNC void tile_scores(Tokens<X, BITS> keys, int key, bool there, int member, int lane,
    const threadgroup X* queries, int query_stride, threadgroup float* tile, thread Matrix* dots) {
  constexpr int width = 32 * SHARE;
  uint header = 0;
#pragma unroll
  for (int at = 0; at < DIM; at += width) {
    fill_tile<X, BITS, GROUP, DIM, SHARE>(keys, key, there, at, member, lane, header, tile);
#pragma unroll
    for (int k = 0; k < width; k += 8) {
      if (at + k < DIM) {
        simdgroup_matrix<X, 8, 8> stored;
        Matrix a, b;
        simdgroup_load(stored, queries + at + k, query_stride);
        a.thread_elements()[0] = float(stored.thread_elements()[0]);
        a.thread_elements()[1] = float(stored.thread_elements()[1]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          simdgroup_load(b, tile + k / 32 * kChunk + 8 * n * kTileStride + k % 32, kTileStride,
              ulong2(0, 0), true);
          simdgroup_multiply_accumulate(dots[n], a, b, dots[n]);
        }
      }
    }
  }
}

// out[i] += weights . values of the tile, 8 rows by 8 columns each.
template <typename X, int BITS, int GROUP, int DIM, int SHARE>
METAL_FUNC void tile_values(Tokens<X, BITS> values, int key, bool there, int member, int lane,
    threadgroup float* tile, thread const Matrix* weights, thread Matrix* out) {
  constexpr int width = 32 * SHARE;
  uint header = 0;
#pragma unroll
  for (int at = 0; at < DIM; at += width) {
    fill_tile<X, BITS, GROUP, DIM, SHARE>(values, key, there, at, member, lane, header, tile);
#pragma unroll
    for (int column = 0; column < width; column += 8) {
      if (at + column < DIM) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          Matrix b;
          simdgroup_load(
              b, tile + column / 32 * kChunk + 8 * n * kTileStride + column % 32, kTileStride);
          simdgroup_multiply_accumulate(
              out[(at + column) / 8], weights[n], b, out[(at + column) / 8]);
        }
      }
    }
  }
}

// The softmax of both, and by what the values of each are to be multiplied.
METAL_FUNC Softmax merged(Softmax a, Softmax b, thread float& by_a, thread float& by_b) {
  const float most = max(a.most, b.most);
  by_a = exp(a.most - removed(most));
  by_b = exp(b.most - removed(most));
  Softmax both = {most, a.sum * by_a + b.sum * by_b};
  return both;
}

// What values are multiplied by at the end; a sink is a score without a value. Zero for a row
// that saw nothing; not if its sum is NaN.
METAL_FUNC float normalizer(Softmax softmax, float sink) {
  const float most = removed(max(softmax.most, sink));
  const float by = exp(softmax.most - most);
  const float sum = softmax.sum * by + exp(sink - most);
  return sum == 0 ? 0.0f : by / sum;
}
