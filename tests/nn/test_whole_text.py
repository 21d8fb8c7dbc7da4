"""Attention over a whole text: values and gradients of stock modules, and what else calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq.kv import route
from optiq.kv.routing import Routed
from optiq.nn.whole_text import WholeText, attend_whole_texts
from tests.nn.alike import assert_alike, opened

IDS = mx.array([[1 + (5 * i) % 60 for i in range(40)]])


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, WholeText)]


# Windows, norms of heads, sinks, tails of a batch.
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_are_those_of_stock(tmp_path: Path, kind: str, rows: int) -> None:
    ours, plain = opened(tmp_path, kind, attend_whole_texts)
    assert len(attentions(ours)) == len(ours.layers)
    ids = mx.concatenate([IDS, IDS[:, ::-1]][:rows])
    assert_alike(ours, plain, ids)


def test_with_a_cache_stock_attention_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = opened(tmp_path, "llama", attend_whole_texts)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("optiq.ops.causal_attention", never)
    of_each = [model(IDS, cache=make_prompt_cache(model)) for model in (ours, plain)]
    assert mx.array_equal(*of_each)
    with pytest.raises(AssertionError):
        ours(IDS)


def test_twice_is_once_and_it_can_be_routed(tmp_path: Path) -> None:
    ours, plain = opened(tmp_path, "llama", attend_whole_texts)
    before = attentions(ours)
    attend_whole_texts(ours)
    assert attentions(ours) == before
    assert route(ours) == {}
    assert all(isinstance(m, Routed) for m in attentions(ours))
    assert mx.allclose(ours(IDS), plain(IDS), atol=1e-4)
