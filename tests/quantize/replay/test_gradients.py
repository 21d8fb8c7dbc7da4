"""Gradients of some rows of a weight are those rows of its gradient."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from optiq.quantize.replay.gradients import some_rows, weight_gradient


@pytest.mark.parametrize("kind", ["matrix", "experts"])
@pytest.mark.parametrize(("elements", "step"), [(1 << 10, 1), (300, 3), (32, 24)])
def test_some_rows_stand_for_all(kind: str, elements: int, step: int) -> None:
    layer: Any
    x, more = mx.random.normal((1, 5, 32), key=mx.random.key(0)), ()
    if kind == "matrix":
        layer = nn.Linear(32, 24)
    else:
        layer = SwitchLinear(32, 8, 3, bias=False)
        x, more = x[..., None, :], (mx.array([[[0], [2], [1], [2], [0]]]),)
    assert layer.weight.size == 768
    out = layer(x, *more)
    gradient = mx.random.normal(out.shape, key=mx.random.key(1))
    calls = [[((x, *more), {}, gradient)]]
    part, fewer, each = some_rows(layer, calls, elements)
    expected = weight_gradient(layer, calls[0])[..., ::step, :]
    np.testing.assert_allclose(weight_gradient(part, fewer[0]), expected, 1e-5, 1e-6)
    assert part.weight.shape == expected.shape
    assert each == layer.weight.size / expected.size


def test_lookups_and_heads_are_whole() -> None:
    for layer in (nn.Embedding(16, 32), MultiLinear(32, 8, 3)):
        assert some_rows(layer, [], 32) == (layer, [], 1.0)
