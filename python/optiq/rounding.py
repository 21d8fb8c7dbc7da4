"""Rounding: one weight and one format in, codes, scales and biases out, as stock MLX reads them.

An affine format stores w as `code * scale + bias`, per group of `group_size` neighbours in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .errors import UsageError
from .formats import Format
from .sources import check_finite

Rounded = tuple[mx.array, mx.array, mx.array]


def minmax(w: mx.array, fmt: Format) -> Rounded:
    """Scale and bias from each group's smallest and largest weight: exactly `mx.quantize`."""
    codes, scales, biases = mx.quantize(w, fmt.group_size, fmt.bits)
    return codes, scales, biases


ROUNDINGS: dict[str, Callable[[mx.array, Format], Rounded]] = {"minmax": minmax}


def round_weight(
    w: mx.array, fmt: Format, *, rounding: str = "minmax", name: str = "weight"
) -> Rounded:
    """Round `w` (..., out, in), float32, float16 or bfloat16, to the affine format `fmt`.

    Returns codes, uint32 (..., out, in * bits / 32), and scales and biases in the dtype of `w`,
    (..., out, in / group_size). Raises SourceError naming `name` when `w` is not finite, and
    UsageError when the rounding is unknown or the format cannot hold such a weight.
    """
    if rounding not in ROUNDINGS:
        raise UsageError(f"unknown rounding {rounding!r}; use one of {', '.join(ROUNDINGS)}")
    if fmt.mode != "affine":
        raise UsageError(f"{name} is planned as {fmt}, which is not rounded; store it as it is")
    if w.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise UsageError(f"{name} is {w.dtype}; only float32, float16 and bfloat16 are rounded")
    if w.ndim < 2 or not fmt.fits(w.shape):
        raise UsageError(
            f"{name} of shape {tuple(w.shape)} does not divide into groups of {fmt.group_size}; "
            "use a smaller group size or bf16"
        )
    check_finite(name, w)
    return ROUNDINGS[rounding](w, fmt)
