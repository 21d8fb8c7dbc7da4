#include "launch/layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../metal/layer_shape.h"
#include "cpu/affine_format.h"
#include "launch/instantiate.h"
#include "launch/qmv.h"

namespace optiq::launch {

namespace {

using Kind = Argument::Kind;

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("[plan_decode_layer] " + message);
}

Argument input(LayerInput which) {
  return {Kind::input, int(which)};
}

void check(const DecodeLayer& op) {
  const QuantizedAttention& a = op.attention;
  if (a.batch < 1 || a.batch > kQmvRows) {
    fail("batch is " + std::to_string(a.batch) + "; it must be 1 to " + std::to_string(kQmvRows));
  }
  if (op.qkv.empty() || op.qkv.size() > 3 || op.gate_up.empty() || op.gate_up.size() > 2) {
    fail("there must be 1 to 3 projections before attention and 1 or 2 before the activation");
  }
  if (a.k.dim != a.v.dim || op.rope.dims > a.k.dim) {
    fail("keys and values must be of one size, and what is rotated no larger");
  }
  std::vector<QuantizedWeight> weights = op.qkv;
  weights.insert(weights.end(), {op.out, op.down});
  weights.insert(weights.end(), op.gate_up.begin(), op.gate_up.end());
  for (const auto& w : weights) {
    check_format("plan_decode_layer", "", w.format);
    if (w.scales != weights[0].scales) {
      fail("the scales must have one dtype");
    }
  }
  int columns = 0;
  for (const auto& w : op.qkv) {
    columns += w.out;
  }
  int values = op.qkv.size() == 2 ? 1 : 2;
  if (columns != (a.heads + values * a.kv_heads) * a.k.dim) {
    fail("the projections have " + std::to_string(columns) + " columns for " +
         std::to_string(a.heads) + " and " + std::to_string(a.kv_heads) + " heads of " +
         std::to_string(a.k.dim));
  }
}

HeadsShape heads_shape(const DecodeLayer& op) {
  const QuantizedAttention& a = op.attention;
  int columns = 0;
  for (const auto& w : op.qkv) {
    columns += w.out;
  }
  HeadsShape s{};
  std::copy(a.k.strides.begin(), a.k.strides.end(), s.k_strides);
  std::copy(a.v.strides.begin(), a.v.strides.end(), s.v_strides);
  s.heads = a.heads;
  s.kv_heads = a.kv_heads;
  s.dim = a.k.dim;
  s.width = columns;
  s.k_first = a.heads * a.k.dim;
  s.v_first = op.qkv.size() == 2 ? s.k_first : s.k_first + a.kv_heads * a.k.dim;
  s.token = op.token;
  s.position = op.position;
  s.rotated = op.rope.dims;
  s.traditional = op.rope.traditional;
  s.magnitude = op.rope.magnitude;
  s.bias = op.bias;
  s.norm_q = op.eps_q.has_value();
  s.norm_k = op.eps_k.has_value();
  s.norm_v = op.eps_v.has_value();
  s.eps_q = op.eps_q.value_or(0);
  s.eps_k = op.eps_k.value_or(0);
  s.eps_v = op.eps_v.value_or(0);
  return s;
}

constexpr int kHeads = 1;     // the launch that places keys and values,
constexpr int kAttention = 2; // and the first that reads them

class Planner {
 public:
  Planner(const DecodeLayer& op, const Tuning& tuning)
      : op_(op), a_(op.attention), tuning_(tuning) {}

  Plan plan() {
    Argument h = input(LayerInput::h);
    Argument queries = attended_queries(h);
    Argument attended = attend(queries);
    Argument middle = out(h, attended, op_.out, after_qkv(), op_.eps_attended,
        LayerInput::gains_attended, temporary(row_bytes(op_.width)));
    Argument gated = gate(middle);
    out(middle, gated, op_.down, after_qkv() + 1 + int(op_.gate_up.size()), op_.eps_mlp_out,
        LayerInput::gains_mlp_out, {Kind::output, 0});
    return plan_;
  }

