"""KL divergence between the next-token distributions of two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple, cast

import mlx.core as mx

from . import metal, native
from .affine import AffineWeight

# The fallback's tile: float32 logits of so many tokens and words at a time.
TOKENS = 512
WORDS = 2048

Head = mx.array | AffineWeight


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


def kl_divergence(
    h_p: mx.array, w_p: Head, h_q: mx.array, w_q: Head, *, soft_cap: float | None = None
) -> Comparison:
    """`compare_logits(h_p @ w_p.T, h_q @ w_q.T)` without ever storing the logits.

    The heads are read once per 512 tokens, a strip of the vocabulary at a time, with online
    log-sum-exps (Milakov and Gimelshein 2018). Natively on a CPU, sums are kept in double
    precision and the logits that hold the probability are computed in it, so the KL is that of
    float64 to 1e-6; on a GPU and in the fallback it has the error of float32 logits. The gradient
    at `h_q`, `(softmax(q) - softmax(p)) @ w_q`, is streamed too, on a GPU in `mx.*`.

    Args:
        h_p: Final hidden states of the reference `[..., d]` in float32, float16 or bfloat16.
        w_p: Its output head `[vocab, d]` in one of these dtypes, or quantized.
        h_q: Final hidden states of the candidate; same shape as `h_p` but for `d`.
        w_q: Its output head, for the same vocabulary.
        soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)` on both sides, as in Gemma 2.

    Returns:
        Four arrays `[...]`; all float32 but `agree`, which is bool. Where a logit is not finite,
        the three are NaN and `agree` is False.

    Raises:
        ValueError: Dtypes, shapes or widths that do not fit. Gradients at other arguments than
            `h_q` do not exist: natively they raise, in the fallback they are NaN.
    """
    cap = 0.0 if soft_cap is None else soft_cap
    if soft_cap is not None and not 0 < cap < float("inf"):
        raise ValueError(f"[kl_divergence] soft_cap is {cap}; it must be positive and finite")
    sides = [_arrays(w) for w in (w_p, w_q)]
    formats = [
        (w.group_size, w.bits) if isinstance(w, AffineWeight) else (0, 0) for w in (w_p, w_q)
    ]
    if ext := native.active():
        return Comparison(*ext.kl_divergence(h_p, sides[0], h_q, sides[1], *formats, cap))

    def on_metal(ext: ModuleType) -> Comparison:
        def streamed(h_p: mx.array, h_q: mx.array) -> Comparison:
            return Comparison(*ext.kl_divergence(h_p, sides[0], h_q, sides[1], *formats, cap))

        return _tiled(h_p, w_p, h_q, w_q, cap, streamed)

    # scales of a quantized head, or the head
    dtypes = [side[min(1, len(side) - 1)].dtype for side in sides]
    launch = [(dtype, *fmt) for dtype, fmt in zip(dtypes, formats, strict=True)]
    return metal.run(
        "kl_divergence", tuple(launch), on_metal, lambda: _tiled(h_p, w_p, h_q, w_q, cap)
    )


def _arrays(w: Head) -> list[mx.array]:
    return [w.codes, w.scales, w.biases] if isinstance(w, AffineWeight) else [w]


Forward = Callable[[mx.array, mx.array], Comparison]


def _tiled(
    h_p: mx.array,
    w_p: Head,
    h_q: mx.array,
    w_q: Head,
    cap: float,
    streamed: Forward | None = None,
) -> Comparison:
    """The streamed KL in `mx.*`, or with `streamed` its gradient only."""
    vocabulary = _check("p", h_p, w_p)
    if _check("q", h_q, w_q) != vocabulary or vocabulary == 0:
        raise ValueError(
            f"[kl_divergence] w_p has {vocabulary} rows and w_q {_arrays(w_q)[0].shape[0]}; "
            "both must cover the same vocabulary of at least one token"
        )
    if h_p.shape[:-1] != h_q.shape[:-1]:
        raise ValueError(
            f"[kl_divergence] h_p is {h_p.shape} and h_q {h_q.shape}; all axes but the last "
            "must agree"
        )
    shape = h_p.shape[:-1]

    @mx.custom_function
    def forward(h_p: mx.array, h_q: mx.array, *_: mx.array) -> tuple[mx.array, ...]:
        if streamed is not None:
            return streamed(h_p, h_q)
        blocks = [
            _compare(h_p[i : i + TOKENS], w_p, h_q[i : i + TOKENS], w_q, cap)
            for i in range(0, h_p.shape[0], TOKENS)
        ]
        return tuple(mx.concatenate(list(parts)) for parts in zip(*blocks, strict=True))

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        h_p, h_q = primals[:2]
        d_kl, _, _, d_lse = cotangents
        blocks = []
        for i in range(0, h_p.shape[0], TOKENS):
            at = slice(i, i + TOKENS)
            _, _, lse_p, lse_q = (a[at] for a in outputs)
            blocks.append(
                _slope(h_p[at], w_p, h_q[at], w_q, cap, (lse_p, lse_q), (d_kl[at], d_lse[at]))
            )
        refused = [mx.full(a.shape, mx.nan) for a in primals]
        return refused[0], mx.concatenate(blocks), *refused[2:]

    if 0 in shape:
        empty = mx.zeros(shape)
        return Comparison(empty, empty.astype(mx.bool_), empty, empty)
    flat = (h.astype(mx.float32).reshape(-1, h.shape[-1]) for h in (h_p, h_q))
    out = cast(Comparison, forward(*flat, *_arrays(w_p), *_arrays(w_q)))
    return Comparison(*(a.reshape(shape) for a in out))


def _strips(
    h_p: mx.array, w_p: Head, h_q: mx.array, w_q: Head, cap: float, state: list[mx.array]
) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """Float32 logits of both sides `[tokens, words]`, a slice of the vocabulary at a time.

    Each slice waits for `state`, which the caller makes from the one before: or the logits of
    many slices would exist at once.
    """
    vocabulary = _arrays(w_p)[0].shape[0]
    for start in range(0, vocabulary, WORDS):
        at = slice(start, min(start + WORDS, vocabulary))
        if state:
            h_p, h_q = mx.depends([h_p, h_q], state)
        x, y = (_product(h, w, at) for h, w in ((h_p, w_p), (h_q, w_q)))
        if cap:
            x, y = (cap * mx.tanh(z / cap) for z in (x, y))
        yield at, x, y


def _product(x: mx.array, w: Head, at: slice, transpose: bool = True) -> mx.array:
    """`x @ w[at].T`, or `x @ w[at]`."""
    if isinstance(w, AffineWeight):
        codes, scales, biases = w.codes[at], w.scales[at], w.biases[at]
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.quantized_matmul(x, codes, scales, biases, transpose, w.group_size, w.bits)
    tile = w[at].astype(mx.float32)
    return x @ (tile.T if transpose else tile)


def _compare(h_p: mx.array, w_p: Head, h_q: mx.array, w_q: Head, cap: float) -> Comparison:
    """One block of tokens: the sums of e^p, e^q and e^p (p - q), maxima removed."""
    state: list[mx.array] = []
    for at, x, y in _strips(h_p, w_p, h_q, w_q, cap, state):
        p_top, q_top = mx.max(x, axis=-1), mx.max(y, axis=-1)
        firsts = [(mx.argmax(z, axis=-1) + at.start) for z in (x, y)]
        if state:
            p_max, q_max, p_sum, q_sum, dot, p_first, q_first = state
            p_first = mx.where(p_top > p_max, firsts[0], p_first)
            q_first = mx.where(q_top > q_max, firsts[1], q_first)
            p_top, q_top = mx.maximum(p_max, p_top), mx.maximum(q_max, q_top)
            p_by, q_by = p_top - p_max, q_top - q_max
            dot = mx.exp(-p_by) * (dot + p_sum * (q_by - p_by))
            p_sum, q_sum = p_sum * mx.exp(-p_by), q_sum * mx.exp(-q_by)
        else:
            (p_first, q_first), p_sum, q_sum, dot = firsts, mx.array(0), mx.array(0), mx.array(0)
        x, y = x - p_top[:, None], y - q_top[:, None]
        e = mx.exp(x)
        p_sum, q_sum = p_sum + mx.sum(e, axis=-1), q_sum + mx.sum(mx.exp(y), axis=-1)
        dot = dot + mx.sum(e * (x - y), axis=-1)
        state[:] = [p_top, q_top, p_sum, q_sum, dot, p_first, q_first]
    p_max, q_max, p_sum, q_sum, dot, p_first, q_first = state
    kl = dot / p_sum + mx.log(q_sum / p_sum)
    unknown = 0 * kl  # NaN where a logit is not finite
    agree = (p_first == q_first) & (unknown == 0)
    return Comparison(kl, agree, p_max + mx.log(p_sum) + unknown, q_max + mx.log(q_sum) + unknown)


def _slope(
    h_p: mx.array,
    w_p: Head,
    h_q: mx.array,
    w_q: Head,
    cap: float,
    lse: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
) -> mx.array:
    """One block of tokens: the gradient at `h_q` `[tokens, d]`, given those at KL and lse_q."""
    d_kl, d_lse = (a[:, None] for a in cotangents)
    lse_p, lse_q = (a[:, None] for a in lse)
    state = [mx.zeros_like(h_q)]
    for at, x, y in _strips(h_p, w_p, h_q, w_q, cap, state):
        slope = (d_kl + d_lse) * mx.exp(y - lse_q) - d_kl * mx.exp(x - lse_p)
        if cap:
            slope = slope * (1 - mx.square(y / cap))
        state[0] = state[0] + _product(slope, w_q, at, transpose=False)
    return state[0]


def _check(side: str, h: mx.array, w: Head) -> int:
    """The size of one side's vocabulary; ValueError where hidden states and head do not fit."""

    def fail(message: str) -> None:
        raise ValueError(f"[kl_divergence] {message}")

    values = [("h_" + side, h)]
    if isinstance(w, AffineWeight):
        w.check(f"[kl_divergence] w_{side}")
        shape = w.shape
    else:
        values += [("w_" + side, w)]
        shape = tuple(w.shape)
    for name, a in values:
        if a.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            fail(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16")
    if len(shape) != 2:
        fail(f"w_{side} is {shape}; a head is [vocab, d]")
    if h.ndim == 0 or h.shape[-1] != shape[1] or shape[1] == 0:
        fail(f"the last axis of h_{side} {h.shape} must be the {shape[1]} that w_{side} takes")
    return shape[0]
