"""A weight for each head, both ways round, against float64; and experts whose indices broadcast."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

import optiq
from optiq.formats import NVFP4, Format
from optiq.nn import layers
from optiq.nn.accelerate import quantized
from optiq.quantize.rounding.weights import round_weight

HEADS, IN, OUT, TOKENS = 3, 64, 32, 5
FORMATS = [Format("affine", 4, 64), Format("affine", 3, 32), Format("affine", 8, 64), NVFP4]
# Activations are 16-bit fixed point in quantized products; of the sum of magnitudes.
TOLERANCE = 2.0**-14


def product(x: mx.array, weight: mx.array, transpose: bool) -> tuple[Any, Any]:
    """In float64, and the sum of the magnitudes of what is added."""
    a, w = np.array(x, np.float64), np.array(weight.astype(mx.float32), np.float64)
    w = w.swapaxes(-1, -2) if transpose else w
    return a @ w, np.abs(a) @ np.abs(w)


@pytest.mark.parametrize("fmt", [None, *FORMATS])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_each_head_has_its_own_weight(fmt: Format | None, transpose: bool, heads: int) -> None:
    layer: nn.Module = MultiLinear(IN, OUT, HEADS)
    weight = layer.weight
    if fmt is not None:
        layer = quantized(layer, *round_weight(weight, fmt), fmt)
        weight = layers.dequantized(layer)
    else:
        layer = layers.MultiLinear.adopt(layer)
    x = mx.random.normal((2, heads, TOKENS, IN if transpose else OUT), key=mx.random.key(0))
    expected, magnitude = product(x, weight, transpose)
    got = layer(x, transpose) if transpose else layer(x, transpose=False)
    assert got.shape == (2, HEADS, TOKENS, OUT if transpose else IN)
    assert np.all(np.abs(np.array(got) - expected) <= TOLERANCE * magnitude)


def test_accelerate_swaps_them() -> None:
    model = nn.Sequential(MultiLinear(IN, OUT, HEADS), MultiLinear(OUT, IN, HEADS))
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path.endswith("1"))
    assert optiq.accelerate(model, blocks=False).left == {}
    assert [type(layer) for layer in model.layers] == [
        layers.MultiLinear,
        layers.QuantizedMultiLinear,
    ]


@pytest.mark.parametrize(
    ("x", "indices"),
    [((7, 2, 1, IN), (2,)), ((2, 1, IN), (7, 2)), ((7, 1, 1, IN), (7, 3)), ((4, IN), (2, 3))],
)
def test_indices_and_inputs_of_experts_broadcast(
    x: tuple[int, ...], indices: tuple[int, ...]
) -> None:
    layer = SwitchLinear(IN, OUT, 4, bias=True)
    inputs = mx.random.normal(x, key=mx.random.key(1))
    chosen = mx.random.randint(0, 4, indices, key=mx.random.key(2))
    expected = layer(inputs, chosen)
    got = layers.SwitchLinear.adopt(layer)(inputs, chosen)
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.array(got), np.array(expected), 1e-4, 1e-4)


def test_a_single_vector_has_gradients_at_the_weight() -> None:
    """DBRX gives its experts one token at a time."""
    layer = layers.Linear.adopt(nn.Linear(IN, OUT, bias=False))
    x = mx.random.normal((IN,), key=mx.random.key(0))

    def total(weight: mx.array) -> mx.array:
        layer.weight = weight
        return mx.sum(layer(x))

    gradient = mx.grad(total)(layer.weight)
    np.testing.assert_allclose(np.array(gradient), np.tile(np.array(x), (OUT, 1)), 1e-5)
