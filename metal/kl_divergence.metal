// KL(p || q) from final hidden states and heads, logits made tile by tile and forgotten; the
// launches are planned in csrc/launch/kl_divergence.cpp. Each threadgroup takes a range of the
// vocabulary for 32 tokens with online log-sum-exps (Milakov and Gimelshein 2018), a second
// kernel merges the ranges.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "affine.h"
#include "kl_shape.h"

using namespace metal;

constant constexpr int kTile = 32;           // tokens and words of a tile of logits
constant constexpr int kDepth = 32;          // of the dot products at a time; in one group
constant constexpr int kStride = kDepth + 4; // padded against bank conflicts
constant constexpr int kRowLanes = 4;        // threads that share the logits of a token

// tile[i, k] = rows[r0 + i, k0 + k], zeros outside; 128 threads with eight values each.
template <typename T>
METAL_FUNC void load_rows(const device T* rows, int r0, int height, int k0, int width, int index,
    threadgroup float* tile) {
  const int row = index / 4, col = index % 4 * 8;
  const device T* from = rows + size_t(r0 + row) * width + k0 + col;
  threadgroup float* to = tile + row * kStride + col;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    to[i] = r0 + row < height && k0 + col + i < width ? float(from[i]) : 0.0f;
  }
}

// The same of a quantized head; 64 threads with 16 codes each.
template <typename S, int BITS>
METAL_FUNC void load_affine(const device uint* codes, const device S* scales,
    const device S* biases, int n0, int vocabulary, int k0, int d, int shift, int index,
    threadgroup float* tile) {
  const int row = index / 2, col = index % 2 * 16;
  if (row >= kTile) {
    return;
  }
  threadgroup float* to = tile + row * kStride + col;
  if (n0 + row >= vocabulary) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      to[i] = 0;
    }
    return;
  }
  const size_t at = size_t(n0 + row) * (d >> shift) + ((k0 + col) >> shift);
  uint words[(BITS + 1) / 2];
  load_codes<BITS>(codes + size_t(n0 + row) * (d / 32 * BITS), k0 + col, words);
#pragma unroll
  for (int eighth = 0; eighth < 2; eighth++) {
    float weights[8];
    decode8<BITS>(words, eighth, float(scales[at]), float(biases[at]), weights);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      to[8 * eighth + i] = weights[i];
    }
  }
}

