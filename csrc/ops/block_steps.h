// Decoder blocks with their caches, each as one primitive on the CPU, or several as one. There are
// no gradients: who may be traced asks before, and then runs the blocks layer by layer.
#pragma once

#include "ops/decoder_block.h"
#include "ops/key_values.h"
#include "ops/model_ends.h"

#include <mlx/utils.h>

namespace optiq {

// Where `rows` new rows go in a cache: from `start` on, so that it then has `length` rows. The
// first of them is at position `offset` of its sequence.
struct CachePlace {
  int start, length, offset, rows;
};

/** A block and its caches [B, kv_heads, S, D] of floats, or of records: one for the batch, or
 * some of batch 1 with B rows in all. Then h is [B, 1, width], its entries are the new rows of the
 * first cache, of the second, ..., and each cache is as if it were alone; of several rows each sees
 * those before it. Without caches a block attends within h. `slots` are those of the batch entries,
 * for the low-rank terms beside its projections; empty: none. */
struct BlockStep {
  BlockPtr block;
  std::vector<array> keys, values;
  std::vector<CachePlace> places;
  KeyValues kv;
  std::vector<int> slots;
};

/** Puts L new rows of h [B, L, width] in their place, attends and, if `mlp`, runs the MLP. Returns
 * h and the caches (keys and values in turn): those given, if nobody else holds them, else copies.
 */
std::vector<array> block_step(
    const BlockStep& step, const array& h, bool mlp, mx::StreamOrDevice s = {});

/** Blocks with their MLPs, one after another, of h [B, L, width]; with `ends`, of tokens [B, L],
 * and then the norm. When it is evaluated it writes into the caches themselves, whoever holds them;
 * until then they must not be read. */
array block_stack(const std::vector<BlockStep>& steps, const array& h, const EndsPtr& ends,
    mx::StreamOrDevice s = {});

} // namespace optiq
