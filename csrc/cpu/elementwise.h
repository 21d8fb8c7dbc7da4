// What a decoder block does between its products: norms, rotations, gated activations.
#pragma once

#include "kl.h"
#include "pool.h"
#include "simd.h"

namespace optiq::cpu::OPTIQ_ISA {

OPTIQ_INLINE f32x8 sigmoid(f32x8 x) {
  f32x8 e = exp_negative(select(x < 0.0f, x, -x));
  return select(x < 0.0f, e, splat(1.0f)) / (e + 1.0f);
}

OPTIQ_INLINE f32x8 activate(Activation kind, f32x8 x) {
  if (kind == Activation::gelu_tanh) { // x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
    return x * sigmoid((x + x * x * x * 0.044715f) * 1.5957691216057308f);
  }
  return x * sigmoid(x);
}

// The n <= 8 values at p, the other lanes zero; null is all zeros.
OPTIQ_INLINE f32x8 load_some(const float* p, size_t n) {
  if (!p) {
    return f32x8{};
  }
  return n == 8 ? load<f32x8>(p) : load_tail(p, Float::f32, 0, n);
}

OPTIQ_INLINE void store_some(float* p, f32x8 v, size_t n) {
  n == 8 ? store(p, v) : void(std::memcpy(p, &v, n * sizeof(float)));
}

OPTIQ_INLINE float inverse_rms(const float* x, size_t n, float eps) {
  f32x8 even = {}, odd = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    f32x8 a = load<f32x8>(x + i), b = load<f32x8>(x + i + 8);
    even += a * a;
    odd += b * b;
  }
  for (; i < n; i += 8) {
    f32x8 a = load_some(x + i, n - i < 8 ? n - i : 8);
    even += a * a;
  }
  return 1.0f / __builtin_sqrtf(sum(even + odd) / float(n) + eps);
}

inline void rms_norm(const RmsNorm& a) {
  size_t n = a.dims;
  auto row = [&](int r) {
    const float* x = a.x + r * n;
    float scale = a.norm ? a.gain * inverse_rms(x, n, a.eps) : a.gain;
    for (size_t i = 0; i < n; i += 8) {
      size_t width = n - i < 8 ? n - i : 8;
      f32x8 v = load_some(x + i, width) * scale;
      v = a.norm && a.weight ? v * load_some(a.weight + i, width) : v;
      v += load_some(a.add ? a.add + r * n + i : nullptr, width);
      store_some(a.y + r * n + i, v, width);
    }
  };
  for_rows(a.rows, n, row);
}

// One head in place: the first `rotated` values turn, or with sign -1 turn back.
OPTIQ_INLINE void rotate(
    int rotated, bool traditional, float sign, const float* cos_sin, float* x) {
  int half = rotated / 2;
  const float *cosine = cos_sin, *sine = cos_sin + half;
  int i = 0;
  for (; !traditional && i + 8 <= half; i += 8) {
    f32x8 u = load<f32x8>(x + i), v = load<f32x8>(x + half + i);
    f32x8 c = load<f32x8>(cosine + i), s = load<f32x8>(sine + i) * sign;
    store(x + i, u * c - v * s);
    store(x + half + i, u * s + v * c);
  }
  for (; i < half; i++) {
    float* first = x + (traditional ? 2 * i : i);
    float* second = traditional ? first + 1 : first + half;
    float u = *first, v = *second, c = cosine[i], s = sine[i] * sign;
    *first = u * c - v * s;
    *second = u * s + v * c;
  }
}

inline void rotary(const Rotary& a) {
  auto row = [&](int index) {
    size_t b = index / a.rows, r = index % a.rows;
    for (int h = 0; h < a.heads; h++) {
      float* y = a.y + b * a.y_batch + h * a.y_head + r * a.y_row;
      std::memcpy(y, a.x + b * a.x_batch + h * a.x_head + r * a.x_row, a.dim * sizeof(float));
      rotate(a.rotated, a.traditional, a.back ? -1 : 1, a.cos_sin + r * a.rotated, y);
    }
  };
  for_rows(size_t(a.batch) * a.rows, size_t(a.heads) * a.dim, row);
}

inline void heads(const Heads& a) {
  size_t width = size_t(a.heads) * a.dim, dim = a.dim;
  auto row = [&](int r) {
    const float* x = a.x + r * a.stride;
    float* y = a.y + r / a.rows * a.y_batch + r % a.rows * a.y_row;
    for (int h = 0; h < a.heads; h++) {
      for (size_t i = 0; i < dim; i += 8) {
        size_t n = dim - i < 8 ? dim - i : 8;
        f32x8 bias = load_some(a.bias ? a.bias + h * dim + i : nullptr, n);
        store_some(y + h * a.y_head + i, load_some(x + h * dim + i, n) + bias, n);
      }
    }
    float scale = 1;
    if (a.norm == Heads::all_heads) {
      float squares = 0;
      for (int h = 0; h < a.heads; h++) {
        float inverse = inverse_rms(y + h * a.y_head, dim, 0);
        squares += 1 / (inverse * inverse);
      }
      scale = 1.0f / __builtin_sqrtf(squares / float(a.heads) + a.eps);
    }
    for (int h = 0; h < a.heads; h++) {
      float* head = y + h * a.y_head;
      if (a.norm != Heads::no_norm) {
        scale = a.norm == Heads::each_head ? inverse_rms(head, dim, a.eps) : scale;
        const float* weight =
            a.norm == Heads::all_heads && a.weight ? a.weight + h * dim : a.weight;
        for (size_t i = 0; i < dim; i += 8) {
          size_t n = dim - i < 8 ? dim - i : 8;
          f32x8 v = load_some(head + i, n) * scale;
          store_some(head + i, weight ? v * load_some(weight + i, n) : v, n);
        }
      }
      if (a.cos_sin) {
        rotate(a.rotated, a.traditional, 1, a.cos_sin + size_t(r) * a.rotated, head);
      }
    }
  };
  for_rows(size_t(a.batch) * a.rows, width, row);
}

inline void gate(const Gate& a) {
  auto row = [&](int r) {
    const float *g = a.gate + r * a.stride, *u = a.up + r * a.stride;
    for (size_t i = 0; i < a.width; i += 8) {
      size_t n = a.width - i < 8 ? a.width - i : 8;
      f32x8 gi = load_some(g + i, n), ui = load_some(u + i, n);
      if (a.gate_bias) {
        gi += load_some(a.gate_bias + i, n);
        ui += load_some(a.up_bias + i, n);
      }
      store_some(a.y + r * a.width + i, activate(a.activation, gi) * ui, n);
    }
  };
  for_rows(a.rows, a.width, row);
}

} // namespace optiq::cpu::OPTIQ_ISA
