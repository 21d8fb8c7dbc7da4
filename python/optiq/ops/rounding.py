"""Rounding a weight to affine codes."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from ..formats import Format
from . import metal, native
from .affine import pack

# As in csrc/cpu/quantize.h: grids from nine tenths of a step wider to as much narrower.
STEPS = [-0.9 + 0.05 * i for i in range(37)]
REFITS = 3
GPU_ELEMENTS = 2**35 - 2**11  # the Metal kernels count octets in 32 bits

Quantized = tuple[mx.array, mx.array, mx.array]


def quantize(w: mx.array, fmt: Format, importance: mx.array | None = None) -> Quantized:
    """Codes, scales and biases of `w` in the affine format `fmt`, as `mx.quantize` packs them.

    Without `importance`, min/max rounding: exactly `mx.quantize`, bit for bit. A group with an
    infinity has NaN as its scale; NaN is left out of the range of its group and becomes code 0.

    With it, scale and bias of each
    group are searched to minimise `sum c (w' - w)^2` with
    `c = importance * sqrt(2 mean(w^2) + w^2)`, and codes are derived from the scales and biases as
    stored (the search of llama.cpp's make_qkx3_quants).

    Args:
        w: `[..., out, in]` in float32, float16 or bfloat16; `in` a multiple of the group size.
        importance: Weight of each column's error, such as the mean square of the layer's input:
            `[in]`, or `[experts, in]` for `w [experts, out, in]`.

    Returns:
        Codes uint32 `[..., out, in * bits / 32]`, scales and biases `[..., out, in / group_size]`
        in the dtype of `w`.

    Raises:
        ValueError: Dtypes or shapes that do not fit, or a `fmt` that is not affine.
    """
    _check(w, fmt, importance)

    def native_rounding(ext: ModuleType) -> Quantized:
        codes, scales, biases = ext.quantize(w, importance, fmt.group_size, fmt.bits)
        return codes, scales, biases

    def in_mlx() -> Quantized:
        if importance is not None:
            return _search(w, fmt, importance)
        codes, scales, biases = mx.quantize(w, fmt.group_size, fmt.bits)
        return codes, scales, biases

    if ext := native.active():
        return native_rounding(ext)
    if w.size >= GPU_ELEMENTS:
        return in_mlx()
    how = "min/max" if importance is None else "search"
    launch = how, w.dtype, fmt.group_size, fmt.bits
    return metal.run("quantize", launch, native_rounding, in_mlx)


def _check(w: mx.array, fmt: Format, importance: mx.array | None) -> None:
    if fmt.mode != "affine":
        raise ValueError(f"[quantize] fmt is {fmt}; it must be affine")
    if w.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise ValueError(f"[quantize] w is {w.dtype}; it must be float32, float16 or bfloat16")
    if w.ndim < 2 or w.shape[-1] % fmt.group_size:
        raise ValueError(
            f"[quantize] w {w.shape} must have two or more axes, the last a multiple of "
            f"{fmt.group_size}"
        )
    if importance is not None:
        shared, each = w.shape[-1:], (w.shape[0], w.shape[-1])
        if importance.shape != shared and (w.ndim != 3 or importance.shape != each):
            raise ValueError(
                f"[quantize] importance is {importance.shape}; it must be {shared}"
                + (" or one row per expert" if w.ndim == 3 else "")
            )


def _search(w: mx.array, fmt: Format, importance: mx.array) -> Quantized:
    """The search in `mx.*`, all groups at once."""
    top, dtype = float(2**fmt.bits - 1), w.dtype
    x = mx.unflatten(w.astype(mx.float32), -1, (-1, fmt.group_size))  # [..., out, groups, g]
    c = importance.astype(mx.float32)[..., None, :]
    c = mx.unflatten(mx.broadcast_to(c, w.shape), -1, (-1, fmt.group_size))
    c = c * mx.sqrt(2 * mx.mean(x * x, axis=-1, keepdims=True) + x * x)
    low, high = mx.min(x, axis=-1, keepdims=True), mx.max(x, axis=-1, keepdims=True)
    width = mx.maximum(high - low, 1e-30)

    def stored(a: mx.array) -> mx.array:
        return a.astype(dtype).astype(mx.float32)

    def error(q: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        return mx.sum(c * mx.square(q * scale + bias - x), axis=-1, keepdims=True)

    def fit(q: mx.array) -> tuple[mx.array, mx.array]:
        """Least squares; NaN, which no comparison prefers, where all codes are equal."""
        n, sq, sqq = (mx.sum(c * a, axis=-1, keepdims=True) for a in (1.0, q, q * q))
        sx, sqx = (mx.sum(c * a, axis=-1, keepdims=True) for a in (x, q * x))
        d = n * sqq - sq * sq
        d = mx.where(d > 0, d, mx.nan)
        return (n * sqx - sx * sq) / d, (sqq * sx - sq * sqx) / d

    def derive(scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        scale, bias = stored(scale), stored(bias)
        q = mx.where(scale == 0, 0, mx.round((x - bias) / mx.where(scale == 0, 1, scale)))
        return mx.clip(q, 0, top), scale, bias

    def better(old: tuple[mx.array, ...], new: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        take = error(new[0], new[1], new[2]) < error(old[0], old[1], old[2])
        return tuple(mx.where(take, b, a) for a, b in zip(old, new, strict=True))

    _, scales, biases = mx.quantize(w, fmt.group_size, fmt.bits)
    best: tuple[mx.array, ...] = derive(scales[..., None], biases[..., None])
    found = best
    for step in STEPS:
        q = mx.clip(mx.round((x - low) * ((top + step) / width)), 0, top)
        found = better(found, (q, *fit(q)))
        mx.eval(found)
    candidate = derive(found[1], found[2])
    for _ in range(REFITS):
        best = better(best, candidate)
        candidate = derive(*fit(candidate[0]))
    best = better(best, candidate)
    q, scale, bias = best
    codes = pack(q.flatten(-2), fmt.bits)
    return codes, scale[..., 0].astype(dtype), bias[..., 0].astype(dtype)
