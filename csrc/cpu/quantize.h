// Affine codes, scale and bias for each group of a row, by weighted search.
//
// Minimises sum_k c_k (scale * code_k + bias - w_k)^2 over a group, with
// c_k = importance_k * sqrt(2 mean(w^2) + w_k^2). The importance of an input column is the second
// moment of its activations: the output error of a linear layer is (dw . x)^2. The magnitude term
// and the search over slightly narrower and wider grids, each with its closed-form least squares
// fit, are those of llama.cpp's make_qkx3_quants (ggml-quants.c). Codes are then derived again
// from scale and bias as they are stored, since a 16-bit scale is not the one that was fitted.
#pragma once

#include "quantize_minmax.h"

namespace optiq::cpu::OPTIQ_ISA {

constexpr int kSteps = 36; // grids tried: from nine tenths of a step wider to as much narrower
constexpr float kStep = 0.05f;
constexpr int kRefits = 3; // of scale and bias to the codes that were derived from stored values

struct SearchRows {
  const Quantize& a;
  static constexpr int kRowsPerTask = 8;

  void operator()(int task) {
    size_t begin = size_t(task) * kRowsPerTask;
    size_t end = begin + kRowsPerTask < a.rows ? begin + kRowsPerTask : a.rows;
    size_t groups = a.cols / a.format.group_size;
    for (size_t row = begin; row < end; row++) {
      const float* importance = a.importance + row / a.rows_per_importance * a.cols;
      for (size_t g = 0; g < groups; g++) {
        group(row * groups + g, importance + g * a.format.group_size);
      }
    }
  }

 private:
  // One fit: scale and bias as stored, the codes they give, and the weighted squared error.
  struct Fit {
    float scale = 0, bias = 0, error = 0;
    f32x8 codes[kMaxGroup / 8];
  };

  // What does not change while a group is searched.
  struct Group {
    f32x8 w[kMaxGroup / 8], c[kMaxGroup / 8];
    float sum_c = 0, sum_cw = 0;

    float weight(int k) const {
      return reinterpret_cast<const float*>(w)[k];
    }
    float cost(int k) const {
      return reinterpret_cast<const float*>(c)[k];
    }
  };

  void group(size_t index, const float* importance) {
    const int vectors = a.format.group_size / 8;
    const float top = float((1 << a.format.bits) - 1);
    Group in;
    f32x8 squares = {};
    for (int i = 0; i < vectors; i++) {
      in.w[i] = load_float(a.w, a.type, index * a.format.group_size + 8 * i);
      squares += in.w[i] * in.w[i];
    }
    auto [least, most] = range(in.w, vectors);
    float sigma = 2 * sum(squares) / float(a.format.group_size);
    f32x8 sum_c = {}, sum_cw = {};
    for (int i = 0; i < vectors; i++) {
      in.c[i] = square_root(in.w[i] * in.w[i] + sigma) * load<f32x8>(importance + 8 * i);
      sum_c += in.c[i];
      sum_cw += in.c[i] * in.w[i];
    }
    in.sum_c = sum(sum_c);
    in.sum_cw = sum(sum_cw);

    // Never worse than mx.quantize: its grid is where the search starts.
    Grid grid = stock_grid({least, most}, top);
    Fit best;
    derive(in, vectors, top, grid.scale, grid.bias, best);
    if (most > least && in.sum_c > 0) {
      search(in, vectors, top, least, most, best);
    }
    write(index, vectors, best);
  }

  void search(const Group& in, int vectors, float top, float least, float most, Fit& best) {
    const Grids grids(in, vectors, top, least, most);
    Fit found = best;
    for (int s = 0; s <= kSteps; s++) {
      if (grids.error[s] < found.error) {
        found.error = grids.error[s];
        found.scale = grids.scale[s];
        found.bias = grids.bias[s];
      }
    }
    Fit fit;
    derive(in, vectors, top, found.scale, found.bias, fit);
    for (int i = 0; i < kRefits; i++) {
      if (fit.error < best.error) {
        best = fit;
      }
      Grid grid = least_squares(in, vectors, fit.codes);
      if (grid.scale != grid.scale) {
        return;
      }
      derive(in, vectors, top, grid.scale, grid.bias, fit);
    }
    if (fit.error < best.error) {
      best = fit;
    }
  }

