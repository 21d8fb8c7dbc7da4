#include "ops/decoder_block_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "ops/block_steps.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq {

void bind_decoder_block(nb::module_& m) {
  nb::class_<DecoderBlock>(m, "DecoderBlock")
      // Made by make_shared: a pointer that Python made would take the GIL where it is released,
      // on MLX's thread, while the interpreter waits for that thread.
      .def(nb::new_([] { return std::make_shared<DecoderBlock>(); }))
      .def("set_attention", &DecoderBlock::set_attention, nb::kw_only(), "qkv"_a, "out"_a,
          "heads"_a, "kv_heads"_a, "scale"_a, "norm"_a = nb::none(), "q_norm"_a = nb::none(),
          "k_norm"_a = nb::none(), "v_norm"_a = nb::none(), "post_norm"_a = nb::none(),
          "whole_norm"_a = false, "rope"_a = nb::none(), "sinks"_a = nb::none(), "softcap"_a = 0.0f,
          "gain"_a = 1.0f)
      .def("set_mlp", &DecoderBlock::set_mlp, nb::kw_only(), "gate_up"_a, "down"_a, "activation"_a,
          "norm"_a = nb::none(), "post_norm"_a = nb::none(), "gain"_a = 1.0f);
  m.def("traced", [](const array& a) { return a.is_tracer(); }, "a"_a);
  m.def("block_project", &block_project, "block"_a, "h"_a, "offset"_a = 0, "offsets"_a = nb::none(),
      nb::kw_only(), "stream"_a = nb::none());
  m.def("block_attend", &block_attend, "block"_a, "h"_a, "q"_a, "k"_a, "v"_a, "masking"_a,
      "mask"_a = nb::none(), "mlp"_a = false, nb::kw_only(), "stream"_a = nb::none());
  m.def("block_step", &block_step, "block"_a, "h"_a, "keys"_a, "values"_a, "start"_a, "length"_a,
      "offset"_a, "masking"_a, "mask"_a = nb::none(), "mlp"_a = false, nb::kw_only(),
      "stream"_a = nb::none());
  m.def("block_mlp", &block_mlp, "block"_a, "h"_a, nb::kw_only(), "stream"_a = nb::none());
}

} // namespace optiq