// out[i, j] = h[t0 + i] . W[n0 + j] by four simdgroups, two by two. A dense head, BITS 0, lies
// in `scales`.
template <typename W, int BITS>
METAL_FUNC void logits(const device float* h, const device uint* codes, const device W* scales,
    const device W* biases, int t0, int tokens, int n0, int vocabulary, int d, int shift, int index,
    int simdgroup, threadgroup float* h_tile, threadgroup float* w_tile, threadgroup float* out) {
  const int m1 = simdgroup / 2 * 16, n1 = simdgroup % 2 * 16;
  simdgroup_matrix<float, 8, 8> acc[2][2];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    acc[i / 2][i % 2].thread_elements()[0] = 0;
    acc[i / 2][i % 2].thread_elements()[1] = 0;
  }
  for (int k0 = 0; k0 < d; k0 += kDepth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_rows(h, t0, tokens, k0, d, index, h_tile);
    if constexpr (BITS == 0) {
      load_rows(scales, n0, vocabulary, k0, d, index, w_tile);
    } else {
      load_affine<W, BITS>(codes, scales, biases, n0, vocabulary, k0, d, shift, index, w_tile);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int kk = 0; kk < kDepth; kk += 8) {
      simdgroup_matrix<float, 8, 8> a[2], b[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        simdgroup_load(a[i], h_tile + (m1 + 8 * i) * kStride + kk, kStride);
        simdgroup_load(b[i], w_tile + (n1 + 8 * i) * kStride + kk, kStride, ulong2(0, 0), true);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        simdgroup_multiply_accumulate(acc[i / 2][i % 2], a[i / 2], b[i % 2], acc[i / 2][i % 2]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    simdgroup_store(acc[i / 2][i % 2], out + (m1 + i / 2 * 8) * kStride + n1 + i % 2 * 8, kStride);
  }
}

METAL_FUNC KlPart nothing() {
  KlPart part;
  part.p_max = -INFINITY;
  part.q_max = -INFINITY;
  part.p_sum = 0;
  part.q_sum = 0;
  part.dot = 0;
  part.p_first = 0;
  part.q_first = 0;
  part.finite = 1;
  return part;
}

// The same sums with larger maxima removed.
METAL_FUNC KlPart raised(KlPart part, float p_max, float q_max) {
  if (part.p_sum > 0) { // else the old maxima are infinite
    const float p_by = p_max - part.p_max, q_by = q_max - part.q_max;
    part.dot = exp(-p_by) * (part.dot + part.p_sum * (q_by - p_by));
    part.p_sum *= exp(-p_by);
    part.q_sum *= exp(-q_by);
  }
  part.p_max = p_max;
  part.q_max = q_max;
  return part;
}

METAL_FUNC KlPart merged(KlPart a, KlPart b) {
  const bool p_later = b.p_max > a.p_max || (b.p_max == a.p_max && b.p_first < a.p_first);
  const bool q_later = b.q_max > a.q_max || (b.q_max == a.q_max && b.q_first < a.q_first);
  const float p_max = max(a.p_max, b.p_max), q_max = max(a.q_max, b.q_max);
  a = raised(a, p_max, q_max);
  b = raised(b, p_max, q_max);
  a.p_sum += b.p_sum;
  a.q_sum += b.q_sum;
  a.dot += b.dot;
  a.p_first = p_later ? b.p_first : a.p_first;
  a.q_first = q_later ? b.q_first : a.q_first;
  a.finite &= b.finite;
  return a;
}

METAL_FUNC float capped(float x, float cap) {
  return cap > 0 ? cap * tanh(x / cap) : x;
}

// One thread's logits of a strip: every fourth word from n on.
METAL_FUNC KlPart take(KlPart part, const threadgroup float* p, const threadgroup float* q, int n,
    int vocabulary, float cap) {
  float x[kTile / kRowLanes], y[kTile / kRowLanes];
  float p_max = part.p_max, q_max = part.q_max;
#pragma unroll
  for (int i = 0; i < kTile / kRowLanes; i++) {
    if (n + kRowLanes * i < vocabulary) {
      x[i] = capped(p[kRowLanes * i], cap);
      y[i] = capped(q[kRowLanes * i], cap);
      part.finite &= isfinite(x[i]) && isfinite(y[i]) ? 1 : 0;
      if (x[i] > p_max) {
        p_max = x[i];
        part.p_first = n + kRowLanes * i;
      }
      if (y[i] > q_max) {
        q_max = y[i];
        part.q_first = n + kRowLanes * i;
      }
    }
  }
  part = raised(part, p_max, q_max);
#pragma unroll
  for (int i = 0; i < kTile / kRowLanes; i++) {
    if (n + kRowLanes * i < vocabulary) {
      const float e = exp(x[i] - p_max);
      part.p_sum += e;
      part.q_sum += exp(y[i] - q_max);
      part.dot += e * ((x[i] - p_max) - (y[i] - q_max));
    }
  }
  return part;
}

METAL_FUNC KlPart shuffled(KlPart part, ushort mask) {
  part.p_max = simd_shuffle_xor(part.p_max, mask);
  part.q_max = simd_shuffle_xor(part.q_max, mask);
  part.p_sum = simd_shuffle_xor(part.p_sum, mask);
  part.q_sum = simd_shuffle_xor(part.q_sum, mask);
  part.dot = simd_shuffle_xor(part.dot, mask);
  part.p_first = simd_shuffle_xor(part.p_first, mask);
  part.q_first = simd_shuffle_xor(part.q_first, mask);
  part.finite = simd_shuffle_xor(part.finite, mask);
  return part;
}

// Threads: 128. Grid: x over ranges of the vocabulary, y over tiles of tokens.
template <typename WP, int BITS_P, typename WQ, int BITS_Q>
[[kernel]] void kl_ranges(const device float* h_p [[buffer(0)]],
    const device uint* codes_p [[buffer(1)]], const device WP* scales_p [[buffer(2)]],
    const device WP* biases_p [[buffer(3)]], const device float* h_q [[buffer(4)]],
    const device uint* codes_q [[buffer(5)]], const device WQ* scales_q [[buffer(6)]],
    const device WQ* biases_q [[buffer(7)]], device KlPart* parts [[buffer(8)]],
    constant KlShape& shape [[buffer(9)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float h_tile[kTile * kStride];
  threadgroup float w_tile[kTile * kStride];
  threadgroup float p_tile[kTile * kStride];
  threadgroup float q_tile[kTile * kStride];
  const int strips = (shape.vocabulary + kTile - 1) / kTile;
  const int first = int(long(strips) * group.x / shape.splits);
  const int last = int(long(strips) * (group.x + 1) / shape.splits);
  const int t0 = group.y * kTile;
  const int row = index / kRowLanes, lane = index % kRowLanes;
  KlPart part = nothing();
  for (int strip = first; strip < last; strip++) {
    const int n0 = strip * kTile;
    logits<WP, BITS_P>(h_p, codes_p, scales_p, biases_p, t0, shape.tokens, n0, shape.vocabulary,
        shape.d_p, shape.shift_p, index, simdgroup, h_tile, w_tile, p_tile);
    logits<WQ, BITS_Q>(h_q, codes_q, scales_q, biases_q, t0, shape.tokens, n0, shape.vocabulary,
        shape.d_q, shape.shift_q, index, simdgroup, h_tile, w_tile, q_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    part = take(part, p_tile + row * kStride + lane, q_tile + row * kStride + lane, n0 + lane,
        shape.vocabulary, shape.soft_cap);
  }
  part = merged(part, shuffled(part, 1));
  part = merged(part, shuffled(part, 2));
  if (lane == 0 && t0 + row < shape.tokens) {
    parts[size_t(group.x) * shape.tokens + t0 + row] = part;
  }
}

// A thread merges the ranges of one token, in order. A template, since that is what the library
// for a launch instantiates.
template <typename Y>
[[kernel]] void kl_merge(const device KlPart* parts [[buffer(0)]], device Y* kl [[buffer(1)]],
    device bool* agree [[buffer(2)]], device Y* lse_p [[buffer(3)]], device Y* lse_q [[buffer(4)]],
    constant KlShape& shape [[buffer(5)]], uint token [[thread_position_in_grid]]) {
  if (int(token) >= shape.tokens) {
    return;
  }
  KlPart all = parts[token];
  for (int i = 1; i < shape.splits; i++) {
    all = merged(all, parts[size_t(i) * shape.tokens + token]);
  }
  const float unknown = all.finite ? 0.0f : NAN;
  kl[token] = all.dot / all.p_sum + log(all.q_sum / all.p_sum) + unknown;
  agree[token] = all.finite && all.p_first == all.q_first;
  lse_p[token] = all.p_max + log(all.p_sum) + unknown;
  lse_q[token] = all.q_max + log(all.q_sum) + unknown;
}
