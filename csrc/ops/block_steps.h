// A decoder block, or its attention or MLP alone, as one primitive on the CPU. There are no
// gradients: who may be traced asks before, and then runs the block layer by layer.
#pragma once

#include "ops/decoder_block.h"
#include "ops/key_values.h"

#include <mlx/utils.h>

namespace optiq {

using BlockPtr = std::shared_ptr<DecoderBlock>;

/** Queries [B, heads, L, D], keys and values [B, kv_heads, L, D] of h [B, L, width] at positions
 * offset + 0 ... L-1, or offsets[b] + 0 ... L-1 (int32 [B]). */
std::vector<array> block_project(const BlockPtr& block, const array& h, int offset,
    const std::optional<array>& offsets, mx::StreamOrDevice s = {});

/** h + attention over keys and values, then the MLP if `mlp`. They are of the whole batch, or of
 * batch 1 for each row. */
array block_attend(const BlockPtr& block, const array& h, const array& q,
    const std::vector<array>& keys, const std::vector<array>& values, const KeyValues& kv, bool mlp,
    mx::StreamOrDevice s = {});

// Where new rows go in a cache: from `start` on, so that it then has `length` rows. The first of
// them is at position `offset` of its sequence.
struct CachePlace {
  int start, length, offset;
};

/** Attention and, if `mlp`, the MLP over caches [B, kv_heads, S, D] in float32, or of records,
 * after the L new rows of h [B, L, width] were put in their place. There is one cache for the
 * batch, or one of batch 1 for each row, as if it were alone. Returns h and the caches (keys and
 * values in turn): those given, if nobody else holds them, else copies. Without caches, attention
 * within h. */
std::vector<array> block_step(const BlockPtr& block, const array& h, const std::vector<array>& keys,
    const std::vector<array>& values, const std::vector<CachePlace>& places, const KeyValues& kv,
    bool mlp, mx::StreamOrDevice s = {});

} // namespace optiq
