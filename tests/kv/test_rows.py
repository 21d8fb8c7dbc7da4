"""Sequences that share a step, against each of them alone: equal to the bit on the CPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

import optiq
from optiq.kv import attach, route
from optiq.kv.half import halvable, halved
from optiq.kv.rows import Rows, Unbatchable, cuttable, joined, together
from tests.kv.models import model_of, prompts

SHARE = ["gpt_oss", "gemma4_text", "qwen3_next", "mistral"]


def prepared(kind: str, kv: str | None = None) -> nn.Module:
    model = model_of(kind)
    nn.quantize(model, group_size=32, bits=4, class_predicate=_fits)
    if kv not in (None, "half"):
        model = attach(model, kv)
    optiq.accelerate(model)
    route(model)
    return model


def _fits(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def tried(model: nn.Module) -> str:
    return together(model, 5, partial(make_prompt_cache, model))


def read(model: nn.Module, prompt: list[int], half: bool = False) -> list[Any]:
    caches: list[Any] = make_prompt_cache(model)
    caches = halved(caches) if half else caches
    mx.eval(model(mx.array([prompt]), cache=caches), [c.state for c in caches])
    return caches


@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        *((kind, None) for kind in SHARE),
        ("mistral", "8/4"),
        ("gemma4_text", "8/4"),
        ("mistral", "half"),
        ("gemma4_text", "half"),
        ("gpt_oss", "half"),
    ],
)
def test_rows_are_as_alone(kind: str, kv: str | None) -> None:
    """Past the window of 8, the growth of caches at 256, and with others joining and leaving."""
    model = prepared(kind, kv)
    half = kv == "half"
    alone = [read(model, p, half) for p in prompts(5, 251, 30, 1)]
    shared = copy.deepcopy(alone)
    present = [[0, 1]] * 4 + [[0, 1, 2, 3]] * 6 + [[1, 3]] * 3
    for step, rows in enumerate(present):
        tokens = mx.array([[2 + (7 * step + i) % 50] for i in rows])
        expected = mx.concatenate(
            [model(tokens[n : n + 1], cache=alone[i]) for n, i in enumerate(rows)]
        )
        got = model(tokens, cache=joined([shared[i] for i in rows]))
        assert mx.array_equal(got, expected), step
    for a, b in zip(alone, shared, strict=True):
        assert [getattr(c, "offset", 0) for c in a] == [getattr(c, "offset", 0) for c in b]


def test_half_caches_hold_what_stock_ones_do() -> None:
    """To the rounding of float16, whoever writes: a block, or the cache itself."""
    model = prepared("mistral")
    assert halvable(model)
    prompt = prompts(40)[0]
    plain, half = read(model, prompt), read(model, prompt, half=True)
    for step in range(3):
        tokens = mx.array([[5 + step]])
        expected, got = model(tokens, cache=plain), model(tokens, cache=half)
        assert mx.allclose(got, expected, rtol=0, atol=2e-3 * mx.abs(expected).max().item())
    for a, b in zip(plain, half, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert y.dtype == mx.float16
            assert mx.allclose(y[:, :, :43].astype(mx.float32), x[:, :, :43], rtol=2e-3, atol=2e-3)
    large = halved(make_prompt_cache(model))[0]
    large.update_and_fetch(mx.full((1, 2, 1, 16), 1e6), mx.full((1, 2, 1, 16), -1e6))
    assert large.keys[:, :, :1].max().item() == 65504
    assert large.values[:, :, :1].min().item() == -65504


def test_the_trial_finds_who_can_share_a_step() -> None:
    assert all(tried(prepared(kind)) == "" for kind in SHARE)
    assert "raise" in tried(prepared("deepseek_v3"))  # latents are no keys and values


def test_the_trial_finds_a_model_whose_rows_depend_on_each_other() -> None:
    class Mixing(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        @property
        def layers(self) -> Any:
            return self.model.layers

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            y: mx.array = self.model(tokens, cache=cache)
            return y + 1e-6 * mx.mean(y, axis=(0, 1), keepdims=True)

    assert "differ" in tried(Mixing(prepared("mistral")))


def test_dense_weights_are_read_in_slices_of_one_size() -> None:
    """The product of many rows with dense weights is another kernel than that of a few."""
    quantized = prepared("mistral")
    assert cuttable(quantized, partial(make_prompt_cache, quantized))
    dense = model_of("mistral")
    optiq.accelerate(dense)
    assert not cuttable(dense, partial(make_prompt_cache, dense))


def test_what_cannot_share_a_step_says_so_before_anything_is_written() -> None:
    caches = [KVCache(), KVCache()]
    for cache in caches:
        cache.update_and_fetch(mx.zeros((1, 2, 3, 8)), mx.zeros((1, 2, 3, 8)))
    with pytest.raises(Unbatchable):
        Rows(caches).make_mask(2)
    window = RotatingKVCache(8)
    for _ in range(12):
        window.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    with pytest.raises(Unbatchable):
        Rows([window, window]).make_mask(1, window_size=4)
    with pytest.raises(Unbatchable):
        joined([[KVCache()], [RotatingKVCache(8)]])
    assert [c.offset for c in caches] == [3, 3]
