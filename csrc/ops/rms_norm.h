#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace optiq {

namespace mx = mlx::core;

/** x / sqrt(mean(x^2) + eps) * weight over the last axis of a float32 x, on the CPU; weight is
 * [dims]. Throws std::invalid_argument. */
mx::array rms_norm(
    const mx::array& x, const mx::array& weight, float eps, mx::StreamOrDevice s = {});

} // namespace optiq
