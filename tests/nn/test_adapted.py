"""Adapters beside fused blocks: each row is what it is alone, and one without is untouched."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest

from optiq.kv.rows import joined
from optiq.lora.adapter import Adapter
from optiq.lora.gathered import Shadow, halved
from optiq.lora.layers import LowRank, gain, put
from optiq.models.adaptable import adaptable
from optiq.models.places import place_at
from optiq.models.roles import Role
from optiq.nn.adapted import Adapted
from optiq.ops import native
from tests.nn.test_stack import prepared, read, runs

__all__ = ["runs"]  # a fixture

KINDS = ["mistral", "gemma3_text", "olmo2", "phi3", "gemma4_text"]


def adapter(model: Any, seed: int) -> Adapter:
    """Ranks 1 to 12 beside most layers; of DoRA where the seed is even."""
    terms, magnitudes = {}, {}
    for i, module in enumerate(adaptable(model)):
        if i % 5 == seed % 5 or module.role is Role.EXPERT:
            continue
        out, width = module.shape
        a, b = mx.random.split(mx.random.key(1000 * seed + i))
        rank = 1 + (i + seed) % 12
        terms[module.path] = LowRank(
            mx.random.normal((width, rank), key=a) * (width * rank) ** -0.5,
            mx.random.normal((rank, out), key=b),
        )
        if seed % 2 == 0:
            layer = place_at(model, module.path).get()
            lengths = 1 / gain(layer, terms[module.path], 0.5, mx.ones(out))
            magnitudes[module.path] = (0.8 + 0.4 * mx.random.uniform(shape=(out,), key=a)) * lengths
    return Adapter(terms, 0.5, magnitudes=magnitudes)


def prepared_with(kind: str, kv: str | None = None) -> tuple[Any, Shadow, list[Adapter]]:
    model = prepared(kind, kv)
    adapters = [adapter(model, seed) for seed in (1, 2)]
    shadow = Shadow(model, 2)
    for slot, each in enumerate(adapters, start=1):
        shadow.fill(slot, halved(each, model))
    return model, shadow, adapters


@pytest.mark.parametrize(("kind", "kv"), [*((kind, None) for kind in KINDS), ("mistral", "8/4")])
def test_a_row_does_not_depend_on_the_adapters_of_others(
    kind: str, kv: str | None, runs: list[bool]
) -> None:
    model, shadow, _ = prepared_with(kind, kv)
    slots = [2, 0, 1, 2]
    lengths = (5, 30, 12, 30)
    sequences, alone = [], []
    for i, slot in enumerate(slots):
        shadow.select([slot])
        own = shadow.model if slot else model  # without an adapter, the model itself
        sequences.append(read(shadow.model, lengths)[i])
        alone.append(read(own, lengths)[i])
    before = len(runs)
    for step in range(3):
        tokens = mx.array([[2 + (7 * step + i) % 50] for i in range(4)])
        shadow.select(slots)
        got = shadow.model(tokens, cache=joined(sequences))
        mx.eval(got)
        for i, slot in enumerate(slots):
            shadow.select([slot])
            own = shadow.model if slot else model
            one = own(tokens[i : i + 1], cache=alone[i])
            if native.active():
                assert mx.array_equal(got[i : i + 1], one), (step, i)
            assert mx.abs(got[i : i + 1] - one).max() <= 1e-4 * mx.abs(one).max(), (step, i)
    if native.active() and kind in ("mistral", "olmo2"):
        assert any(runs[before:])  # all blocks as one node


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_adapter_alone_does(kind: str) -> None:
    model, shadow, adapters = prepared_with(kind)
    ids = mx.array([[5, 6, 7, 8]])
    for slot, each in enumerate(adapters, start=1):
        truth = copy.deepcopy(model)
        put(truth, each.terms, each.scale, magnitudes=each.magnitudes)
        expected = truth(ids)
        shadow.select([slot])
        got = shadow.model(ids)
        assert mx.abs(got - expected).max() <= 4e-3 * mx.abs(expected).max()
        assert not mx.array_equal(expected, model(ids))


def test_layers_under_an_adapter_may_be_replaced() -> None:
    model, shadow, _ = prepared_with("mistral")
    ids = mx.array([[5, 6, 7, 8]])
    shadow.select([1])
    before = shadow.model(ids)
    layer = shadow.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Adapted)
    layer.linear.weight = layer.linear.weight + 0.5
    after = shadow.model(ids)
    assert not mx.array_equal(before, after)
    layer.linear = model.model.layers[0].mlp.up_proj
    assert mx.array_equal(shadow.model(ids), before)
