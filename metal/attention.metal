// Attention over a cache of keys and values in few bits; launches are planned in
// csrc/launch/attention.cpp. Flash decoding: each threadgroup takes a split of the keys for a tile
// of query rows, decodes every key and value once for all of them, and keeps an online softmax in
// float32; a second kernel merges the splits. Prefill is the same with one split. Few rows go
// without matrices (attention_vector.metal).
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "attention.h"

using namespace metal;

// Rows are the queries of all heads that share a key head, the heads of a query side by side.
// Threads: 128, in teams of SHARE simdgroups: a team takes every (4 / SHARE)-th tile of the keys,
// for 8 rows a simdgroup. Grid: x over splits, y over tiles of rows, z over batch and key heads.
//
// The keys of a split are counted from the first one that any row of the tile sees. So the bits of
// a result do not depend on the padding before it, or on other entries of the batch.
template <typename X, int DIM, int VALUE_DIM, int K_BITS, int K_GROUP, int V_BITS, int V_GROUP,
    int SHARE, bool EXACT, bool SPLIT>
[[kernel]] void attention(const device X* queries [[buffer(0)]],
    const device typename Stored<X, K_BITS>::type* k [[buffer(1)]],
    const device typename Stored<X, V_BITS>::type* v [[buffer(2)]],
    const device bool* seen [[buffer(3)]], const device float* added [[buffer(4)]],
    const device int* starts [[buffer(5)]], const device X* first_k [[buffer(6)]],
    const device X* first_v [[buffer(7)]], const device X* recent_k [[buffer(8)]],
    const device X* recent_v [[buffer(9)]], const device float* sinks [[buffer(10)]],
    device X* y [[buffer(11)]], device float* parts [[buffer(12)]],
    device float2* states [[buffer(13)]], constant AttentionShape& shape [[buffer(14)]],
    uint3 at [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr int teams = kSimdgroups / SHARE;
  constexpr int tile_rows = 8 * SHARE;
  constexpr int stride = DIM + 16 / sizeof(X);
  threadgroup X q_tile[tile_rows * stride];
  threadgroup float tiles[kSimdgroups * kBlock];
  const int team = simdgroup / SHARE, member = simdgroup % SHARE;
  const int batch = at.z / shape.kv_heads, kv_head = at.z % shape.kv_heads;
  const int group = shape.heads / shape.kv_heads;
  const int rows = group * shape.rows;
  const int row0 = at.y * tile_rows, row_end = min(row0 + tile_rows, rows);

  const int start = shape.starts ? max(starts[batch], 0) : 0;
  const int first = max(start, query_at(shape, batch, kv_head, row0).first);
  const int begin = first + int(at.x) * shape.split_keys;
  const int end =
      min(begin + shape.split_keys, query_at(shape, batch, kv_head, row_end - 1).last + 1);

  for (int i = index; i < tile_rows * DIM; i += 32 * kSimdgroups) {
    const int row = row0 + i / DIM;
    const int64_t head = batch * shape.heads + kv_head * group + row % group;
    q_tile[i / DIM * stride + i % DIM] =
        row < rows ? queries[(head * shape.rows + row / group) * DIM + i % DIM] : X(0);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const Tokens<X, K_BITS, EXACT> keys = tokens_of<X, K_BITS, EXACT>(
      k, shape.k_strides, first_k, recent_k, DIM, batch, kv_head, start, shape);
  const Tokens<X, V_BITS, EXACT> values = tokens_of<X, V_BITS, EXACT>(
      v, shape.v_strides, first_v, recent_v, VALUE_DIM, batch, kv_head, start, shape);
  const int row = row0 + 8 * member + matrix_row(lane);
  const Query query = query_at(shape, batch, kv_head, row);
  const float scale = shape.scale * kLog2E;
  Softmax softmax = {-INFINITY, 0};
  Matrix out[VALUE_DIM / 8];
#pragma unroll
  for (int i = 0; i < VALUE_DIM / 8; i++) {
    out[i].thread_elements()[0] = 0;
    out[i].thread_elements()[1] = 0;
  }
  threadgroup float* tile = tiles + team * SHARE * kBlock;
  for (int tile0 = begin; tile0 < end; tile0 += teams * kTileKeys) { // the same for all teams
    const int key0 = tile0 + team * kTileKeys;
    if (SHARE == 1 && key0 >= end) {
      break; // nobody waits for this simdgroup
    }
    Matrix dots[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      dots[n].thread_elements()[0] = 0;
      dots[n].thread_elements()[1] = 0;
    }
    tile_scores<X, K_BITS, K_GROUP, DIM, SHARE>(
        keys, key0, end, member, lane, q_tile + 8 * member * stride, stride, tile, dots);
    float most = softmax.most;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const int column = key0 + n / 2 * 8 + matrix_column(lane) + n % 2;
      const float dot = dots[n / 2].thread_elements()[n % 2] * scale;
      const float x = column < end ? exponent(dot, shape, query, column, seen, added) : -INFINITY;
      dots[n / 2].thread_elements()[n % 2] = x;
      most = max(most, x);
    }
    most = row_max(most);
    const float by = fast::exp2(softmax.most - removed(most));
    softmax.most = most;
    softmax.sum *= by; // of this lane's keys alone, until the end
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const float p = fast::exp2(dots[n / 2].thread_elements()[n % 2] - removed(most));
      dots[n / 2].thread_elements()[n % 2] = p;
      softmax.sum += p;
    }
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 8; i++) {
      out[i].thread_elements()[0] *= by;
      out[i].thread_elements()[1] *= by;
    }
    tile_values<X, V_BITS, V_GROUP, VALUE_DIM, SHARE>(
        values, key0, end, member, lane, tile, dots, out);
  }
  softmax.sum = row_sum(softmax.sum);

  // The teams of a row meet in the first, through the memory of the tiles: element by element,
  // each lane with the same lane of the others.
  constexpr int elements = VALUE_DIM / 4;
  threadgroup float* shared = tiles + member * (elements + 2) * 32 + lane;
  for (int other = 1; other < teams; other++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (team == other) {
      shared[0] = softmax.most;
      shared[32] = softmax.sum;
#pragma unroll
      for (int i = 0; i < elements; i++) {
        shared[(2 + i) * 32] = out[i / 2].thread_elements()[i % 2];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (team == 0) {
      float by, other_by;
      const Softmax theirs = {shared[0], shared[32]};
      softmax = merged(softmax, theirs, by, other_by);
#pragma unroll
      for (int i = 0; i < elements; i++) {
        const float x = out[i / 2].thread_elements()[i % 2];
        out[i / 2].thread_elements()[i % 2] = x * by + shared[(2 + i) * 32] * other_by;
      }
    }
  }
  if (team != 0 || row >= row_end) {
    return;
  }
  const int64_t result = int64_t(batch * shape.heads + query.head) * shape.rows + query.index;
  if constexpr (SPLIT) {
    const int64_t slot = result * shape.splits + at.x;
    parts += slot * VALUE_DIM;
    if (matrix_column(lane) == 0) {
      states[slot] = float2(softmax.most, softmax.sum);
    }
    if (begin >= end) {
      return; // the merge does not look at values of an empty split
    }
#pragma unroll
    for (int i = 0; i < elements; i++) {
      parts[i / 2 * 8 + matrix_column(lane) + i % 2] = out[i / 2].thread_elements()[i % 2];
    }
  } else {
    y += result * VALUE_DIM;
    const float by = normalizer(softmax, shape.sinks ? sinks[query.head] : -INFINITY);
#pragma unroll
    for (int i = 0; i < elements; i++) {
      y[i / 2 * 8 + matrix_column(lane) + i % 2] = X(out[i / 2].thread_elements()[i % 2] * by);
    }
  }
}

// Adds the splits of a row, in order. Threads: 32, one simdgroup a row; each lane first weighs
// one split of 32, then adds its columns of them all.
template <typename X, int VALUE_DIM>
[[kernel]] void attention_merge(const device float* parts [[buffer(0)]],
    const device float2* states [[buffer(1)]], const device float* sinks [[buffer(2)]],
    device X* y [[buffer(3)]], constant AttentionShape& shape [[buffer(4)]],
    uint row [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr int columns = (VALUE_DIM + 31) / 32; // of a lane
  float out[columns] = {};
  Softmax softmax = {-INFINITY, 0};
  parts += int64_t(row) * shape.splits * VALUE_DIM;
  states += int64_t(row) * shape.splits;
  for (int split0 = 0; split0 < shape.splits; split0 += 32) {
    const int split = split0 + lane;
    const float2 state = split < shape.splits ? states[split] : float2(-INFINITY, 0.0f);
    const float most = max(softmax.most, simd_max(state.x));
    const float by = fast::exp2(softmax.most - removed(most));
    const float weight = fast::exp2(state.x - removed(most));
    softmax.most = most;
    softmax.sum = softmax.sum * by + simd_sum(state.y * weight);
#pragma unroll
    for (int i = 0; i < columns; i++) {
      out[i] *= by;
    }
    for (int s = 0; s < min(32, shape.splits - split0); s++) {
      const float w = simd_shuffle(weight, ushort(s));
      if (w != 0) { // the values of an empty split were never written
        const device float* part = parts + (split0 + s) * VALUE_DIM;
#pragma unroll
        for (int i = 0; i < columns; i++) {
          const int column = 32 * i + lane;
          if (column < VALUE_DIM) {
            out[i] += part[column] * w;
          }
        }
      }
    }
  }
  const int head = row / shape.rows % shape.heads;
  const float by = normalizer(softmax, shape.sinks ? sinks[head] : -INFINITY);
#pragma unroll
  for (int i = 0; i < columns; i++) {
    if (32 * i + int(lane) < VALUE_DIM) {
      y[int64_t(row) * VALUE_DIM + 32 * i + lane] = X(out[i] * by);
    }
  }
}
