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

/**
 * x / sqrt(mean(x^2) + eps) * weight over the last axis of a float32 x that is not empty; weight is
 * [dims].
 */
mx::array rms_norm(
    const mx::array& x, const mx::array& weight, float eps, mx::StreamOrDevice s = {});

/**
 * y + scale * x @ a @ b of y [..., out], x [..., in], a [in, rank] and b [rank, out], in float32.
 */
mx::array add_low_rank(const mx::array& y, const mx::array& x, const mx::array& a,
    const mx::array& b, float scale, mx::StreamOrDevice s = {});

/**
 * A step of AdamW (Loshchilov and Hutter 2019) with the gradient times `by`, and with both means
 * corrected for their start, `step` counted from 1: the parameter and the means m and v after it.
 * All are vectors in float32 of one length. It has no gradient.
 */
std::vector<mx::array> adamw(const mx::array& parameter, const mx::array& gradient,
    const mx::array& m, const mx::array& v, int step, double by, double rate, double decay,
    double b1, double b2, double eps, mx::StreamOrDevice s = {});

} // namespace optiq
