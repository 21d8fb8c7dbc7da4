#pragma once

#include <mlx/utils.h>

#include "ops/affine_weight.h"

namespace optiq {

/** The weights [..., out, in] that `w` stands for, float32, on the CPU. */
mlx::core::array dequantize(const AffineWeight& w, mlx::core::StreamOrDevice s = {});

} // namespace optiq
