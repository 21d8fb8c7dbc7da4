#include "ops/decode_layer_bindings.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "format_caster.h"
#include "launch/bindings.h"
#include "ops/affine_weight.h"
#include "ops/decode_layer.h"
#include "ops/fail.h"
#include "ops/matmul.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq {
namespace {

using Matrix = std::tuple<array, array, array, int, int>; // codes, scales, biases, group, bits
using Norm = std::optional<std::tuple<std::optional<array>, float>>; // (gains, eps)
using Rope = std::tuple<int, bool, array, float>; // dims, traditional, frequencies, magnitude
using Place = std::tuple<int, int, int>;          // token, keys, position

// A scheduled step keeps the layer itself, which needs no Python to be dropped. (Not Handle:
// nanobind tells types by their names, and DecoderBlock has one of that name.)
struct LayerHandle {
  std::shared_ptr<LaunchedLayer> layer = std::make_shared<LaunchedLayer>();
};

// What there is of a layer, into its description and the inputs of its plans.
class Describer {
 public:
  explicit Describer(LaunchedLayer& layer) : layer_(layer) {}

  launch::QuantizedWeight weight(const Matrix& m) {
    const auto& [codes, scales, biases, group_size, bits] = m;
    AffineFormat format{.bits = bits, .group_size = group_size};
    AffineWeight w{codes, scales, biases, format};
    int rows = w.shape("decode_layer", "a projection: ")[0];
    layer_.arrays.insert(layer_.arrays.end(), {codes, scales, biases});
    return {rows, format, float_type(scales.dtype())};
  }
  std::vector<launch::QuantizedWeight> weights(const std::vector<Matrix>& some) {
    std::vector<launch::QuantizedWeight> all;
    for (const Matrix& m : some) {
      all.push_back(weight(m));
    }
    return all;
  }
  // In float32 and of one axis; what is not there is bound all the same.
  void vector(const std::optional<array>& a) {
    if (a && (a->ndim() != 1 || a->dtype() != mx::float32)) {
      fail("decode_layer", "a vector is ", a->shape(), " ", a->dtype(), "; it must be float32");
    }
    layer_.arrays.push_back(a.value_or(array(0.0f)));
  }
  std::optional<float> norm(const Norm& n) {
    vector(n ? std::get<0>(*n) : std::nullopt);
    return n ? std::optional(std::get<1>(*n)) : std::nullopt;
  }

 private:
  LaunchedLayer& layer_;
};

void describe(LayerHandle* self, int width, const std::vector<Matrix>& qkv, const Matrix& out,
    const std::vector<Matrix>& gate_up, const Matrix& down, int heads, int kv_heads, int dim,
    float scale, const std::tuple<array, float>& norm, const std::tuple<array, float>& mlp_norm,
    const Norm& q_norm, const Norm& k_norm, std::optional<float> v_eps, const Norm& post_norm,
    const Norm& mlp_post_norm, const std::optional<array>& bias, const std::optional<Rope>& rope,
    const std::optional<array>& sinks, float softcap, float gain, bool gelu, mx::Dtype dtype,
    AffineFormat k_format, AffineFormat v_format) {
  new (self) LayerHandle();
  launch::DecodeLayer& op = self->layer->described;
  Describer d(*self->layer);
  self->layer->dtype = dtype;
  op.width = width;
  op.attention.heads = heads;
  op.attention.kv_heads = kv_heads;
  op.attention.type = float_type(dtype);
  op.attention.k = {dim, k_format, {}};
  op.attention.v = {dim, v_format, {}};
  op.attention.scale = scale;
  op.attention.softcap = softcap;
  op.attention.sinks = sinks.has_value();
  op.eps_v = v_eps;
  op.bias = bias.has_value();
  op.gain = gain;
  op.gelu = gelu;
  // The order is that of launch::LayerInput.
  op.eps_in = *d.norm(norm);
  op.eps_mlp = *d.norm(mlp_norm);
  op.eps_q = d.norm(q_norm);
  op.eps_k = d.norm(k_norm);
  op.eps_attended = d.norm(post_norm);
  op.eps_mlp_out = d.norm(mlp_post_norm);
  d.vector(bias);
  d.vector(rope ? std::optional(std::get<2>(*rope)) : std::nullopt);
  d.vector(sinks);
  if (rope) {
    op.rope = {std::get<0>(*rope), std::get<1>(*rope), std::get<3>(*rope)};
  }
  op.qkv = d.weights(qkv);
  op.out = d.weight(out);
  op.gate_up = d.weights(gate_up);
  op.down = d.weight(down);
}

TokenPlace place_of(const Place& place) {
  const auto& [token, keys, position] = place;
  return {token, keys, position};
}

} // namespace

void bind_decode_layer(nb::module_& m) {
  nb::class_<LayerHandle>(m, "DecodeLayer")
      .def("__init__", &describe, nb::kw_only(), "width"_a, "qkv"_a, "out"_a, "gate_up"_a, "down"_a,
          "heads"_a, "kv_heads"_a, "dim"_a, "scale"_a, "norm"_a, "mlp_norm"_a,
          "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "v_eps"_a = nb::none(),
          "post_norm"_a = nb::none(), "mlp_post_norm"_a = nb::none(), "bias"_a = nb::none(),
          "rope"_a = nb::none(), "sinks"_a = nb::none(), "softcap"_a = 0.0f, "gain"_a = 1.0f,
          "gelu"_a = false, "dtype"_a, "k_format"_a = AffineFormat{}, "v_format"_a = AffineFormat{})
      .def_prop_ro("arrays", [](const LayerHandle& h) { return h.layer->arrays; })
      .def_prop_ro("plans_made", [](const LayerHandle& h) { return h.layer->plans_made(); })
      .def(
          "plan",
          [](const LayerHandle& h, int batch, const Place& place,
              const LaunchedLayer::Strides& k_strides, const LaunchedLayer::Strides& v_strides,
              const std::string& gpu, const std::optional<std::string>& tune) {
            launch::Gpu chip = launch::parse_gpu(gpu);
            std::lock_guard lock(h.layer->mutex);
            return launch::to_python(h.layer
                    ->plan(batch, place_of(place), k_strides, v_strides,
                        tune ? launch::tuning(chip, *tune) : launch::tuning(chip))
                    .first);
          },
          "batch"_a, "place"_a, "k_strides"_a, "v_strides"_a, "gpu"_a = "applegpu_g15s",
          "tune"_a = nb::none());
  m.def(
      "decode_layer",
      [](const LayerHandle& h, const array& x, const array& keys, const array& values,
          const Place& place, mx::StreamOrDevice s) {
        return decode_layer(h.layer, x, keys, values, place_of(place), s);
      },
      "layer"_a, "h"_a, "keys"_a, "values"_a, "place"_a, nb::kw_only(), "stream"_a = nb::none());
}

} // namespace optiq
