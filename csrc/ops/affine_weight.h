// An affine-quantized weight as the ops take it.
#pragma once

#include <mlx/array.h>

#include "cpu/types.h"

namespace optiq {

/** A weight of scale * code + bias per group, as mx.quantize packs it. */
struct AffineWeight {
  mlx::core::array codes, scales, biases; // uint32 [..., out, in * bits / 32]; [..., out, groups]
  AffineFormat format;

  /** [..., out, in]; throws where the arrays do not belong together, naming them `name`.w etc. */
  mlx::core::Shape shape(const char* op, const char* name = "") const;

  /** For the kernels; the arrays must be row-contiguous and outlive it. */
  cpu::Weight view() const;
};

} // namespace optiq
