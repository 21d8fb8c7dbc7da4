"""How far a rounded weight is from the weight itself, whatever that does to the model's output."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...nn.layers import dequantized

# Elements that are compared; rows evenly spread over a larger weight stand for all.
ELEMENTS = 1 << 22


def relative_error(layer: nn.Module, rounded: nn.Module) -> float:
    """sum (w' - w)^2 / sum w^2, with w the weight of `layer` and w' that of its `rounded` version.

    0 for a weight that is all zeros. The sums of rows are in float32, of these in float64.
    """
    weight = layer.weight
    rows = slice(None, None, -(-weight.size // ELEMENTS))
    w = weight[rows].astype(mx.float32)
    each = (mx.sum(mx.square(part), axis=-1) for part in (dequantized(rounded, rows) - w, w))
    error, squares = (float(np.asarray(part).sum(dtype=np.float64)) for part in each)
    return error / squares if squares else 0.0
