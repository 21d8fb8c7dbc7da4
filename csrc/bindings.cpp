#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/pool.h"
#include "format_caster.h"
#include "launch/bindings.h"
#include "ops/decode_layer_bindings.h"
#include "ops/decoder_block_bindings.h"
#include "ops/dequantize.h"
#include "ops/descend.h"
#include "ops/embedding.h"
#include "ops/kl_divergence.h"
#include "ops/kv_records.h"
#include "ops/linear.h"
#include "ops/mixed_quantized_matmul.h"
#include "ops/quantize.h"
#include "ops/quantized_attention.h"
#include "ops/quantized_matmul.h"
#include "ops/ranks.h"
#include "ops/room.h"
#include "ops/rotary.h"
#include "ops/training.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;
using mx::array;
using optiq::AffineFormat;

NB_MODULE(_ext, m) {
  m.doc() = "Native kernels of optiq as MLX primitives; use them through optiq.ops.";
  m.def("isa", [] { return optiq::cpu::kernels().isa; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto* kernels : optiq::cpu::usable_kernels()) {
      names.push_back(kernels->isa);
    }
    return names;
  });
  m.def("num_threads", &optiq::cpu::num_threads);
  m.def("linear", &optiq::linear, "x"_a, "w"_a, "transpose"_a = true, nb::kw_only(),
      "indices"_a = nb::none(), "stream"_a = nb::none());
  m.def(
      "quantized_matmul",
      [](const array& x, const array& w, const array& scales, const array& biases, bool transpose,
          int group_size, int bits, const std::optional<array>& indices, bool sorted_indices,
          bool exact, mx::StreamOrDevice s) {
        AffineFormat format{.bits = bits, .group_size = group_size};
        return optiq::quantized_matmul(
            x, {w, scales, biases, format}, transpose, indices, sorted_indices, exact, s);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a, "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4,
      nb::kw_only(), "indices"_a = nb::none(), "sorted_indices"_a = false, "exact"_a = true,
      "stream"_a = nb::none());
  m.def(
      "mixed_quantized_matmul",
      [](const array& x, const std::vector<std::tuple<array, array, array, int, int>>& parts,
          bool exact, mx::StreamOrDevice s) {
        std::vector<optiq::AffineWeight> weights;
        for (const auto& [codes, scales, biases, group_size, bits] : parts) {
          weights.push_back({codes, scales, biases, {.bits = bits, .group_size = group_size}});
        }
        return optiq::mixed_quantized_matmul(x, weights, exact, s);
      },
      "x"_a, "parts"_a, nb::kw_only(), "exact"_a = true, "stream"_a = nb::none());
  m.def(
      "embedding",
      [](const array& ids, const array& w, const array& scales, const array& biases, int group_size,
          int bits, mx::StreamOrDevice s) {
        return optiq::embedding(
            ids, {w, scales, biases, {.bits = bits, .group_size = group_size}}, s);
      },
      "ids"_a, "w"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def(
      "dequantize",
      [](const array& w, const array& scales, const array& biases, int group_size, int bits,
          mx::StreamOrDevice s) {
        return optiq::dequantize({w, scales, biases, {.bits = bits, .group_size = group_size}}, s);
      },
      "w"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("quantize", &optiq::quantize, "w"_a, "importance"_a = nb::none(), "group_size"_a = 64,
      "bits"_a = 4, nb::kw_only(), "stream"_a = nb::none());
  m.def("descend", &optiq::descend, "w"_a, "codes"_a, "scales"_a, "biases"_a, "hessian"_a,
      "samples"_a.none(), "outputs"_a.none(), "group_size"_a, "bits"_a, "sweeps"_a);
  m.def("kl_divergence", &optiq::kl_divergence, "h_p"_a, "w_p"_a, "h_q"_a, "w_q"_a, "format_p"_a,
      "format_q"_a, "soft_cap"_a = 0.0f, nb::kw_only(), "stream"_a = nb::none());
  m.def("compare_logits", &optiq::compare_logits, "p"_a, "q"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("rms_norm", &optiq::rms_norm, "x"_a, "weight"_a, "eps"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("gated", &optiq::gated, "gate"_a, "up"_a, "activation"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("cross_entropy", &optiq::cross_entropy, "logits"_a, "labels"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("causal_softmax", &optiq::causal_softmax, "scores"_a, "scale"_a, "queries"_a,
      "window"_a = 0, nb::kw_only(), "stream"_a = nb::none());
  m.def("add_low_rank", &optiq::add_low_rank, "y"_a, "x"_a, "a"_a, "b"_a, "scale"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("rotary", &optiq::rotary, "x"_a, "dims"_a, "traditional"_a, "frequencies"_a, "magnitude"_a,
      "offset"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("adamw", &optiq::adamw, "parameter"_a, "gradient"_a, "m"_a, "v"_a, "step"_a, "by"_a,
      "rate"_a, "decay"_a, "b1"_a, "b2"_a, "eps"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def(
      "room",
      [](const std::vector<int>& shape, mx::Dtype dtype, mx::StreamOrDevice s) {
        return optiq::room(mx::Shape(shape.begin(), shape.end()), dtype, s);
      },
      "shape"_a, "dtype"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("quantize_kv", &optiq::quantize_kv, "x"_a, "group_size"_a, "bits"_a, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("dequantize_kv", &optiq::dequantize_kv, "records"_a, "dim"_a, "group_size"_a, "bits"_a,
      "dtype"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("quantized_attention", &optiq::quantized_attention, "q"_a, "k"_a, "v"_a, "k_format"_a,
      "v_format"_a, "scale"_a, "masking"_a = "", "mask"_a = nb::none(), "window"_a = 0,
      "sinks"_a = nb::none(), "softcap"_a = 0.0f, "starts"_a = nb::none(), "first"_a = nb::none(),
      "recent"_a = nb::none(), "value_dim"_a = 0, nb::kw_only(), "stream"_a = nb::none());
  optiq::bind_ranks(m);
  optiq::bind_decoder_block(m);
  optiq::bind_decode_layer(m);
  optiq::bind_prepared_stack(m);
  optiq::launch::bind(m);
}
