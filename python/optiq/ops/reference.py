"""The operations in float64 NumPy: slow and obvious, what all others are tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def unpack(codes: NDArray[np.uint32], bits: int) -> NDArray[np.int64]:
    """Integers of `bits` bits from rows of uint32 words, read as one little-endian bit stream.

    `codes [..., words]` -> `[..., words * 32 / bits]`.
    """
    stream = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*codes.shape[:-1], -1, bits).astype(np.int64)
    return np.asarray(fields @ (1 << np.arange(bits)))


def dequantize(codes: Any, scales: Any, biases: Any, group_size: int, bits: int) -> Float64:
    """`scale * code + bias` per group: `[..., out, in]`."""
    q = unpack(np.ascontiguousarray(codes, dtype=np.uint32), bits)
    s = np.repeat(np.asarray(scales, dtype=np.float64), group_size, axis=-1)
    b = np.repeat(np.asarray(biases, dtype=np.float64), group_size, axis=-1)
    return np.asarray(q * s + b)


def kl_from_logits(p: Any, q: Any) -> Float64:
    """KL(softmax(p) || softmax(q)) over the last axis, in nats."""
    log_p, log_q = (_log_softmax(np.asarray(a, dtype=np.float64)) for a in (p, q))
    return np.asarray(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))


def kl_divergence(
    h_p: Any, w_p: Any, h_q: Any, w_q: Any, soft_cap: float | None = None
) -> tuple[Float64, NDArray[np.bool_], Float64, Float64]:
    """KL, same first maximum, and both log-sum-exps, of `h @ w.T` with dense heads."""
    p, q = _logits(h_p, w_p, soft_cap), _logits(h_q, w_q, soft_cap)
    agree = np.asarray(p.argmax(-1) == q.argmax(-1))
    lse = [np.asarray((a - _log_softmax(a))[..., 0]) for a in (p, q)]
    return kl_from_logits(p, q), agree, lse[0], lse[1]


def kl_gradient(
    h_p: Any, w_p: Any, h_q: Any, w_q: Any, d_kl: Any, soft_cap: float | None = None
) -> Float64:
    """Gradient of `sum(d_kl * kl)` at `h_q`."""
    p, q = _logits(h_p, w_p, soft_cap), _logits(h_q, w_q, soft_cap)
    slope = np.exp(_log_softmax(q)) - np.exp(_log_softmax(p))
    if soft_cap:
        slope *= 1 - (q / soft_cap) ** 2
    scaled = np.asarray(d_kl, dtype=np.float64)[..., None] * slope
    return np.asarray(scaled @ np.asarray(w_q, dtype=np.float64))


def _logits(h: Any, w: Any, soft_cap: float | None) -> Float64:
    z = np.asarray(h, dtype=np.float64) @ np.asarray(w, dtype=np.float64).T
    return np.asarray(soft_cap * np.tanh(z / soft_cap) if soft_cap else z)


def search_weights(w: Any, importance: Any, group_size: int) -> Float64:
    """c = importance * sqrt(2 mean(w^2) + w^2), the mean over each group: the shape of `w`."""
    w = np.asarray(w, dtype=np.float64)
    groups = w.reshape(*w.shape[:-1], -1, group_size)
    mean = np.mean(groups**2, axis=-1, keepdims=True)
    magnitude = np.sqrt(2 * mean + groups**2).reshape(w.shape)
    return np.asarray(magnitude * np.asarray(importance, dtype=np.float64)[..., None, :])


def _log_softmax(x: Float64) -> Float64:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))