 private:
  size_t row_bytes(int columns) const {
    return size_t(a_.batch) * columns * cpu::size_of(a_.type);
  }
  Argument temporary(size_t bytes) {
    plan_.temporaries.push_back(bytes);
    return {Kind::temporary, int(plan_.temporaries.size()) - 1};
  }
  int after_qkv() const {
    return int(op_.qkv.size());
  }
  // Codes, scales and biases of a weight by its place among all.
  void bind(Launch& launch, int weight) const {
    for (int i = 0; i < 3; i++) {
      launch.arguments.push_back({Kind::input, int(LayerInput::weights) + 3 * weight + i});
    }
  }
  // A launch of a product: its tile, and what kernels for it are compiled for.
  Launch product(const char* function, const std::vector<QuantizedWeight>& weights,
      const std::vector<std::string>& widths, bool norm, int sums, QuantizedShape& shape,
      int inner) {
    QmvTile tile = qmv_tile(a_.batch, tuning_, norm, sums);
    std::vector<std::string> arguments = {metal_name(a_.type), metal_name(op_.qkv[0].scales)};
    for (const auto& some : {widths, tile.arguments()}) {
      arguments.insert(arguments.end(), some.begin(), some.end());
    }
    Launch launch = instantiate("layer.metal", function, arguments);
    shape = quantized_shape(weights, a_.batch, inner, tile.outputs());
    launch.threads.x = uint32_t(32 * tile.simdgroups);
    launch.threadgroups = {
        uint32_t(tiles_of(shape, tile.outputs())), uint32_t(ceil_div(a_.batch, tile.rows))};
    return launch;
  }

  // Queries of each head, normalized and rotated; keys and values are then in the caches.
  Argument attended_queries(Argument h) {
    int columns = 0;
    NormedShape in{};
    for (size_t p = 0; p < op_.qkv.size(); p++) {
      in.first[p] = columns;
      columns += op_.qkv[p].out;
    }
    in.eps = op_.eps_in;
    in.width = columns;
    Argument projected = temporary(row_bytes(columns));
    Launch launch = product("layer_in", op_.qkv, {widths(op_.qkv)}, true, 1, in.product, op_.width);
    launch.arguments = {h, input(LayerInput::gains_in)};
    for (int p = 0; p < 3; p++) { // unused slots are never read, but must be bound
      bind(launch, std::min(p, int(op_.qkv.size()) - 1));
    }
    launch.arguments.insert(launch.arguments.end(), {projected, constants(in)});
    plan_.launches.push_back(launch);

    Argument queries = temporary(row_bytes(a_.heads * a_.k.dim));
    Launch heads = instantiate("layer.metal", "layer_heads", head_types());
    heads.arguments = {projected, input(LayerInput::bias), input(LayerInput::gains_q),
        input(LayerInput::gains_k), input(LayerInput::frequencies), queries, {Kind::output, 1},
        {Kind::output, 2}, constants(heads_shape(op_))};
    heads.threads.x = 32;
    heads.threadgroups = {uint32_t(a_.heads + 2 * a_.kv_heads), uint32_t(a_.batch)};
    plan_.launches.push_back(heads);
    return queries;
  }

  std::vector<std::string> head_types() const {
    std::vector<std::string> types = {metal_name(a_.type)};
    for (const auto* x : {&a_.k, &a_.v}) {
      for (const std::string& part : kv_format(*x)) {
        types.push_back(part);
      }
    }
    return types;
  }

  // The launches of ops.quantized_attention, with their arrays in place of its.
  Argument attend(Argument queries) {
    Plan attending = plan_quantized_attention(a_, tuning_);
    Argument attended = temporary(row_bytes(a_.heads * a_.v.dim));
    int first = int(plan_.temporaries.size());
    plan_.temporaries.insert(
        plan_.temporaries.end(), attending.temporaries.begin(), attending.temporaries.end());
    const Argument inputs[] = {
        queries, {Kind::output, 1}, {Kind::output, 2}, input(LayerInput::sinks)};
    for (Launch& launch : attending.launches) {
      for (Argument& argument : launch.arguments) {
        if (argument.kind == Kind::input) {
          argument = inputs[argument.index];
        } else if (argument.kind == Kind::output) {
          argument = attended;
        } else if (argument.kind == Kind::temporary) {
          argument.index += first;
        }
      }
      plan_.launches.push_back(launch);
    }
    return attended;
  }

