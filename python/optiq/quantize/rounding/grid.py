"""The scales and biases of one rounded layer as two numbers a group that can be trained.

A group of codes c stands for scale * c + bias. Each group gets two trainable numbers, initially
zero, in units of the group's step: `turn` about the middle of its grid and `shift` of the grid, so
that one learning rate suits layers of all magnitudes and widths:

    scale = scale_0 * (1 + turn / spread)
    bias  = bias_0 - middle * (scale - scale_0) + scale_0 * shift

The layer always runs with scales and biases as they will be stored; gradients pass over that
rounding (Bengio et al. 2013).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...planning.plan import Planned
from .weights import Rounded


class Grid:
    """The scales and biases of one layer, by turn and shift."""

    def __init__(self, planned: Planned, layer: Any) -> None:
        self.path, self.format, self.layer = planned.module.path, planned.format, layer
        self.scales, self.biases = layer.scales, layer.biases
        top = (1 << self.format.bits) - 1
        # A grid's codes lie about a quarter of its width from its middle.
        self._middle, self._spread = top / 2, top / 4
        layer.unfreeze(keys=["scales", "biases"])

    def set(self, turn: mx.array, shift: mx.array) -> None:
        """Let the layer run with them."""
        self.layer.scales, self.layer.biases = self._at(turn, shift)

    def stored(self, turn: mx.array, shift: mx.array) -> Rounded:
        scales, biases = (a.astype(self.scales.dtype) for a in self._at(turn, shift))
        mx.eval(scales, biases)
        return self.layer.weight, scales, biases

    def _at(self, turn: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
        """Float32 scales and biases that their stored dtype holds exactly."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        moved = self._round(scales * (1 + turn / self._spread))
        return moved, self._round(biases - self._middle * (moved - scales) + scales * shift)

    def _round(self, x: mx.array) -> mx.array:
        return x + mx.stop_gradient(x.astype(self.scales.dtype).astype(mx.float32) - x)
