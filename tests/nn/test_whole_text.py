"""Attention over a whole text: values and gradients of stock modules, and what else calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from optiq.kv import route
from optiq.kv.routing import Routed
from optiq.nn.whole_text import WholeText, attend_whole_texts
from optiq.ops import native
from tests.nn.test_accelerate import stock

IDS = mx.array([[1 + (5 * i) % 60 for i in range(40)]])


def opened(parent: Path, kind: str) -> tuple[Any, Any]:
    """A model with attention of ours, and one without."""
    if not native.active():
        pytest.skip("MLX's own attention is as good without native kernels")
    models = stock(parent, kind), stock(parent, kind)
    for model in models:
        model.set_dtype(mx.float32)
    attend_whole_texts(models[0])
    return models


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, WholeText)]


# Windows, norms of heads, sinks, tails of a batch.
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_are_those_of_stock(tmp_path: Path, kind: str, rows: int) -> None:
    ours, plain = opened(tmp_path, kind)
    assert len(attentions(ours)) == len(ours.layers)
    ids = mx.concatenate([IDS, IDS[:, ::-1]][:rows])

    def run(model: Any) -> tuple[mx.array, Any]:
        def loss(model: Any) -> mx.array:
            return mx.sum(mx.sin(3 * model(ids)))

        return model(ids), nn.value_and_grad(model, loss)(model)[1]

    of_each = (tree_flatten(run(model)) for model in (ours, plain))
    for (_, got), (_, expected) in zip(*of_each, strict=True):
        assert mx.abs(got - expected).max() <= 1e-4 * mx.abs(expected).max() + 1e-6


def test_with_a_cache_stock_attention_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = opened(tmp_path, "llama")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("optiq.ops.causal_attention", never)
    of_each = [model(IDS, cache=make_prompt_cache(model)) for model in (ours, plain)]
    assert mx.array_equal(*of_each)
    with pytest.raises(AssertionError):
        ours(IDS)


def test_twice_is_once_and_it_can_be_routed(tmp_path: Path) -> None:
    ours, plain = opened(tmp_path, "llama")
    before = attentions(ours)
    attend_whole_texts(ours)
    assert attentions(ours) == before
    assert route(ours) == {}
    assert all(isinstance(m, Routed) for m in attentions(ours))
    assert mx.allclose(ours(IDS), plain(IDS), atol=1e-4)