  // The result of every grid: the scale and bias of least weighted error for its codes, and that
  // error. Each lane of a vector works on a grid of its own, so no sum goes across lanes.
  struct Grids {
    static constexpr int kCount = (kSteps + kWide) / kWide * kWide; // the last few are not used
    float scale[kCount], bias[kCount], error[kCount];

    Grids(const Group& in, int vectors, float top, float least, float most) {
      const int count = 8 * vectors;
      float above[kMaxGroup];
      for (int k = 0; k < count; k++) {
        above[k] = in.weight(k) - least;
      }
      for (int first = 0; first < kCount; first += kWide) {
        float inverse[kWide];
        for (int j = 0; j < kWide; j++) {
          inverse[j] = (top - 0.9f + kStep * float(first + j)) / (most - least);
        }
        fit(in, count, above, load<fw>(inverse), fw{} + top, first);
      }
    }

    void fit(const Group& in, int count, const float* above, fw inverse, fw top, int first) {
      fw codes[kMaxGroup], cq = {}, cqq = {}, cqw = {};
      for (int k = 0; k < count; k++) {
        codes[k] = min(round(above[k] * inverse), top); // not below 0
        fw t = in.cost(k) * codes[k];
        cq += t;
        cqq += t * codes[k];
        cqw += t * in.weight(k);
      }
      for (int j = 0; j < kWide; j++) {
        Grid grid = least_squares(in, cq[j], cqq[j], cqw[j]);
        scale[first + j] = grid.scale;
        bias[first + j] = grid.bias;
      }
      fw scales = load<fw>(scale + first), biases = load<fw>(bias + first), sum = {};
      for (int k = 0; k < count; k++) {
        fw d = codes[k] * scales + biases - in.weight(k);
        sum += in.cost(k) * d * d;
      }
      store(error + first, sum);
    }
  };

  // The scale and bias of least weighted error for given codes.
  static Grid least_squares(const Group& in, int vectors, const f32x8* codes) {
    f32x8 cq = {}, cqq = {}, cqw = {};
    for (int i = 0; i < vectors; i++) {
      f32x8 t = in.c[i] * codes[i];
      cq += t;
      cqq += t * codes[i];
      cqw += t * in.w[i];
    }
    return least_squares(in, sum(cq), sum(cqq), sum(cqw));
  }

  // The same from sums over the group of c q, c q^2 and c q w; NaN where all codes q are alike.
  static Grid least_squares(const Group& in, double cq, double cqq, double cqw) {
    double c = in.sum_c, cw = in.sum_cw, determinant = c * cqq - cq * cq;
    determinant = determinant > 0 ? determinant : __builtin_nan("");
    return {float((c * cqw - cw * cq) / determinant), float((cqq * cw - cq * cqw) / determinant)};
  }

  static float weighted_error(
      const Group& in, int vectors, const f32x8* codes, float scale, float bias) {
    f32x8 error = {};
    for (int i = 0; i < vectors; i++) {
      f32x8 d = codes[i] * scale + bias - in.w[i];
      error += in.c[i] * d * d;
    }
    return sum(error);
  }

  void derive(const Group& in, int vectors, float top, float scale, float bias, Fit& fit) {
    fit.scale = stored(a.type, scale);
    fit.bias = stored(a.type, bias);
    float inverse = fit.scale != 0 ? 1 / fit.scale : 0;
    for (int i = 0; i < vectors; i++) {
      fit.codes[i] = clamp(round((in.w[i] - fit.bias) * inverse), top);
    }
    fit.error = weighted_error(in, vectors, fit.codes, fit.scale, fit.bias);
  }

  void write(size_t index, int vectors, const Fit& fit) {
    const Packer pack(a.format.bits);
    uint8_t* out = a.codes + index * vectors * a.format.bits;
    for (int i = 0; i < vectors; i++, out += a.format.bits) {
      pack(fit.codes[i], out);
    }
    store_float(a.scales, a.type, index, fit.scale);
    store_float(a.biases, a.type, index, fit.bias);
  }
};

inline void quantize(const Quantize& a) {
  if (!a.importance) {
    return quantize_minmax(a);
  }
  SearchRows body{a};
  parallel_for(int((a.rows + SearchRows::kRowsPerTask - 1) / SearchRows::kRowsPerTask), body);
}

} // namespace optiq::cpu::OPTIQ_ISA
