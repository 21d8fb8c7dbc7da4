// The parts of a decoder block around its cache, as primitives on the CPU. There are no gradients:
// who may be traced asks before, and then runs the block layer by layer. `slots` are those of the
// batch entries, for the low-rank terms beside the block's projections; empty: none.
#pragma once

#include "ops/decoder_block.h"
#include "ops/key_values.h"

#include <mlx/utils.h>

namespace optiq {

/** Queries [B, heads, L, D], keys and values [B, kv_heads, L, D] of h [B, L, width] at positions
 * offset + 0 ... L-1, or offsets[b] + 0 ... L-1 (int32 [B]). */
std::vector<array> block_project(const BlockPtr& block, const array& h, int offset,
    const std::optional<array>& offsets, const std::vector<int>& slots, mx::StreamOrDevice s = {});

/** h + attention over keys and values, then the MLP if `mlp`. They are of the whole batch, or of
 * batch 1 for each row. */
array block_attend(const BlockPtr& block, const array& h, const array& q,
    const std::vector<array>& keys, const std::vector<array>& values, const KeyValues& kv, bool mlp,
    const std::vector<int>& slots, mx::StreamOrDevice s = {});

} // namespace optiq
