"""Rounding: one weight and one format in, codes, scales and biases out, as stock MLX reads them.

An affine format stores w as `code * scale + bias`, per group of `group_size` neighbours in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .errors import UsageError
from .formats import Format
from .sources import check_finite

Rounded = tuple[mx.array, mx.array, mx.array]

ROUNDINGS = ("search", "minmax")


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    "minmax" takes scale and bias from each group's smallest and largest weight: `mx.quantize`.
    "search" fits them to the columns' `importance`, by module path (see `importance.measure`); a
    module without it falls back to min/max, since a search that weighs all columns alike makes
    models worse.
    """

    name: str = "minmax"
    importance: Mapping[str, mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ROUNDINGS:
            raise UsageError(f"unknown rounding {self.name!r}; use one of {', '.join(ROUNDINGS)}")


MINMAX = Rounding()


def round_weight(
    w: mx.array, fmt: Format, rounding: Rounding = MINMAX, path: str = "the weight"
) -> Rounded:
    """Round `w` (..., out, in), float32, float16 or bfloat16, to the affine format `fmt`.

    Returns codes, uint32 (..., out, in * bits / 32), and scales and biases in the dtype of `w`,
    (..., out, in / group_size). Raises SourceError naming the module's `path` when `w` is not
    finite, and UsageError when the format cannot hold such a weight.
    """
    if fmt.mode != "affine":
        raise UsageError(f"{path} is planned as {fmt}, which is not rounded; store it as it is")
    if w.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise UsageError(f"{path} is {w.dtype}; only float32, float16 and bfloat16 are rounded")
    if w.ndim < 2 or not fmt.fits(w.shape):
        raise UsageError(
            f"{path} of shape {tuple(w.shape)} does not divide into groups of {fmt.group_size}; "
            "use a smaller group size or bf16"
        )
    check_finite(f"{path}.weight", w)
    return ops.quantize(w, fmt, rounding.importance.get(path))


def render(module: nn.Module, fmt: Format, rounding: Rounding, path: str) -> nn.Module:
    """The layer that `module` becomes when its weight is rounded exactly as it would be shipped.

    Raises SourceError naming `path` when the weight is not finite.
    """
    from .nn import quantized

    return quantized(module, *round_weight(module.weight, fmt, rounding, path), fmt)
