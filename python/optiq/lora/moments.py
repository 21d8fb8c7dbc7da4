"""Second moments of what goes into the layers, E[x x'], over samples of the training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..models.places import Wrapper, place_at
from ..models.roles import Module
from .data import Sample

# Bytes of all moments; beyond, only their diagonals are kept.
EXACT_BYTES = 2 << 30

FloatArray = NDArray[np.float64]


class _Meter(Wrapper):
    """Sums x x', or its diagonal, over all tokens that go into `inner`."""

    def __init__(self, inner: nn.Module, width: int, exact: bool) -> None:
        super().__init__(inner)
        self.total = mx.zeros((width, width) if exact else (width,))
        self.tokens = 0

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        squares = rows.T @ rows if self.total.ndim == 2 else mx.sum(mx.square(rows), axis=0)
        self.total = self.total + squares
        self.tokens += rows.shape[0]
        out: mx.array = self.inner(x)
        return out


def moments(
    model: nn.Module,
    modules: Sequence[Module],
    samples: Sequence[Sample],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, FloatArray]:
    """By path: [in, in], or the diagonal [in] where all of them would be too large.

    Layers of one unit multiply the same input, so one of them is measured for all.
    """
    first: dict[str, Module] = {}
    for module in modules:
        first.setdefault(module.unit, module)
    exact = sum(4 * m.shape[1] ** 2 for m in first.values()) <= EXACT_BYTES
    meters = {
        unit: _Meter(place_at(model, m.path).get(), m.shape[1], exact) for unit, m in first.items()
    }
    for unit, meter in meters.items():
        place_at(model, first[unit].path).set(meter)
    try:
        for sample in samples:
            model(mx.array([sample.tokens]))
            mx.eval([m.total for m in meters.values()])
            tick()
    finally:
        for unit, meter in meters.items():
            place_at(model, first[unit].path).set(meter.inner)
    means: dict[str, Any] = {
        unit: np.asarray(m.total, np.float64) / m.tokens for unit, m in meters.items()
    }
    return {m.path: means[m.unit] for m in modules}
