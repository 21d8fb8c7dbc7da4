"""KL divergence between the next-token distributions of two models."""

from __future__ import annotations

import mlx.core as mx

from . import native


def kl_from_logits(p: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
    """KL(softmax(p) || softmax(q)) and top-1 agreement, per row.

    Args:
        p: Reference logits `[..., vocab]`.
        q: Candidate logits of the same shape.

    Returns:
        The divergence in nats, float32 `[...]`, and whether both rows have the same (first)
        largest logit, bool `[...]`.
    """
    if ext := native.active():
        kl, agree = ext.kl_from_logits(p, q)
        return kl, agree
    p, q = p.astype(mx.float32), q.astype(mx.float32)
    log_p = p - mx.logsumexp(p, axis=-1, keepdims=True)
    log_q = q - mx.logsumexp(q, axis=-1, keepdims=True)
    kl = mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
