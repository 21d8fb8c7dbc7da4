#pragma once

#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace optiq {

namespace mx = mlx::core;

/**
 * x [batch, heads, rows, dim] in float32 with the first `dims` values of each head turned by the
 * position of its row, offset + row, times `frequencies` [dims / 2] in radians, and multiplied with
 * `magnitude`. Pairs are neighbours if `traditional`, else half of `dims` apart. On the CPU, with a
 * gradient. Throws std::invalid_argument.
 */
mx::array rotary(const mx::array& x, int dims, bool traditional,
    const std::vector<double>& frequencies, double magnitude, int offset,
    mx::StreamOrDevice s = {});

} // namespace optiq
