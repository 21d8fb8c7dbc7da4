"""Attention modules that pass on, pass on wrongly, or do more with what a cache hands out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base, llama
from mlx_lm.models.cache import make_prompt_cache

from optiq import kv
from optiq.kv.routing import Routed
from tests.kv.models import logits, model_of

scaled_dot_product_attention = base.scaled_dot_product_attention  # what modules here call


class Through(llama.Attention):  # type: ignore[misc]
    """The original again, with the names of this file."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        q, k, v = self.change(*self.fetched(x, cache))
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def fetched(self, x: mx.array, cache: Any) -> tuple[mx.array, Any, Any]:
        shape = (*x.shape[:2], -1, 16)
        q, k, v = (
            p(x).reshape(shape).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        return (q, *cache.update_and_fetch(k, v))

    def change(self, q: mx.array, k: Any, v: Any) -> tuple[mx.array, Any, Any]:
        return q, k, v


class Elsewhere(Through):
    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        y = self.attend(*self.fetched(x, cache), cache, mask)
        return self.o_proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def attend(self, q: mx.array, k: Any, v: Any, cache: Any, mask: Any) -> mx.array:
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)


class Scaled(Through):
    def change(self, q: mx.array, k: Any, v: Any) -> tuple[mx.array, Any, Any]:
        return q, 2 * k, v


class Swapped(Through):
    def change(self, q: mx.array, k: Any, v: Any) -> tuple[mx.array, Any, Any]:
        return q, v, k


class Noisy(Through):
    """Differs from call to call, so what it does cannot be compared."""

    calls = 0

    def change(self, q: mx.array, k: Any, v: Any) -> tuple[mx.array, Any, Any]:
        Noisy.calls += 1
        return Noisy.calls * q, k, v


def model_with(cls: type) -> nn.Module:
    model = kv.attach(model_of("mistral"), "8/4")
    for layer in model.layers:
        layer.self_attn.__class__ = cls
    return model


def test_code_that_passes_on_is_routed() -> None:
    model = model_with(Through)
    expected = logits(model, make_prompt_cache(model))
    assert kv.route(model) == {}
    assert all(isinstance(layer.self_attn, Routed) for layer in model.layers)
    got = logits(model, make_prompt_cache(model))
    assert mx.abs(got - expected).max().item() < 1e-3  # a code may flip, see test_generation.py
    assert kv.route(model) == {}  # again: nothing is left to do


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Scaled, "it raises TypeError"),
        (Swapped, "it raises TypeError"),
        (Noisy, "it differs from the original"),
    ],
)
def test_code_that_does_more_goes_on_with_vectors(cls: type, reason: str) -> None:
    model = model_with(cls)
    left = kv.route(model)
    assert set(left) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(reason in text for text in left.values())
    assert all(type(layer.self_attn) is cls for layer in model.layers)
    logits(model, make_prompt_cache(model))


def test_attention_that_another_method_calls_is_not_touched() -> None:
    model = model_with(Elsewhere)
    assert kv.route(model) == {}
    assert all(type(layer.self_attn) is Elsewhere for layer in model.layers)


class Own(Through):
    """Calls an attribute of the name, which is none of its file."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        q, k, v = self.fetched(x, cache)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))


def test_an_attribute_of_that_name_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(globals(), "scaled_dot_product_attention")
    model = model_with(Own)
    assert kv.route(model) == {}
    assert all(type(layer.self_attn) is Own for layer in model.layers)


def test_a_routed_module_without_a_cache_is_the_original() -> None:
    model = kv.attach(model_of("mistral"), "8/4")
    before = model(mx.array([[5, 6, 7, 8]]))
    assert kv.route(model) == {}
    assert mx.array_equal(model(mx.array([[5, 6, 7, 8]])), before)
    stock = kv.attach(model, "16/16")
    plain = logits(model_of("mistral"), make_prompt_cache(model_of("mistral")))
    assert mx.array_equal(logits(stock, make_prompt_cache(stock)), plain)
