"""Rounding: one weight and one format in, codes, scales and biases out, as stock MLX reads them.

An affine format stores w as `code * scale + bias`, per group of `group_size` neighbours in a row;
nvfp4 as `code * scale` with codes in floating point, so it has no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ... import ops
from ...errors import UsageError
from ...formats import DENSE, NVFP4, Format
from ...ops import metal
from ...sources import check_finite

Rounded = tuple[mx.array, mx.array, mx.array | None]

# Weights that are rounded to nvfp4 at a time: stock MLX takes 77 bytes for each on the CPU.
NVFP4_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded, and what plans call that: the `method`.

    "minmax" takes scale and bias from each group's smallest and largest weight: `mx.quantize`.
    "search" fits them to the columns' `importance`, by module path (see importance.py); a module
    without it falls back to min/max, since a search that weighs all columns alike makes models
    worse. "descent", and "..., refined": what is in `fitted`, by module path and format, is rounded
    already (see descent.py and distill.py). `norms` are the trained weights of norms, by module
    path, in the dtype they are stored in.
    """

    method: str = "minmax"
    importance: Mapping[str, mx.array] = field(default_factory=dict)
    fitted: Mapping[tuple[str, Format], Rounded] = field(default_factory=dict)
    norms: Mapping[str, mx.array] = field(default_factory=dict)


MINMAX = Rounding()


@metal.restarts
def round_weight(
    w: mx.array, fmt: Format, rounding: Rounding = MINMAX, path: str = "the weight"
) -> Rounded:
    """Round `w` (..., out, in), float32, float16 or bfloat16, to `fmt`, which is not dense.

    Returns codes, uint32 (..., out, in * bits / 32), and scales and biases in the dtype of `w`,
    (..., out, in / group_size). In nvfp4, which always is stock rounding, scales are e4m3 numbers
    as uint8 and biases None. Raises SourceError naming the module's `path` when `w` is not
    finite, and UsageError when the format cannot hold such a weight.
    """
    if fmt == DENSE:
        raise UsageError(f"{path} is planned as {fmt}, which is not rounded; store it as it is")
    if w.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise UsageError(f"{path} is {w.dtype}; only float32, float16 and bfloat16 are rounded")
    if w.ndim < 2 or not fmt.fits(w.shape):
        raise UsageError(
            f"{path} of shape {tuple(w.shape)} does not divide into groups of "
            f"{max(32, fmt.group_size)}; use a smaller group size or bf16"
        )
    check_finite(f"{path}.weight", w)
    found = rounded(w, fmt, rounding, path)
    mx.eval(found)
    return found


def rounded(w: mx.array, fmt: Format, rounding: Rounding, path: str) -> Rounded:
    """`round_weight` of a weight that is known to be fit for it, not computed yet."""
    if (path, fmt) in rounding.fitted:
        return rounding.fitted[path, fmt]
    if fmt == NVFP4:
        return *_round_nvfp4(w), None
    return ops.quantize(w, fmt, rounding.importance.get(path))


def _round_nvfp4(w: mx.array) -> tuple[mx.array, mx.array]:
    rows = w.reshape(-1, w.shape[-1])
    step = max(1, NVFP4_WEIGHTS // w.shape[-1])
    parts = []
    for start in range(0, rows.shape[0], step):
        codes, scales, *_ = mx.quantize(rows[start : start + step], mode="nvfp4")
        mx.eval(codes, scales)
        parts.append((codes, scales))
    codes, scales = (mx.concatenate(list(of)) for of in zip(*parts, strict=True))
    return codes.reshape(*w.shape[:-1], -1), scales.reshape(*w.shape[:-1], -1)
