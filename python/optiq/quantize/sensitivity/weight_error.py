"""How far a rounded weight is from the weight itself, whatever that does to the model's output."""

from __future__ import annotations

from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...nn.layers import dequantized

# Elements of the weight that are compared at a time.
ELEMENTS = 1 << 22


def relative_error(layer: nn.Module, rounded: nn.Module) -> float:
    """sum (w' - w)^2 / sum w^2, with w the weight of `layer` and w' that of its `rounded` version.

    0 for a weight that is all zeros.
    """
    weight = layer.weight
    step = max(1, ELEMENTS // prod(weight.shape[1:]))
    error = squares = 0.0
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        w = weight[rows].astype(mx.float32)
        parts = mx.square(dequantized(rounded, rows) - w), mx.square(w)
        # The sums of rows in float32, of these in float64.
        error, squares = (
            total + float(np.asarray(mx.sum(part, axis=-1)).sum(dtype=np.float64))
            for total, part in zip((error, squares), parts, strict=True)
        )
    return error / squares if squares else 0.0
