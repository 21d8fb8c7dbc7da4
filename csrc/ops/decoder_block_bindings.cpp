#include "ops/decoder_block_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "format_caster.h"
#include "ops/block_parts.h"
#include "ops/block_steps.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq {
namespace {

// What Python holds, for the same reason as a BlockHandle.
struct Terms {
  TermsPtr terms;
};

using Slots = std::vector<int>;

using MaybeArray = std::optional<array>;
using MaybePair = std::optional<KeyValues::Pair>;

template <class... Args>
auto method(void (DecoderBlock::*f)(Args...)) {
  return [f](BlockHandle& h, Args... args) { ((*h.block).*f)(std::forward<Args>(args)...); };
}

} // namespace

void bind_decoder_block(nb::module_& m) {
  nb::class_<Terms>(m, "LowRankTerms")
      .def(
          "__init__",
          [](Terms* self, int slots, int in, int out) {
            new (self) Terms{std::make_shared<LowRankTerms>(slots, in, out)};
          },
          "slots"_a, "in"_a, "out"_a)
      .def(
          "put",
          [](Terms& t, int slot, const array& a, const array& b, const std::optional<array>& gain) {
            t.terms->put(slot, a, b, gain);
          },
          "slot"_a, "a"_a, "b"_a, "gain"_a = nb::none())
      .def("clear", [](Terms& t, int slot) { t.terms->clear(slot); }, "slot"_a);
  nb::class_<TiledHandle>(m, "TiledWeight")
      .def_prop_ro("arrays", [](const TiledHandle& t) { return t.arrays; })
      .def(
          "stands_for",
          [](const TiledHandle& t, const std::vector<array>& arrays) {
            return same(arrays, t.arrays);
          },
          "arrays"_a);
  m.def(
      "tile",
      [](const array& w, const array& scales, const array& biases, int group_size, int bits) {
        auto tiled =
            TiledWeight::make({w, scales, biases, {.bits = bits, .group_size = group_size}});
        return tiled ? std::optional(TiledHandle{.weight = tiled}) : std::nullopt;
      },
      "w"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a);
  m.def(
      "tiled_matmul",
      [](const array& x, const TiledHandle& w, bool exact, mx::StreamOrDevice s) {
        return TiledWeight::product(x, w.weight, exact, s);
      },
      "x"_a, "w"_a, "exact"_a = true, nb::kw_only(), "stream"_a = nb::none());
  m.def(
      "to_half",
      [](nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> from, float factor,
          nb::ndarray<uint16_t, nb::ndim<2>, nb::device::cpu> to) {
        if (to.shape(0) != from.shape(0) || to.shape(1) != from.shape(1) || to.stride(1) != 1) {
          throw nb::value_error("to_half: both must have one shape, and contiguous rows");
        }
        to_half(from.data(), factor, from.shape(0), from.shape(1), to.data(), to.stride(0));
      },
      "from"_a.noconvert(), "factor"_a, "to"_a.noconvert());
  m.def("use_large_pages", &use_large_pages, "a"_a);
  m.def(
      "gathered_low_rank",
      [](const array& x, const Terms& t, const Slots& slots, mx::StreamOrDevice s) {
        return gathered_low_rank(x, *t.terms, slots, s);
      },
      "x"_a, "terms"_a, "slots"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def(
      "gathered_low_rank",
      [](const array& x, const array& a, const array& b, const array& slots, mx::StreamOrDevice s) {
        return gathered_low_rank(x, a, b, slots, s);
      },
      "x"_a, "a"_a, "b"_a, "slots"_a, nb::kw_only(), "stream"_a = nb::none());
  nb::class_<BlockHandle>(m, "DecoderBlock")
      .def(
          "__init__",
          [](BlockHandle* self, bool exact, const std::optional<RanksHandle>& ranks) {
            new (self) BlockHandle{
                std::make_shared<DecoderBlock>(exact, ranks ? ranks->ranks : nullptr), {}};
          },
          "exact"_a = true, "ranks"_a = nb::none())
      .def("set_attention", method(&DecoderBlock::set_attention), nb::kw_only(), "qkv"_a, "out"_a,
          "heads"_a, "kv_heads"_a, "scale"_a, "norm"_a = nb::none(), "q_norm"_a = nb::none(),
          "k_norm"_a = nb::none(), "v_norm"_a = nb::none(), "post_norm"_a = nb::none(),
          "whole_norm"_a = false, "rope"_a = nb::none(), "sinks"_a = nb::none(), "softcap"_a = 0.0f,
          "gain"_a = 1.0f)
      .def("set_mlp", method(&DecoderBlock::set_mlp), nb::kw_only(), "gate_up"_a, "down"_a,
          "activation"_a, "norm"_a = nb::none(), "post_norm"_a = nb::none(), "gain"_a = 1.0f)
      .def(
          "set_terms",
          [](BlockHandle& h, const std::vector<std::optional<Terms>>& terms) {
            std::vector<TermsPtr> all;
            for (const auto& t : terms) {
              all.push_back(t ? t->terms : nullptr);
            }
            h.block->set_terms(all);
          },
          "terms"_a)
      .def("watch", &BlockHandle::watch, "children"_a)
      .def("unchanged", &BlockHandle::unchanged, "parents"_a, "keys"_a, "children"_a);
  m.def("traced", [](const array& a) { return a.is_tracer(); }, "a"_a);
  m.def(
      "block_project",
      [](const BlockHandle& h, const array& x, int offset, const MaybeArray& offsets,
          const Slots& slots,
          mx::StreamOrDevice s) { return block_project(h.block, x, offset, offsets, slots, s); },
      "block"_a, "h"_a, "offset"_a = 0, "offsets"_a = nb::none(), "slots"_a = Slots{},
      nb::kw_only(), "stream"_a = nb::none());
  m.def(
      "block_attend",
      [](const BlockHandle& h, const array& x, const array& q, const std::vector<array>& keys,
          const std::vector<array>& values, const std::string& masking, const MaybeArray& mask,
          bool mlp, AffineFormat k_format, AffineFormat v_format, int window,
          const MaybeArray& starts, const MaybePair& first, const MaybePair& recent,
          const Slots& slots, mx::StreamOrDevice s) {
        KeyValues kv{k_format, v_format, masking, mask, window, starts, first, recent};
        return block_attend(h.block, x, q, keys, values, kv, mlp, slots, s);
      },
      "block"_a, "h"_a, "q"_a, "keys"_a, "values"_a, "masking"_a, "mask"_a = nb::none(),
      "mlp"_a = false, "k_format"_a = AffineFormat{}, "v_format"_a = AffineFormat{}, "window"_a = 0,
      "starts"_a = nb::none(), "first"_a = nb::none(), "recent"_a = nb::none(), "slots"_a = Slots{},
      nb::kw_only(), "stream"_a = nb::none());
  using Places = std::vector<std::tuple<int, int, int, int>>;
  auto at = [](const Places& places) {
    std::vector<CachePlace> out;
    for (const auto& [start, length, offset, rows] : places) {
      out.push_back({start, length, offset, rows});
    }
    return out;
  };
  m.def(
      "block_step",
      [at](const BlockHandle& h, const array& x, const std::vector<array>& keys,
          const std::vector<array>& values, const Places& places, const std::string& masking,
          const MaybeArray& mask, bool mlp, AffineFormat k_format, AffineFormat v_format,
          const Slots& slots, mx::StreamOrDevice s) {
        KeyValues kv{k_format, v_format, masking, mask, 0, {}, {}, {}};
        return block_step({h.block, keys, values, at(places), kv, slots}, x, mlp, s);
      },
      "block"_a, "h"_a, "keys"_a, "values"_a, "places"_a, "masking"_a, "mask"_a = nb::none(),
      "mlp"_a = false, "k_format"_a = AffineFormat{}, "v_format"_a = AffineFormat{},
      "slots"_a = Slots{}, nb::kw_only(), "stream"_a = nb::none());
}

} // namespace optiq
