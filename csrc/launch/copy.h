// Launch of a row-major copy of an array with strides (metal/copy.metal).
#pragma once

#include <cstdint>
#include <vector>

#include "launch/plan.h"

namespace optiq::launch {

// Input and output 0; items of 1, 2, 4 or 8 bytes; strides in items. Throws
// std::invalid_argument for more than eight axes.
Plan plan_row_contiguous(
    const std::vector<int>& shape, const std::vector<int64_t>& strides, size_t itemsize);

} // namespace optiq::launch
