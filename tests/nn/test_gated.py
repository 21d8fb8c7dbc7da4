"""Gated MLPs with the native activation: the same values, and what computes more is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from optiq.nn.gated import Gated, gate
from optiq.ops import native
from tests.nn.test_accelerate import stock


def opened(parent: Path, kind: str) -> Any:
    if not native.active():
        pytest.skip("MLX's own activation is as good without native kernels")
    model = stock(parent, kind)
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])  # phi3: one matrix for both
def test_plain_mlps_give_the_same(tmp_path: Path, kind: str) -> None:
    model, ids = opened(tmp_path, kind), mx.array([[1, 2, 3, 4, 5]])
    before = model(ids)
    gate(model)
    assert all(isinstance(block.mlp, Gated) for block in model.layers)
    assert mx.abs(model(ids) - before).max() <= 1e-4 * mx.abs(before).max()
    classes = [type(block.mlp) for block in model.layers]
    gate(model)  # again
    assert [type(block.mlp) for block in model.layers] == classes


def test_an_mlp_that_computes_something_else_is_left(tmp_path: Path) -> None:
    model = opened(tmp_path, "llama")
    plain = type(model.layers[0].mlp)

    class Doubled(plain):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> Any:
            return 2 * super().__call__(x)

    model.layers[0].mlp.__class__ = Doubled
    gate(model)
    assert type(model.layers[0].mlp) is Doubled
    assert isinstance(model.layers[1].mlp, Gated)
