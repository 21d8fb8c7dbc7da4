"""Models with modules of ours beside the same ones without, for tests of what replaces modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from optiq.ops import native
from tests.nn.test_accelerate import stock


def opened(parent: Path, kind: str, replace: Callable[[nn.Module], None]) -> tuple[Any, Any]:
    """A float32 model after `replace`, and one before."""
    if not native.active():
        pytest.skip("MLX's own are as good without native kernels")
    models = stock(parent, kind), stock(parent, kind)
    for model in models:
        model.set_dtype(mx.float32)
    replace(models[0])
    return models


def assert_alike(ours: nn.Module, plain: nn.Module, ids: mx.array) -> None:
    """Logits and gradients at all parameters."""

    def run(model: Any) -> tuple[mx.array, Any]:
        def loss(model: Any) -> mx.array:
            return mx.sum(mx.sin(3 * model(ids)))

        return model(ids), nn.value_and_grad(model, loss)(model)[1]

    of_each = (tree_flatten(run(model)) for model in (ours, plain))
    for (_, got), (_, expected) in zip(*of_each, strict=True):
        assert mx.abs(got - expected).max() <= 1e-4 * mx.abs(expected).max() + 1e-6
