"""A rounding improved by coordinate descent on the layer's output error."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from . import native
from .affine import AffineWeight, pack

Floats = NDArray[np.float32]
Group = tuple[Floats, Floats, Floats]  # codes, change of the weight, by how much the error falls


# Rows that move at a time where errors add up, each as if the others stayed; far apart, since
# neighbours share most.
TOGETHER = 16


class Sampled(NamedTuple):
    """The hessian `samples' samples + diag(diagonal)`; of few samples it is less to multiply."""

    samples: mx.array  # [n, in]
    diagonal: mx.array  # [in]

    @property
    def whole(self) -> mx.array:
        return self.samples.T @ self.samples + mx.diag(self.diagonal)


def descend(
    w: mx.array,
    rounded: AffineWeight,
    hessian: mx.array | Sampled,
    *,
    outputs: mx.array | None = None,
    sweeps: int = 4,
) -> AffineWeight:
    """Codes, scales and biases with a smaller output error than those of `rounded`.

    With `v` a row as stored, the error is `(v - w) hessian (v - w)'`, where `hessian` is the mean
    of `x x'` over the layer's inputs, each weighted as one likes. Groups are taken in turn: scale
    and bias are fitted to the group's codes and stored, each code in turn moves to its best grid
    point, and the group is changed only where the error falls (QuantEase, Behdin et al. 2023).

    With `outputs`, the errors of different rows add up: with g the gradient at the layer's outputs,
    a change D of the weight moves the model by the mean of (g'Dx)^2, which is about
    `tr(outputs D hessian D')` (YAQA, Tseng et al. 2025, arXiv:2505.22988). The diagonal of
    `outputs` alone takes each row by itself. With all of it, and the others as they are, the error
    of a row should undo what the others' do.

    Args:
        w: `[..., out, in]` in float32, float16 or bfloat16.
        rounded: Where to start; scales and biases in the dtype of `w`.
        hessian: Symmetric `[in, in]`, or what makes it. Some per cent of its mean diagonal added to
            the diagonal keep what few tokens say from being trusted too much.
        outputs: Symmetric `[out, out]` with a positive diagonal, the mean of `g g'`; `w` then has
            two axes, and the hessian is an array.
        sweeps: How often each group is taken.

    Returns:
        The same as `rounded`, in the same format. No row, with `outputs` not their sum, has a
        larger error than before, but for float32 sums. The work is done on the CPU.

    Raises:
        ValueError: Dtypes or shapes that do not fit.
    """
    samples, given = hessian if isinstance(hessian, Sampled) else (None, hessian)
    if ext := native.extension:
        found = ext.descend(
            w, rounded.codes, rounded.scales, rounded.biases, given, samples, outputs,
            rounded.group_size, rounded.bits, sweeps,
        )  # fmt: skip
        return rounded._replace(codes=found[0], scales=found[1], biases=found[2])
    if isinstance(hessian, Sampled):
        hessian = hessian.whole
    if outputs is not None:
        return _descend_together(w, rounded, hessian, outputs, sweeps)
    return _descend(w, rounded, hessian, sweeps)


def _descend(w: mx.array, rounded: AffineWeight, hessian: mx.array, sweeps: int) -> AffineWeight:
    """The same in NumPy, all rows at once."""
    rounded.check("rounded")
    if w.shape != rounded.shape or hessian.shape != (w.shape[-1], w.shape[-1]):
        raise ValueError(
            f"[descend] w is {w.shape}, rounded {rounded.shape} and hessian {hessian.shape}; the "
            "first two must be the same, and the hessian square with the last axis of w"
        )
    size, top, dtype = rounded.group_size, 2**rounded.bits - 1, rounded.scales.dtype
    h = np.array(hessian.astype(mx.float32))
    ones, zeros = mx.ones_like(rounded.scales), mx.zeros_like(rounded.scales)
    q = np.array(rounded._replace(scales=ones, biases=zeros).dequantized().reshape(-1, w.shape[-1]))
    scales, biases = (
        np.array(a.astype(mx.float32).reshape(len(q), -1)) for a in (rounded.scales, rounded.biases)
    )
    error = np.array((rounded.dequantized() - w.astype(mx.float32)).reshape(q.shape))
    slope = error @ h

    def stored(a: Floats) -> Floats:
        return np.array(mx.array(a).astype(dtype).astype(mx.float32))

    def moved(at: slice, scale: Floats, by_scale: Floats, by_bias: Floats) -> Group:
        """A group after scale and bias change by so much and each code moves in turn."""
        block, codes = h[at, at], q[:, at].copy()
        change = codes * by_scale[:, None] + by_bias[:, None]
        after = slope[:, at] + change @ block
        for j in range(size):
            curve = block[j, j] * scale
            step = np.divide(-after[:, j], curve, out=np.zeros_like(curve), where=curve != 0)
            code = np.clip(codes[:, j] + np.rint(step), 0, top)
            step = (code - codes[:, j]) * scale
            codes[:, j] = code
            change[:, j] += step
            after += step[:, None] * block[j]
        return codes, change, -np.sum(change * (slope[:, at] + after), axis=-1)

    for _ in range(sweeps):
        for k in range(w.shape[-1] // size):
            at = slice(k * size, (k + 1) * size)
            block, codes = h[at, at], q[:, at]
            scale, bias = scales[:, k], biases[:, k]
            qh = codes @ block
            a, b, c = np.sum(qh * codes, axis=-1), np.sum(qh, axis=-1), block.sum()
            to_scale = np.sum(codes * slope[:, at], axis=-1)
            to_bias = np.sum(slope[:, at], axis=-1)
            fits = (determinant := a * c - b * b) > 1e-9 * a * c
            step = (to_bias * b - to_scale * c) / np.where(fits, determinant, 1)
            new_scale = np.where(fits, stored(scale + step), scale)
            rest = (to_bias + b * (new_scale - scale)) / np.where(fits, c, 1)
            new_bias = np.where(fits, stored(bias - rest), bias)
            old = moved(at, scale, np.zeros_like(scale), np.zeros_like(bias))
            new = moved(at, new_scale, new_scale - scale, new_bias - bias)
            take = new[2] > old[2]
            codes, change, gain = (
                np.where(take.reshape(-1, *[1] * (o.ndim - 1)), n, o)
                for n, o in zip(new, old, strict=True)
            )
            better = gain > 0
            change = np.where(better[:, None], change, 0)
            q[:, at] = np.where(better[:, None], codes, q[:, at])
            scales[:, k] = np.where(better & take, new_scale, scale)
            biases[:, k] = np.where(better & take, new_bias, bias)
            slope += change @ h[at]
    return rounded._replace(
        codes=pack(mx.array(q).reshape(w.shape), rounded.bits),
        scales=mx.array(scales).astype(dtype).reshape(rounded.scales.shape),
        biases=mx.array(biases).astype(dtype).reshape(rounded.biases.shape),
    )


def _descend_together(
    w: mx.array, rounded: AffineWeight, hessian: mx.array, outputs: mx.array, sweeps: int
) -> AffineWeight:
    """The same in NumPy where the errors of rows add up.

    Row i costs G_ii (D_i + c_i) H (D_i + c_i)' and what does not depend on it, with c_i = sum over
    j != i of G_ij D_j / G_ii: the descent of one row, to a target that is moved by -c_i.
    """
    rounded.check("rounded")
    if w.ndim != 2 or outputs.shape != (len(w), len(w)):
        raise ValueError(
            f"[descend] outputs are {outputs.shape} and w is {w.shape}; w must have two axes, and "
            "outputs be square with the first of them"
        )
    rows = len(w)
    turns = max(1, rows // TOGETHER)
    order = np.concatenate([np.arange(turn, rows, turns) for turn in range(turns)])
    bounds = [0, *np.cumsum([len(range(turn, rows, turns)) for turn in range(turns)]).tolist()]
    weight = np.array(w.astype(mx.float32))[order]
    change = np.array(rounded.dequantized())[order] - weight
    h = np.array(hessian.astype(mx.float32))
    g = np.array(outputs.astype(mx.float32))[np.ix_(order, order)]
    parts = [_rows(rounded, mx.array(order[a:b])) for a, b in pairwise(bounds)]
    for _ in range(sweeps):
        for n, (a, b) in enumerate(pairwise(bounds)):
            own, old = g[a:b, a:b], change[a:b].copy()
            pull = g[a:b] @ change
            alone = (own @ old - pull) / np.diag(own)[:, None]
            # If they do share, steps of this length cannot raise what they cost together.
            careful = old - pull / np.abs(own).sum(axis=1, keepdims=True)
            for moved in (alone, careful):
                target = mx.array(weight[a:b] + moved).astype(w.dtype)
                part = _descend(target, parts[n], hessian, 1)
                step = np.array(part.dequantized()) - weight[a:b] - old
                if np.sum((own @ step + 2 * pull) * (step @ h)) < 0:  # what it costs in all
                    parts[n], change[a:b] = part, old + step
                    break
    arrays = zip(*(part[:3] for part in parts), strict=True)
    codes, scales, biases = (mx.concatenate(list(of)) for of in arrays)
    back = mx.array(np.argsort(order))
    return _rows(rounded._replace(codes=codes, scales=scales, biases=biases), back)


def _rows(weight: AffineWeight, rows: mx.array) -> AffineWeight:
    codes, scales, biases = (array[rows] for array in weight[:3])
    return weight._replace(codes=codes, scales=scales, biases=biases)
