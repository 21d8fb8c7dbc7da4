// A decoder block out of the kernels: norm, projections, rotation, attention, gated MLP, residuals.
// Plain data and the calls in order; compiled once, it uses whichever kernels() were chosen.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "types.h"

namespace optiq::cpu {

class Ranks;

struct Projection {
  Weight w;
  const float* bias = nullptr; // [w.rows]
};

struct Norm {
  const float* weight = nullptr; // null: ones
  float eps = 0;
};

// Rotates by position / wavelength, with sines and cosines times `magnitude`.
struct Rope {
  int dims = 0; // 0: none
  bool traditional = false;
  std::vector<double> frequencies; // [dims / 2], radians per position
  double magnitude = 1;
};

struct AttentionLayer {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1, softcap = 0, gain = 1; // gain: of what is added to the residual stream
  std::vector<Projection> qkv; // three; or one with the rows of all; or two, values like keys
  Projection out;
  std::optional<Norm> in, q, k, v, post;
  bool whole_norm = false; // q and k norms run over all heads together
  Rope rope;
  const float* sinks = nullptr;
  const Ranks* ranks = nullptr; // that have other heads; the products with `out` are added up
  int width() const {           // of the residual stream
    return out.w.rows;
  }
};

struct MlpLayer {
  std::vector<Projection> gate_up; // two, or one with the rows of both
  Projection down;
  std::optional<Norm> in, post;
  Activation activation = Activation::silu;
  float gain = 1;
  const Ranks* ranks = nullptr; // that have other rows
};

// Where the new keys and values of a step go: [batch, head, row, head_dim] by strides.
struct HeadsOut {
  float* data;
  size_t batch, head, row;
};

// Positions of the rows of each batch entry: starts[b] + row.
struct Positions {
  const int64_t* starts;
};

// Cosines and sines [batch * rows, dims] of the positions: those of the last call, where they are
// the same, in memory of this thread that the next call may change.
OPTIQ_API const float* turns(const Rope& rope, int batch, int rows, Positions at);

// Terms beside the products of a part: of each projection in their order, by slot, or null; `slots`
// are those of the rows. Without slots there are none.
struct Adapters {
  const int* slots = nullptr;
  const LowRank* const* terms = nullptr;

  Adapters after(size_t projections) const {
    return {slots, slots ? terms + projections : nullptr};
  }
};

// Queries, keys and values of h[batch * rows, width].
OPTIQ_API void project(const AttentionLayer& layer, const float* h, int batch, int rows,
    Positions positions, HeadsOut q, HeadsOut k, HeadsOut v, Adapters adapters = {});

// y = h + post(out(attention)) of `rows` rows of h; the `count` attentions, rows after rows, hold
// everything but y.
OPTIQ_API void attend(const AttentionLayer& layer, const float* h, int rows, Attention* a,
    int count, float* y, Adapters adapters = {});

// y = h + post(down(act(gate) * up)) for h[rows, width]; y may be h.
OPTIQ_API void mlp(
    const MlpLayer& layer, const float* h, int rows, float* y, Adapters adapters = {});

} // namespace optiq::cpu
