#pragma once

#include <mlx/utils.h>

#include "ops/affine_weight.h"

namespace optiq {

/** The rows `ids` [...] of dequantize(w) as float32 [..., in], on the CPU. Negative ids count from
 * the end; those outside give not-a-number. */
mlx::core::array embedding(
    const mlx::core::array& ids, const AffineWeight& w, mlx::core::StreamOrDevice s = {});

/** The same on the stream's CPU thread, for arrays that are evaluated: y [n, in]. */
void embed_rows(const cpu::Weight& w, const int32_t* ids, size_t n, float* y);

} // namespace optiq
