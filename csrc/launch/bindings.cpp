#include "launch/bindings.h"

#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "format_caster.h"
#include "launch/attention.h"
#include "launch/copy.h"
#include "launch/kl_divergence.h"
#include "launch/low_rank.h"
#include "launch/quantize.h"
#include "launch/quantized_matmul.h"
#include "launch/tuning.h"
#include "metal/encoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq::launch {

namespace {

Float float_named(const std::string& name) {
  if (name == "float32") {
    return Float::f32;
  }
  if (name == "float16") {
    return Float::f16;
  }
  if (name == "bfloat16") {
    return Float::bf16;
  }
  throw std::invalid_argument(
      "[plan] dtype is '" + name + "'; it must be 'float32', 'float16' or 'bfloat16'");
}

nb::tuple to_python(const Size& size) {
  return nb::make_tuple(size.x, size.y, size.z);
}

nb::dict to_python(const Argument& argument) {
  static const char* kinds[] = {"input", "output", "temporary", "constants"};
  nb::dict out;
  out["kind"] = kinds[int(argument.kind)];
  if (argument.kind == Argument::Kind::constants) {
    out["bytes"] =
        nb::bytes(reinterpret_cast<const char*>(argument.bytes.data()), argument.bytes.size());
  } else {
    out["index"] = argument.index;
  }
  return out;
}

nb::dict to_python(const Launch& launch) {
  nb::dict out;
  out["source"] = launch.source;
  out["kernel"] = launch.kernel;
  out["instantiation"] = launch.instantiation;
  nb::list arguments;
  for (const auto& argument : launch.arguments) {
    arguments.append(to_python(argument));
  }
  out["arguments"] = arguments;
  out["library_name"] = metal::library_name(launch);
  out["library_source"] = metal::library_source(launch);
  out["threadgroups"] = to_python(launch.threadgroups);
  out["threads"] = to_python(launch.threads);
  return out;
}

// What Python gives together with a format.
using Weight = std::pair<int, AffineFormat>;                  // columns of the result
using Vectors = std::pair<int, AffineFormat>;                 // dim
using TypedHead = std::tuple<int, std::string, AffineFormat>; // d, dtype

KvTensor kv_tensor(const Vectors& vectors, const std::array<int64_t, 3>& strides) {
  const auto& [dim, format] = vectors;
  return {dim, format, strides};
}

} // namespace

nb::dict to_python(const Plan& plan) {
  nb::dict out;
  nb::list launches;
  for (const auto& launch : plan.launches) {
    launches.append(to_python(launch));
  }
  out["launches"] = launches;
  out["temporaries"] = plan.temporaries;
  out["strided"] = plan.strided;
  return out;
}

