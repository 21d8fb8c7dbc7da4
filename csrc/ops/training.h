// Ops with gradients, for training: what a model computes beside its products.
#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

/** Throws std::invalid_argument unless it is "silu" or "gelu_tanh". */
cpu::Activation activation_of(const char* op, const std::string& name);

/** activation(gate) * up, in float32; activation is silu or gelu_tanh. */
mx::array gated(const mx::array& gate, const mx::array& up, const std::string& activation,
    mx::StreamOrDevice s = {});

/** -log softmax(logits)[label] of each row of logits [..., vocab]; labels [...] are integers. */
mx::array cross_entropy(
    const mx::array& logits, const mx::array& labels, mx::StreamOrDevice s = {});

/**
 * softmax(scale * scores) over what a query sees, zeros elsewhere. Row r of scores [..., rows,
 * keys] is query r % queries; the queries belong to the last keys, and see those up to their own,
 * of them the last `window` unless that is 0.
 */
mx::array causal_softmax(
    const mx::array& scores, float scale, int queries, int window, mx::StreamOrDevice s = {});

/** scale * x @ a @ b of x [..., in], a [in, rank] and b [rank, out], in float32. */
mx::array low_rank_term(const mx::array& x, const mx::array& a, const mx::array& b, float scale,
    mx::StreamOrDevice s = {});

} // namespace optiq
