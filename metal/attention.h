// Attention of 8 query rows a simdgroup over the keys of one split: the body of attention.metal.
#pragma once

#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

#include "kv_shape.h"
#include "records.h"
#include "softmax.h"

typedef simdgroup_matrix<float, 8, 8> Matrix;

// Keys or values are decoded to threadgroup memory in blocks of 16 by 64 elements, a block for each
// simdgroup. A tile is two blocks of keys by as many as have all elements: block b has keys
// 16 * (b % 2) and up, and elements 64 * (b / 2) and up.
constant constexpr int kTileKeys = 32;
constant constexpr int kBlockKeys = 16;
constant constexpr int kBlockWidth = 64;
constant constexpr int kStride = kBlockWidth + 4; // padded against bank conflicts
constant constexpr int kBlock = kBlockKeys * kStride;

constexpr int blocks_of(int dim) {
  return 2 * ((dim + kBlockWidth - 1) / kBlockWidth);
}

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

// SHARE simdgroups share a tile of keys or values, and each decodes every SHARE-th block of it.
template <int SHARE>
METAL_FUNC void sync_tile() {
  if constexpr (SHARE == 1) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Block `block` of the tile whose first key is `key0`. Eight lanes share a vector, so that they
// read a record side by side.
template <typename X, int BITS, int GROUP, int DIM, int SHARE, bool EXACT>
METAL_FUNC void fill_block(
    Tokens<X, BITS, EXACT> tokens, int key0, int end, int block, int lane, threadgroup float* to) {
  constexpr int lanes = kBlockWidth / 8, run = 32 / lanes;
  const int column = lane % lanes * 8, at = block / 2 * kBlockWidth + column;
  sync_tile<SHARE>();
  if (block < blocks_of(DIM) && at < DIM) {
#pragma unroll
    for (int k = 0; k < kBlockKeys; k += run) {
      const int row = k + lane / lanes, key = key0 + block % 2 * kBlockKeys + row;
      float x[8];
      load8<X, BITS, GROUP, DIM>(tokens, key, key < end, at, x);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        to[row * kStride + column + i] = x[i];
      }
    }
  }
  sync_tile<SHARE>();
}

// dots[n] = queries . keys of the tile, 8 rows by 8 keys each.
template <typename X, int BITS, int GROUP, int DIM, int SHARE, bool EXACT>
METAL_FUNC void tile_scores(Tokens<X, BITS, EXACT> keys, int key0, int end, int member, int lane,
    const threadgroup X* queries, int query_stride, threadgroup float* tile, thread Matrix* dots) {
  constexpr int halves = SHARE == 1 ? 1 : 2; // of the keys, that are there at the same time
#pragma unroll
  for (int first = 0; first < blocks_of(DIM); first += SHARE) {
    fill_block<X, BITS, GROUP, DIM, SHARE>(
        keys, key0, end, first + member, lane, tile + member * kBlock);
#pragma unroll
    for (int b = 0; b < SHARE; b += halves) {
#pragma unroll
      for (int k = 0; k < kBlockWidth; k += 8) {
        const int at = (first + b) / 2 * kBlockWidth + k;
        if (at < DIM) {
          simdgroup_matrix<X, 8, 8> stored;
          Matrix query, key;
          simdgroup_load(stored, queries + at, query_stride);
          query.thread_elements()[0] = float(stored.thread_elements()[0]);
          query.thread_elements()[1] = float(stored.thread_elements()[1]);
#pragma unroll
          for (int n = 0; n < 2 * halves; n++) {
            simdgroup_load(key, tile + (b + n / 2) * kBlock + n % 2 * 8 * kStride + k, kStride,
                ulong2(0, 0), true);
            const int all = (first + b) % 2 * 2 + n;
            simdgroup_multiply_accumulate(dots[all], query, key, dots[all]);
          }
        }
      }
    }
  }
}

// out[i] += weights . values of the tile, 8 rows by 8 columns each.
template <typename X, int BITS, int GROUP, int DIM, int SHARE, bool EXACT>
METAL_FUNC void tile_values(Tokens<X, BITS, EXACT> values, int key0, int end, int member, int lane,
    threadgroup float* tile, thread const Matrix* weights, thread Matrix* out) {
#pragma unroll
  for (int first = 0; first < blocks_of(DIM); first += SHARE) {
    fill_block<X, BITS, GROUP, DIM, SHARE>(
        values, key0, end, first + member, lane, tile + member * kBlock);
#pragma unroll
    for (int b = 0; b < SHARE; b++) {
#pragma unroll
      for (int column = 0; column < kBlockWidth; column += 8) {
        const int at = (first + b) / 2 * kBlockWidth + column;
        if (at < DIM) {
#pragma unroll
          for (int n = 0; n < 2; n++) {
            Matrix value;
            simdgroup_load(value, tile + b * kBlock + n * 8 * kStride + column, kStride);
            simdgroup_multiply_accumulate(
                out[at / 8], weights[(first + b) % 2 * 2 + n], value, out[at / 8]);
          }
        }
      }
    }
  }
}
