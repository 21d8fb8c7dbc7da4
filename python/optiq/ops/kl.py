"""KL divergence between the next-token distributions of two models."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from . import native


class Comparison(NamedTuple):
    """Per row of logits: `kl` in nats, `agree` whether the (first) largest logit is the same,
    and the log-sum-exps, with which `logits - lse` are log-probabilities."""

    kl: mx.array
    agree: mx.array
    lse_p: mx.array
    lse_q: mx.array


def compare_logits(p: mx.array, q: mx.array) -> Comparison:
    """KL(softmax(p) || softmax(q)) and what comes with it, for each row.

    Args:
        p: Reference logits `[..., vocab]`.
        q: Candidate logits of the same shape.

    Returns:
        Four arrays `[...]`; all float32 but `agree`, which is bool.
    """
    if ext := native.active():
        return Comparison(*ext.compare_logits(p, q))
    p, q = p.astype(mx.float32), q.astype(mx.float32)
    lse_p, lse_q = mx.logsumexp(p, axis=-1), mx.logsumexp(q, axis=-1)
    log_p, log_q = p - lse_p[..., None], q - lse_q[..., None]
    kl = mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)
    return Comparison(kl, mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1), lse_p, lse_q)


def kl_from_logits(p: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
    """KL in nats and top-1 agreement per row: the first two of `compare_logits`."""
    return compare_logits(p, q)[:2]
