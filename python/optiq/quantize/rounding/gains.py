"""Gains of a rounded model, which can be trained: relative changes of what is multiplied.

Each row of a rounded layer has one, which multiplies its scales and biases, and so has each channel
of a norm. They are few numbers, which few tokens can teach, and cost no bytes. Layers always run
with scales, biases and norms as they will be stored; gradients pass over that rounding (Bengio et
al. 2013).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...planning.plan import Planned
from .weights import Rounded


class Rows:
    """A rounded layer, by the gains of its rows: float32 [out, 1], initially zero."""

    def __init__(self, planned: Planned, layer: Any) -> None:
        self.path, self.format, self.layer = planned.module.path, planned.format, layer
        self.scales, self.biases = layer.scales, layer.biases
        layer.unfreeze(keys=["scales", "biases"])

    def start(self) -> mx.array:
        return mx.zeros((self.scales.shape[0], 1))

    def set(self, gains: mx.array) -> None:
        """Let the layer run with them."""
        self.layer.scales, self.layer.biases = self._at(gains)

    def stored(self, gains: mx.array) -> Rounded:
        scales, biases = (a.astype(self.scales.dtype) for a in self._at(gains))
        mx.eval(scales, biases)
        return self.layer.weight, scales, biases

    def _at(self, gains: mx.array) -> tuple[mx.array, mx.array]:
        """Float32 scales and biases that their stored dtype holds exactly."""
        dtype, by = self.scales.dtype, 1 + gains
        return _as_stored(self.scales * by, dtype), _as_stored(self.biases * by, dtype)


class Norm:
    """A norm, by the gains of its n channels: float32 [n], initially zero.

    `unit` is what it multiplies its channels by, `dtype` what its weight is stored in.
    """

    def __init__(self, path: str, layer: Any, unit: mx.array, dtype: mx.Dtype) -> None:
        self.path, self.layer = path, layer
        self.weight, self._unit, self._dtype = layer.weight, unit, dtype
        layer.unfreeze(keys=["weight"])

    def start(self) -> mx.array:
        return mx.zeros(self.weight.shape)

    def set(self, gains: mx.array) -> None:
        """Let the layer run with them."""
        self.layer.weight = self._at(gains)

    def stored(self, gains: mx.array) -> mx.array:
        weight = self._at(gains).astype(self._dtype)
        mx.eval(weight)
        return weight

    def _at(self, gains: mx.array) -> mx.array:
        return _as_stored(self.weight + self._unit * gains, self._dtype)


def multiplied(layer: Any) -> mx.array | None:
    """What `layer` multiplies each of its channels by, where it is a norm; else None.

    Some norms multiply by their weight, others by one more than that. So the layer is asked: values
    of 1 and -1 in turn have a mean of 0 and a mean square of 1 already. (Not in each group of a
    norm of groups, which may seem to multiply by 0; then it stays as it is.)
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, mx.array) or weight.ndim != 1 or weight.size % 2:
        return None
    x = mx.tile(mx.array([1.0, -1.0]), weight.size // 2)
    try:
        gain = (layer(x[None]) - layer(-x[None])) / 2
        mx.eval(gain)
    except (TypeError, ValueError):  # a gated norm takes two arrays
        return None
    return mx.abs(gain[0].astype(mx.float32)) if gain.shape == (1, weight.size) else None


def _as_stored(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Float32 `x` rounded to `dtype`; gradients pass over the rounding."""
    return x + mx.stop_gradient(x.astype(dtype).astype(mx.float32) - x)
