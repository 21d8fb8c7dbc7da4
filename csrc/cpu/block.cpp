#include "block.h"

#include "memory.h"
#include "ranks.h"

#include <algorithm>
#include <cmath>

namespace optiq::cpu {
namespace {

// Intermediate values of an MLP that are alive at once; more rows are taken in turns.
constexpr size_t kMlpValues = size_t(1) << 22;

using Values = Buffer<float>;

void multiply(const float* x, int rows, const Projection* from, int count, float* const* y,
    Adapters adapters) {
  Part parts[3];
  for (int i = 0; i < count; i++) {
    parts[i] = {from[i].w, y[i]};
  }
  kernels().products({x, rows, parts, count});
  if (adapters.slots) {
    LowRankPart terms[3];
    int n = 0;
    for (int i = 0; i < count; i++) {
      if (adapters.terms[i]) {
        terms[n++] = {adapters.terms[i], y[i], from[i].w.rows};
      }
    }
    kernels().low_rank({x, rows, from[0].w.cols, adapters.slots, terms, n});
  }
}

void norm(const Norm& n, const float* x, size_t rows, int dims, float* y) {
  kernels().rms_norm({x, nullptr, n.weight, y, rows, dims, n.eps, 1, true});
}

// y = h + gain * post(x + bias), where x + bias is added up over the ranks; x is overwritten.
void add(const float* h, float* x, const Projection& from, const Ranks* ranks,
    const std::optional<Norm>& post, float gain, size_t rows, float* y) {
  int dims = from.w.rows;
  if (from.bias) {
    for (size_t r = 0; r < rows; r++) {
      for (int i = 0; i < dims; i++) {
        x[r * dims + i] += from.bias[i];
      }
    }
  }
  if (ranks) {
    ranks->total(x, rows * dims);
  }
  Norm n = post.value_or(Norm{});
  kernels().rms_norm({x, h, n.weight, y, rows, dims, n.eps, gain, post.has_value()});
}

// Consecutive blocks with the same positions share them.
struct Turns {
  std::vector<double> frequencies;
  double magnitude = 0;
  std::vector<int64_t> positions;
  std::vector<float> cos_sin;
};

} // namespace

const float* turns(const Rope& rope, int batch, int rows, Positions at) {
  thread_local Turns kept;
  std::vector<int64_t> positions(size_t(batch) * rows);
  for (int b = 0; b < batch; b++) {
    for (int r = 0; r < rows; r++) {
      positions[size_t(b) * rows + r] = at.starts[b] + r;
    }
  }
  if (kept.positions == positions && kept.magnitude == rope.magnitude &&
      kept.frequencies == rope.frequencies) {
    return kept.cos_sin.data();
  }
  size_t half = rope.frequencies.size();
  kept.cos_sin.resize(positions.size() * 2 * half);
  for (size_t r = 0; r < positions.size(); r++) {
    float* out = kept.cos_sin.data() + r * 2 * half;
    for (size_t i = 0; i < half; i++) {
      double angle = double(positions[r]) * rope.frequencies[i];
      out[i] = float(std::cos(angle) * rope.magnitude);
      out[half + i] = float(std::sin(angle) * rope.magnitude);
    }
  }
  kept.frequencies = rope.frequencies;
  kept.magnitude = rope.magnitude;
  kept.positions = std::move(positions);
  return kept.cos_sin.data();
}

void project(const AttentionLayer& layer, const float* h, int batch, int rows, Positions positions,
    HeadsOut q, HeadsOut k, HeadsOut v, Adapters adapters) {
  size_t m = size_t(batch) * rows;
  int width = layer.qkv[0].w.cols;
  Values normed(layer.in ? m * width : 0);
  if (layer.in) {
    norm(*layer.in, h, m, width, normed.get());
    h = normed.get();
  }
  size_t q_width = size_t(layer.heads) * layer.head_dim;
  size_t kv_width = size_t(layer.kv_heads) * layer.head_dim;
  Values out(m * (q_width + 2 * kv_width));
  bool packed = layer.qkv.size() == 1;
  float* parts[3] = {out.get(), out.get() + (packed ? 1 : m) * q_width,
      out.get() + (packed ? 1 : m) * (q_width + kv_width)};
  multiply(h, int(m), layer.qkv.data(), int(layer.qkv.size()), parts, adapters);
  const float* cos_sin = layer.rope.dims ? turns(layer.rope, batch, rows, positions) : nullptr;
  if (layer.qkv.size() == 2) { // values are the keys before their norm and rotation
    parts[2] = parts[1];
  }
  const HeadsOut to[3] = {q, k, v};
  const std::optional<Norm>* norms[3] = {&layer.q, &layer.k, &layer.v};
  size_t from = 0; // first column of a packed projection
  for (int i = 0; i < 3; i++) {
    size_t columns = i == 0 ? q_width : kv_width;
    Heads a{};
    a.x = parts[i];
    a.stride = packed ? q_width + 2 * kv_width : columns;
    const float* bias = layer.qkv[std::min<size_t>(i, layer.qkv.size() - 1)].bias;
    a.bias = bias && packed ? bias + from : bias; // of these columns
    if (*norms[i]) {
      a.norm = layer.whole_norm && i < 2 ? Heads::all_heads : Heads::each_head;
      a.weight = (*norms[i])->weight;
      a.eps = (*norms[i])->eps;
    }
    a.cos_sin = i < 2 ? cos_sin : nullptr;
    a.rotated = layer.rope.dims;
    a.traditional = layer.rope.traditional;
    a.y = to[i].data;
    a.y_batch = to[i].batch;
    a.y_head = to[i].head;
    a.y_row = to[i].row;
    a.batch = batch;
    a.rows = rows;
    a.heads = i == 0 ? layer.heads : layer.kv_heads;
    a.dim = layer.head_dim;
    kernels().heads(a);
    from += columns;
  }
}

void attend(const AttentionLayer& layer, const float* h, int rows, Attention* all, int count,
    float* y, Adapters adapters) {
  Values context(size_t(rows) * layer.out.w.cols);
  Values out(size_t(rows) * layer.width());
  float* next = context.get();
  for (int i = 0; i < count; i++) {
    Attention& a = all[i];
    a.heads = layer.heads;
    a.kv_heads = layer.kv_heads;
    a.scale = layer.scale;
    a.softcap = layer.softcap;
    a.sinks = layer.sinks;
    a.dim = a.value_dim = layer.head_dim;
    a.y = next;
    next += size_t(a.batch) * a.rows * layer.out.w.cols;
  }
  kernels().attention(all, count);
  float* part = out.get();
  multiply(context.get(), rows, &layer.out, 1, &part, adapters);
  add(h, part, layer.out, layer.ranks, layer.post, layer.gain, rows, y);
}

void mlp(const MlpLayer& layer, const float* h, int rows, float* y, Adapters adapters) {
  size_t width = layer.down.w.rows, inner = layer.down.w.cols;
  bool packed = layer.gate_up.size() == 1;
  int most = int(std::clamp<size_t>(kMlpValues / (3 * inner), 32, std::max(rows, 32)));
  most = std::min(most, rows);
  Values normed(layer.in ? most * width : 0);
  Values gate_up(most * 2 * inner), gated(most * inner);
  // Ranks with other rows take other turns, so they add up what they have when all are over.
  size_t step = layer.ranks ? width : 0;
  Values out((layer.ranks ? rows : most) * width);
  for (int begin = 0; begin < rows; begin += most) {
    int m = std::min(most, rows - begin);
    const float* x = h + begin * width;
    if (layer.in) {
      norm(*layer.in, x, m, int(width), normed.get());
    }
    float* parts[2] = {gate_up.get(), gate_up.get() + (packed ? 1 : m) * inner};
    Adapters of_rows{adapters.slots ? adapters.slots + begin : nullptr, adapters.terms};
    multiply(layer.in ? normed.get() : x, m, layer.gate_up.data(), int(layer.gate_up.size()), parts,
        of_rows);
    Gate g{parts[0], parts[1], packed ? 2 * inner : inner, layer.gate_up[0].bias, nullptr,
        gated.get(), size_t(m), inner, layer.activation};
    if (g.gate_bias) {
      g.up_bias = packed ? g.gate_bias + inner : layer.gate_up[1].bias;
    }
    kernels().gate(g);
    float* part = out.get() + begin * step;
    multiply(gated.get(), m, &layer.down, 1, &part, of_rows.after(layer.gate_up.size()));
    if (!layer.ranks) {
      add(x, part, layer.down, nullptr, layer.post, layer.gain, m, y + begin * width);
    }
  }
  if (layer.ranks) {
    add(h, out.get(), layer.down, layer.ranks, layer.post, layer.gain, rows, y);
  }
}

} // namespace optiq::cpu
