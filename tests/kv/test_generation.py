"""Models that cache records, with unmodified mlx-lm around them."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import base, llama
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from optiq import kv
from optiq.formats import DENSE, Format
from optiq.kv import KVConfig
from optiq.kv.caches import KVRecords, RotatingKVRecords
from optiq.kv.routing import Routed
from tests.kv.models import KINDS, batched, logits, model_of, prompts, rounding_caches

F3, F4, F5, F6, F8 = (Format("affine", bits, 32) for bits in (3, 4, 5, 6, 8))


def mixed(model: nn.Module, *pairs: tuple[Format, Format], **windows: int) -> KVConfig:
    """Another pair for every cache."""
    found = kv.entries(model)
    entries = (
        entry if entry.kind == "recurrent" else replace(entry, k=k, v=v)
        for entry, (k, v) in zip(found, cycle(pairs), strict=False)
    )
    return KVConfig(tuple(entries), **windows)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_stock_caches_of_what_the_records_stand_for(kind: str) -> None:
    model = model_of(kind)
    config = mixed(model, (F8, F4), (F4, F6), (DENSE, F3), (F5, DENSE))
    expected = np.array(logits(model, rounding_caches(model, config)))

    def check() -> None:
        """Sums in another order may move a later layer's value over the edge between two codes."""
        got = np.array(logits(model, make_prompt_cache(model)))
        error = np.abs(got - expected).max(axis=(0, 2)) / np.abs(expected).max()  # of each token
        assert np.median(error) <= 1e-6
        assert error.max() <= 1e-3

    model = kv.attach(model, config)
    check()
    left = kv.route(model)
    assert bool(left) == (kind == "deepseek_v3")  # does more with latents than pass them on
    assert any(isinstance(m, Routed) for _, m in model.named_modules()) == (not left)
    check()


@pytest.mark.parametrize(
    ("kind", "recent", "sink"), [*((kind, 5, 3) for kind in KINDS), ("mistral", 0, 0)]
)
def test_batches_generate_what_single_runs_do(kind: str, recent: int, sink: int) -> None:
    model = model_of(kind)
    config = mixed(model, (F8, F4), (F4, F3), (F3, DENSE), fp_recent=recent, fp_sink=sink)
    model = kv.attach(model, config)
    kv.route(model)
    first, late = prompts(5, 11, 2, 19), prompts(3, 9)[::-1]
    alone = [batched(model, [p])[0] for p in first + late]
    alone[1] = alone[1][:3]
    assert batched(model, first, late) == alone


def test_stream_generation_and_batches_agree() -> None:
    model = kv.attach(model_of("mistral"), "4/3")
    prompt = prompts(12)[0]
    steps = generate_step(mx.array(prompt), model, max_tokens=7)
    assert [token for token, _ in steps] == batched(model, [prompt])[0]


def test_the_caches_that_a_model_makes() -> None:
    model = model_of("gemma4_text")
    found = kv.entries(model)
    assert [(e.layers, e.kind, e.window) for e in found] == [
        ((0, 2), "sliding", 8),
        ((1, 3), "full", 0),
    ]
    attached = kv.attach(model, replace(KVConfig.uniform(found, "8/4"), fp_recent=4))
    assert [type(c) for c in make_prompt_cache(attached)] == [RotatingKVRecords, KVRecords]
    assert [c.layout.recent for c in make_prompt_cache(attached)] == [0, 4]
    assert isinstance(attached, type(model))
    again = kv.attach(attached, "16/16")
    assert not any(hasattr(c, "layout") for c in make_prompt_cache(again))
    assert kv.entries(attached) == found
    kinds = {kind: [e.kind for e in kv.entries(model_of(kind))] for kind in KINDS}
    assert kinds["gpt_oss"] == ["sliding", "full"]
    assert kinds["deepseek_v3"] == ["mla", "mla"]
    assert kinds["qwen3_next"] == ["recurrent", "full"]


def test_mlx_lm_is_left_as_it_is() -> None:
    call, attention = llama.Attention.__call__, llama.scaled_dot_product_attention
    model = kv.attach(model_of("mistral"), "8/4")
    kv.route(model)
    assert llama.Attention.__call__ is call
    assert llama.scaled_dot_product_attention is attention is base.scaled_dot_product_attention
    attention_module = model.layers[0].self_attn
    assert isinstance(attention_module, llama.Attention)
    x = mx.random.normal((1, 3, 64))
    plain = llama.Attention.__call__(attention_module, x, "causal", None)
    assert mx.array_equal(attention_module(x, "causal", None), plain)


def test_queries_stay_as_they_are() -> None:
    model = kv.attach(model_of("gpt_oss"), "5/6")
    kv.route(model)
    cache = make_prompt_cache(model)[1]
    k, v, q = (mx.random.normal((1, h, 4, 16)) for h in (2, 2, 4))
    kept = np.array(q)
    cache.write(k, v)
    cache.attend(q, scale=0.3, mask="causal")
    np.testing.assert_array_equal(np.array(q), kept)


def test_prefixes_in_mlx_lms_own_store() -> None:
    model = model_of("mistral")
    model = kv.attach(model, mixed(model, (F8, F4), fp_sink=2))
    prompt = prompts(20)[0]
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:14]]), cache=caches)
    store = LRUPromptCache()
    store.insert_cache("model", prompt[:14], caches)
    assert store.nbytes == sum(c.nbytes for c in caches)
    found, rest = store.fetch_nearest_cache("model", prompt)
    assert rest == prompt[14:]
    steps = generate_step(mx.array(rest), model, prompt_cache=caches, max_tokens=6)
    expected = [token for token, _ in steps]
    generator = BatchGenerator(model, max_tokens=6)
    generator.insert([rest], caches=[found], all_tokens=[prompt[:14]])
    got = []
    while responses := generator.next_generated():
        got += [r.token for r in responses]
    assert got == expected