void bind(nb::module_& m) {
  m.def("tuning_knobs", [] {
    nb::dict allowed;
    for (const Knob& knob : knobs()) {
      allowed[knob.name] = knob.allowed;
    }
    return allowed;
  });
  m.def(
      "plan_quantized_matmul",
      [](int rows, int inner, const std::vector<Weight>& weights, const std::string& x,
          const std::variant<std::string, std::vector<std::string>>& scales, bool transpose,
          int experts, bool sorted, const std::string& gpu, std::optional<std::string> tune) {
        QuantizedMatmul op{rows, inner, float_named(x), {}, transpose, experts, sorted};
        for (size_t i = 0; i < weights.size(); i++) {
          const auto& [out, format] = weights[i];
          const auto* one = std::get_if<std::string>(&scales);
          const auto& type = one ? *one : std::get<1>(scales).at(i);
          op.weights.push_back({out, format, float_named(type)});
        }
        Gpu chip = parse_gpu(gpu);
        return to_python(plan_quantized_matmul(op, tune ? tuning(chip, *tune) : tuning(chip)));
      },
      "rows"_a, "inner"_a, "weights"_a, "x"_a = "float16", "scales"_a = "float16",
      "transpose"_a = true, "experts"_a = 0, "sorted"_a = false, nb::kw_only(),
      "gpu"_a = "applegpu_g15s", "tune"_a = nb::none());
  m.def(
      "plan_row_contiguous",
      [](const std::vector<int>& shape, const std::vector<int64_t>& strides, size_t itemsize) {
        return to_python(plan_row_contiguous(shape, strides, itemsize));
      },
      "shape"_a, "strides"_a, "itemsize"_a);
  m.def(
      "plan_kl_divergence",
      [](int tokens, int vocabulary, const TypedHead& p, const TypedHead& q, float soft_cap) {
        auto head = [](const TypedHead& side) {
          const auto& [d, dtype, format] = side;
          return Head{d, float_named(dtype), format};
        };
        return to_python(plan_kl_divergence({tokens, vocabulary, head(p), head(q), soft_cap}));
      },
      "tokens"_a, "vocabulary"_a, "p"_a, "q"_a, "soft_cap"_a = 0.0f);
  m.def(
      "plan_low_rank",
      [](int rows, int in, int out, int rank, int slots, const std::string& dtype) {
        return to_python(plan_low_rank({rows, in, out, rank, slots, float_named(dtype)}));
      },
      "rows"_a, "in"_a, "out"_a, "rank"_a, "slots"_a, "dtype"_a = "float16");
  m.def(
      "plan_quantize",
      [](size_t rows, size_t cols, int group_size, int bits, const std::string& dtype,
          size_t rows_per_importance) {
        return to_python(plan_quantize({rows, cols, {.bits = bits, .group_size = group_size},
            float_named(dtype), rows_per_importance}));
      },
      "rows"_a, "cols"_a, "group_size"_a = 64, "bits"_a = 4, "dtype"_a = "float16",
      "rows_per_importance"_a = 0);
  m.def(
      "plan_quantized_attention",
      [](const std::array<int, 5>& sizes, const Vectors& k, const Vectors& v,
          const std::array<int64_t, 3>& k_strides, const std::array<int64_t, 3>& v_strides,
          const std::string& dtype, float scale, bool causal, int window, float softcap,
          std::optional<std::array<int, 4>> mask, bool added, bool sinks, bool starts, int first,
          int recent, const std::string& gpu, std::optional<std::string> tune) {
        using Mask = QuantizedAttention::Mask;
        QuantizedAttention op;
        std::tie(op.batch, op.heads, op.kv_heads, op.rows, op.keys) = std::tuple_cat(sizes);
        op.k = kv_tensor(k, k_strides);
        op.v = kv_tensor(v, v_strides);
        op.type = float_named(dtype);
        op.scale = scale;
        op.softcap = softcap;
        op.causal = causal;
        op.window = window;
        op.mask = !mask ? Mask::none : added ? Mask::added : Mask::seen;
        op.mask_shape = mask.value_or(std::array<int, 4>{});
        op.sinks = sinks;
        op.starts = starts;
        op.first = first;
        op.recent = recent;
        Gpu chip = parse_gpu(gpu);
        return to_python(plan_quantized_attention(op, tune ? tuning(chip, *tune) : tuning(chip)));
      },
      "sizes"_a, "k"_a, "v"_a, "k_strides"_a, "v_strides"_a, nb::kw_only(), "dtype"_a = "float16",
      "scale"_a = 1.0f, "causal"_a = false, "window"_a = 0, "softcap"_a = 0.0f,
      "mask"_a = nb::none(), "added"_a = false, "sinks"_a = false, "starts"_a = false,
      "first"_a = 0, "recent"_a = 0, "gpu"_a = "applegpu_g15s", "tune"_a = nb::none());
  m.def(
      "plan_quantize_kv",
      [](size_t count, const Vectors& vectors, const std::string& dtype) {
        const auto& [dim, format] = vectors;
        return to_python(plan_quantize_kv({count, dim, format, float_named(dtype)}));
      },
      "count"_a, "vectors"_a, "dtype"_a = "float16");
  m.def(
      "require_threads",
      [](const std::string& kernel, uint32_t threads, size_t allowed) {
        Launch launch{.kernel = kernel, .threads = {threads}};
        metal::require_threads(launch, allowed);
      },
      "kernel"_a, "threads"_a, "allowed"_a);
  m.def("array_size", &metal::array_size, "bytes"_a);
}

} // namespace optiq::launch
