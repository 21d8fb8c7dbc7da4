#pragma once

#include <mlx/utils.h>

#include "ops/affine_weight.h"

namespace optiq {

/** The rows `ids` [...] of dequantize(w) as float32 [..., in], on the CPU. Negative ids count from
 * the end; those outside give not-a-number. */
mlx::core::array embedding(
    const mlx::core::array& ids, const AffineWeight& w, mlx::core::StreamOrDevice s = {});

} // namespace optiq
