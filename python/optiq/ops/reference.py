"""The operations in float64 NumPy: slow and obvious, what all others are tested against."""

from __future__ import annotations

from collections.abc import Sequence
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


def gathered_low_rank(x: Any, terms: Sequence[tuple[Any, Any] | None], slots: Any) -> Float64:
    """`x[i] @ a @ b` with `(a, b) = terms[slots[i]]`, zeros for None: `[rows, out]`."""
    x = np.asarray(x, dtype=np.float64)
    out = next(np.shape(t[1])[1] for t in terms if t is not None)
    rows = []
    for row, slot in zip(x, slots, strict=True):
        term = terms[slot]
        rows.append(
            np.zeros(out) if term is None else row @ np.float64(term[0]) @ np.float64(term[1])
        )
    return np.stack(rows)


def dequantize_kv(records: Any, dim: int, group_size: int, bits: int) -> Float64:
    """Keys or values `[..., dim]` from their records `[..., words]`; see attention.py."""
    words = np.ascontiguousarray(records, dtype=np.uint32)
    groups = -(-dim // group_size)
    header = words[..., :groups].copy().view(np.float16).astype(np.float64)
    stream = np.unpackbits(words[..., groups:].copy().view(np.uint8), axis=-1, bitorder="little")
    fields = stream[..., : dim * bits].reshape(*words.shape[:-1], dim, bits).astype(np.int64)
    q = fields @ (1 << np.arange(bits))
    s, b = (np.repeat(header[..., i::2], group_size, axis=-1)[..., :dim] for i in (0, 1))
    return np.asarray(q * s + b)


def kl_from_logits(p: Any, q: Any) -> Float64:
    """KL(softmax(p) || softmax(q)) over the last axis, in nats."""
    log_p, log_q = (_log_softmax(np.asarray(a, dtype=np.float64)) for a in (p, q))
    return np.asarray(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))


def cross_entropy(logits: Any, labels: Any) -> Float64:
    """-log softmax(logits)[label] over the last axis."""
    log_p = _log_softmax(np.asarray(logits, dtype=np.float64))
    return -np.take_along_axis(log_p, np.asarray(labels)[..., None], axis=-1)[..., 0]


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


def rms_norm(x: Any, weight: Any, eps: float) -> Float64:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; no weight is ones."""
    x = np.asarray(x, dtype=np.float64)
    y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return np.asarray(y if weight is None else y * np.asarray(weight, dtype=np.float64))


def rotate(
    x: Any, positions: Any, frequencies: Any, traditional: bool = False, magnitude: float = 1.0
) -> Float64:
    """Turn pairs of the first 2 n values of `x [..., rows, dim]` by position times frequency [n].

    A pair is two neighbours (`traditional`), or two values n apart; `positions [..., rows]`.
    """
    x = np.asarray(x, dtype=np.float64)
    n = len(frequencies)
    angle = np.asarray(positions)[..., None] * np.asarray(frequencies, dtype=np.float64)
    cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
    first = slice(0, 2 * n, 2) if traditional else slice(0, n)
    second = slice(1, 2 * n, 2) if traditional else slice(n, 2 * n)
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., first] * sin + x[..., second] * cos
    return np.asarray(y)


def attention(
    q: Any, k: Any, v: Any, scale: float, mask: Any = None, sinks: Any = None, softcap: float = 0
) -> Float64:
    """Softmax attention: q `[B, heads, rows, dim]`; k, v `[B, kv_heads, keys, dim]`.

    `mask` is bool, or is added to the scores; "causal" lets the last row see all keys. `sinks
    [heads]` are logits that take part in the softmax and have no value.
    """
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = scale * q @ k.swapaxes(-1, -2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if isinstance(mask, str):
        rows, keys = scores.shape[-2:]
        mask = np.arange(keys - rows, keys)[:, None] >= np.arange(keys)
    if mask is not None:
        mask = np.asarray(mask)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if sinks is not None:
        extra = np.broadcast_to(np.asarray(sinks)[:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, extra], axis=-1)
    p = np.exp(_log_softmax(scores))
    return np.asarray(p[..., : k.shape[-2]] @ v)


def gated(gate: Any, up: Any, activation: str) -> Float64:
    """activation(gate) * up for "silu", or "gelu_tanh" (GELU by its tanh approximation)."""
    gate, up = np.asarray(gate, dtype=np.float64), np.asarray(up, dtype=np.float64)
    if activation == "silu":
        return np.asarray(gate / (1 + np.exp(-gate)) * up)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return np.asarray(0.5 * gate * (1 + np.tanh(inner)) * up)


def _log_softmax(x: Float64) -> Float64:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))
