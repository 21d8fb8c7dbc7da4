"""What a training step computes beside its products: natively on a CPU, with gradients.

MLX computes exponentials and reductions one value at a time on x86, in one thread; here they take
as long as the memory does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..formats import DENSE
from . import native
from .attention import quantized_attention

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu_approx}


def gated(gate: mx.array, up: mx.array, activation: str) -> mx.array:
    """`activation(gate) * up`; activation is "silu" or "gelu_tanh"."""
    y: mx.array
    if (ext := native.active()) and gate.dtype == up.dtype == mx.float32:
        y = ext.gated(gate, up, activation)
        return y
    y = ACTIVATIONS[activation](gate) * up
    return y


def cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    """-log softmax(logits)[label] in nats, of each row.

    Args:
        logits: `[..., vocab]` in float32, float16 or bfloat16.
        labels: Integers `[...]`.

    Returns:
        `[...]` in float32; not finite where a logit is not finite.
    """
    if ext := native.active():
        losses: mx.array = ext.cross_entropy(logits, labels)
        return losses
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def softmax(logits: mx.array) -> mx.array:
    """Probabilities over the last axis of `[..., vocab]`, in float32.

    NaN natively where a logit of the row is not finite.
    """
    logits = logits.astype(mx.float32)
    if (ext := native.active()) and logits.ndim > 1:
        y: mx.array = ext.causal_softmax(logits, 1.0, 1, 0)
        return y
    return mx.softmax(logits, axis=-1)


def categorical(logits: mx.array, key: mx.array) -> mx.array:
    """A label drawn from softmax(logits) for each row `[..., vocab]`: uint32 `[...]`.

    One random number a row and a running sum. `mx.random.categorical` draws one for each logit and
    takes two logarithms of it.
    """
    sums = mx.cumsum(softmax(logits), axis=-1)
    drawn = 1 - mx.random.uniform(shape=(*sums.shape[:-1], 1), key=key)  # never 0
    return mx.argmax(sums >= drawn * sums[..., -1:], axis=-1)


def add_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """`y + scale * x @ a @ b`.

    Args:
        y: `[..., out]`; the sum has its dtype.
        x: `[..., in]`.
        a: `[in, rank]`; the term is computed in its dtype.
        b: `[rank, out]`.
        scale: Of the term.
    """
    x = x.astype(a.dtype)
    if (ext := native.active()) and y.dtype == x.dtype == a.dtype == b.dtype == mx.float32:
        sums: mx.array = ext.add_low_rank(y, x, a, b, scale)
        return sums
    return y + (scale * ((x @ a) @ b)).astype(y.dtype)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; weight is `[dims]`."""
    y: mx.array
    if (ext := native.active()) and x.dtype == mx.float32 and x.size:
        y = ext.rms_norm(x, weight, eps)
        return y
    y = mx.fast.rms_norm(x, weight, eps)
    return y


def rotary(
    x: mx.array,
    frequencies: Sequence[float],
    *,
    traditional: bool = False,
    magnitude: float = 1.0,
    offset: int = 0,
) -> mx.array:
    """The first values of each head, turned by the position of its row.

    Args:
        x: `[batch, heads, rows, dim]`; row r is at position `offset + r`.
        frequencies: Of each pair of values that turns, at most dim / 2, in radians per position.
        traditional: Pairs are neighbours; else they are as far apart as there are pairs.
        magnitude: Of what turns.
    """
    y: mx.array
    dims = 2 * len(frequencies)
    if (ext := native.active()) and x.dtype == mx.float32:
        y = ext.rotary(x, dims, traditional, frequencies, magnitude, offset)
        return y
    if magnitude != 1:
        x = x.at[..., :dims].multiply(magnitude)
    wavelengths = mx.array([1 / f if f else mx.inf for f in frequencies])
    y = mx.fast.rope(
        x, dims, traditional=traditional, base=None, scale=1.0, offset=offset, freqs=wavelengths
    )
    return y


@dataclass(frozen=True)
class AdamW:
    """What stays the same over the steps of AdamW."""

    decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def step(
        self,
        parameter: mx.array,
        gradient: mx.array,
        means: tuple[mx.array, mx.array],
        *,
        step: int,
        rate: float,
        by: float = 1.0,
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """The parameter and the means after step `step`, counted from 1, with the gradient times
        `by` (Loshchilov and Hutter 2019; both means are corrected for their start).

        All arrays are float32 vectors of one length.
        """
        m, v = means
        if ext := native.active():
            moved, m, v = ext.adamw(
                parameter, gradient, m, v, step, by, rate, self.decay, self.b1, self.b2, self.eps
            )
            return moved, (m, v)
        gradient = by * gradient
        m = self.b1 * m + (1 - self.b1) * gradient
        v = self.b2 * v + (1 - self.b2) * mx.square(gradient)
        root = mx.sqrt(v / (1 - self.b2**step)) + self.eps
        kept = parameter * (1 - rate * self.decay)
        return kept - rate / (1 - self.b1**step) * m / root, (m, v)


def causal_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of one sequence over itself, with gradients.

    Args:
        q: `[B, heads, L, dim]`.
        k, v: `[B, kv_heads, L, dim]`, heads a multiple of kv_heads.
        scale: Of the scores.
        window: How many tokens a query sees at most, itself included.
        sinks: `[heads]`, one more score per head whose value is nothing; with them stock MLX runs.

    Returns:
        `[B, heads, L, dim]`.
    """
    ext = native.active()
    floats = q.dtype == k.dtype == v.dtype == mx.float32
    alike = v.shape[-1] == q.shape[-1] and q.shape[-1] % 8 == 0
    if ext is None or not (floats and alike) or sinks is not None:
        mask: mx.array | str = "causal"
        if window is not None and window < q.shape[2]:
            at = mx.arange(q.shape[2])
            mask = (at <= at[:, None]) & (at > at[:, None] - window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """With all weights at once: of this the gradient is made."""
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # heads of one key head
        scores = grouped @ k.swapaxes(-1, -2)
        weights: mx.array = ext.causal_softmax(scores, scale, q.shape[2], window or 0)
        out: mx.array = (weights @ v).reshape(q.shape)
        return out

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return quantized_attention(
            q, k, v, k_format=DENSE, v_format=DENSE, scale=scale, mask="causal", window=window
        )

    @attend.vjp
    def gradients(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(whole, list(primals), [cotangent])[1])

    y: Any = attend(q, k, v)
    return y  # type: ignore[no-any-return]