  // h + gain * product, to `y`; with a norm of the product between.
  Argument out(Argument h, Argument x, const QuantizedWeight& w, int place,
      const std::optional<float>& eps, LayerInput gains, Argument y) {
    ResidualShape s{};
    int inner = &w == &op_.out ? a_.heads * a_.v.dim : hidden();
    Launch launch = product("layer_out", {w}, {widths({w})}, false, 1, s.product, inner);
    // Before a norm the product alone, for which there is nothing to add.
    s.gain = eps ? 1.0f : op_.gain;
    s.added = !eps;
    Argument result = eps ? temporary(row_bytes(op_.width)) : y;
    launch.arguments = {x};
    bind(launch, place);
    launch.arguments.insert(launch.arguments.end(), {h, result, constants(s)});
    plan_.launches.push_back(launch);
    if (eps) {
      Launch post = instantiate("layer.metal", "layer_post", {metal_name(a_.type)});
      PostShape p{op_.width, *eps, op_.gain, 0};
      post.arguments = {result, input(gains), h, y, constants(p)};
      post.threads.x = 256;
      post.threadgroups.x = uint32_t(a_.batch);
      plan_.launches.push_back(post);
    }
    return y;
  }

  int hidden() const {
    return op_.gate_up.size() == 1 ? op_.gate_up[0].out / 2 : op_.gate_up[0].out;
  }

  Argument gate(Argument h) {
    GatedShape s{};
    bool one = op_.gate_up.size() == 1;
    QuantizedWeight part = op_.gate_up[0];
    part.out = hidden();
    int up_bits = op_.gate_up.back().format.bits;
    QuantizedWeight other = op_.gate_up.back();
    other.out = hidden();
    Launch launch = product("layer_gated", {part, other},
        {std::to_string(part.format.bits), std::to_string(up_bits)}, true, 2, s.product, op_.width);
    launch.threadgroups.x /= 2; // one grid for both
    s.eps = op_.eps_mlp;
    s.up_row = one ? hidden() : 0;
    s.gelu = op_.gelu;
    Argument gated = temporary(row_bytes(hidden()));
    launch.arguments = {h, input(LayerInput::gains_mlp)};
    int place = after_qkv() + 1;
    bind(launch, place);
    bind(launch, one ? place : place + 1);
    launch.arguments.insert(launch.arguments.end(), {gated, constants(s)});
    plan_.launches.push_back(launch);
    return gated;
  }

  static std::string widths(const std::vector<QuantizedWeight>& weights) {
    int set = 0;
    for (const auto& w : weights) {
      set |= 1 << w.format.bits;
    }
    return std::to_string(set);
  }

  const DecodeLayer& op_;
  const QuantizedAttention& a_;
  const Tuning& tuning_;
  Plan plan_;
};

} // namespace

Plan plan_decode_layer(const DecodeLayer& op, const Tuning& tuning) {
  check(op);
  return Planner(op, tuning).plan();
}

LayerPlan::LayerPlan(const DecodeLayer& op, const Tuning& tuning) : tuning_(tuning) {
  make(op);
}

void LayerPlan::make(const DecodeLayer& op) {
  plan_ = plan_decode_layer(op, tuning_);
  made_++;
}

const Plan& LayerPlan::at(const DecodeLayer& op) {
  int attending = plan_.launches[kAttention + 1].source == "attention.metal" ? 2 : 1;
  if (!replan_attention(op.attention, tuning_, &plan_.launches[kAttention], attending)) {
    make(op);
  } else {
    plan_.launches[kHeads].arguments.back() = constants(heads_shape(op));
  }
  return plan_;
}

} // namespace optiq::launch
