"""Fused blocks in whole models: they give what the blocks they replaced give, or step aside."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from optiq.formats import Format
from optiq.kv.caches import records
from optiq.kv.records import Layout, Records
from optiq.nn.accelerate import accelerate
from optiq.nn.blocks import Fused
from optiq.ops import native
from tests.nn import test_accelerate
from tests.nn.test_accelerate import FUSED, TOKENS, divisible, stock

NAMES = sorted(FUSED)


def same(got: mx.array, expected: mx.array) -> bool:
    return test_accelerate.same(got, expected, "quantized")


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """The same model with fused blocks and with native layers only."""

    def make(name: str = "llama", **config: Any) -> tuple[nn.Module, nn.Module]:
        models = stock(tmp_path, name, **config), stock(tmp_path, name, **config)
        for m in models:
            nn.quantize(m, 64, 4, class_predicate=divisible)
        assert accelerate(models[0]).fused
        assert not accelerate(models[1], blocks=False).fused
        return models

    return make


class Calls:
    """Counts how often the computation of the original runs."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = next(
            c for c in type(model.layers[0]).__mro__ if c.__module__.startswith("mlx_lm.")
        )
        inner = original.__call__

        def call(block: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(block, Fused)
            return inner(block, *args, **kwargs)

        monkeypatch.setattr(original, "__call__", call)


def decode(model: nn.Module, cache: list[Any], tokens: mx.array = TOKENS, prompt: int = 10) -> Any:
    steps = [model(tokens[:, :prompt], cache=cache)]
    steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(prompt, tokens.shape[1])]
    return mx.concatenate(steps, axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_original_never_runs(name: str, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(name)
    calls = Calls(model, monkeypatch)
    expected = plain(TOKENS)
    assert same(model(TOKENS), expected)
    assert same(decode(model, make_prompt_cache(model)), expected)
    assert calls.count == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, 3])
def test_rotating_caches(name: str, keep: int, pair: Any) -> None:
    model, plain = pair(name)

    def caches() -> list[Any]:
        return [RotatingKVCache(12, keep=keep) for _ in model.layers]

    ours, theirs = caches(), caches()
    assert same(decode(model, ours), decode(plain, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.offset == b.offset
        assert a._idx == b._idx
        assert mx.allclose(a.keys, b.keys, atol=1e-3)


def test_a_cache_that_grows_and_is_trimmed(pair: Any) -> None:
    model, plain = pair()
    tokens = mx.concatenate([TOKENS] * 7, axis=1)  # over the 256 rows a cache begins with
    ours, theirs = make_prompt_cache(model), make_prompt_cache(plain)
    assert same(decode(model, ours, tokens, 250), decode(plain, theirs, tokens, 250))
    for c in (*ours, *theirs):
        c.trim(30)
    assert same(decode(model, ours), decode(plain, theirs))


@pytest.mark.parametrize("name", NAMES)
def test_batches(name: str, pair: Any) -> None:
    model, plain = pair(name)
    tokens = mx.concatenate([TOKENS, TOKENS[:, ::-1], TOKENS + 1])
    expected = plain(tokens)
    assert same(model(tokens), expected)
    assert same(decode(model, make_prompt_cache(model), tokens), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_mlx_lm_generates_the_same(name: str, pair: Any) -> None:
    """Through its pipelined generator, in which a step is scheduled before the last is done."""
    model, plain = pair(name)
    prompt = TOKENS[0, :20]
    for kwargs in ({}, {"max_kv_size": 16}, {"kv_bits": 8, "kv_group_size": 32}):
        if "kv_bits" in kwargs and name == "gemma3_text":
            continue  # mlx-lm quantizes no rotating cache
        ours, theirs = (
            [int(t) for t, _ in generate_step(prompt, m, max_tokens=40, **kwargs)]
            for m in (model, plain)
        )
        assert ours == theirs, kwargs


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_mlx_lm_generates_the_same_in_batches(name: str, pair: Any) -> None:
    prompts = [TOKENS[0, :n].tolist() for n in (5, 17, 9)]
    answers = []
    for model in pair(name):
        generator = BatchGenerator(model, max_tokens=12)
        uids = generator.insert(prompts)
        text: dict[int, list[int]] = {uid: [] for uid in uids}
        for _ in range(20):  # some of which only process prompts
            for r in generator.next()[1]:
                text[r.uid].append(r.token)
        answers.append([text[uid] for uid in uids])
    assert answers[0] == answers[1]
    assert all(len(a) == 12 for a in answers[0])


def test_copies_of_a_cache_go_separate_ways(pair: Any) -> None:
    """A prompt's cache that several answers continue must not be written in by one of them."""
    model, _ = pair()
    cache = make_prompt_cache(model)
    mx.eval(model(TOKENS[:, :10], cache=cache))
    copies = [copy.deepcopy(cache) for _ in range(2)]
    first = decode(model, copies[0], TOKENS[:, 10:20], 1)
    mx.eval(first)
    decode(model, copies[1], TOKENS[:, 20:30], 1)
    again = decode(model, cache, TOKENS[:, 10:20], 1)
    assert mx.array_equal(first, again)


def test_other_layers_are_not_overlooked(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    before = model(TOKENS)
    for m in (model, plain):
        layer = LoRALinear.from_base(m.layers[1].self_attn.v_proj, r=4)
        layer.lora_b = mx.ones(layer.lora_b.shape)
        layer.lora_a = mx.ones(layer.lora_a.shape) * 0.01
        m.layers[1].self_attn.v_proj = layer
    calls = Calls(model, monkeypatch)
    assert same(model(TOKENS), plain(TOKENS))
    assert calls.count == 1
    assert not same(model(TOKENS), before)


def test_new_weights_are_seen(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    mx.eval(model(TOKENS))
    calls = Calls(model, monkeypatch)
    for m in (model, plain):
        norm = m.layers[0].input_layernorm
        norm.weight = norm.weight * 2
        scales = m.layers[1].mlp.up_proj.scales
        m.layers[1].mlp.up_proj.scales = scales * 0.5
    assert same(model(TOKENS), plain(TOKENS))
    for m in (model, plain):
        m.layers[0].input_layernorm.weight *= 0.5  # in place
    assert same(model(TOKENS), plain(TOKENS))
    assert calls.count == 0


def test_models_are_freed(tmp_path: Path) -> None:
    model = stock(tmp_path, "llama")
    accelerate(model)
    mx.eval(model(TOKENS))
    gone = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert gone() is None


def test_gradients_run_through_the_original(pair: Any) -> None:
    model, plain = pair()

    def loss(m: nn.Module) -> Callable[[mx.array], mx.array]:
        h = m.model.embed_tokens(TOKENS[:, :8])
        return lambda shift: sum_of(m, h + shift)

    def sum_of(m: nn.Module, h: mx.array) -> mx.array:
        for layer in m.layers:
            h = layer(h, "causal", None)
        return mx.sin(h).sum()

    at = mx.zeros((64,))
    a, b = mx.grad(loss(model))(at), mx.grad(loss(plain))(at)
    assert mx.abs(b).max() > 0.1
    assert mx.allclose(a, b, rtol=1e-3, atol=1e-3)
    run = mx.compile(lambda h: sum_of(model, h))
    h = model.model.embed_tokens(TOKENS)
    assert mx.allclose(run(h), sum_of(plain, h), rtol=1e-3, atol=1e-2)


def test_16_bit_hidden_states_run_through_the_original(pair: Any) -> None:
    model, plain = pair()
    h = model.model.embed_tokens(TOKENS).astype(mx.bfloat16)
    ours, theirs = (m(None, input_embeddings=h) for m in (model, plain))
    assert ours.dtype == theirs.dtype
    assert mx.allclose(ours, theirs, rtol=1e-2, atol=1e-2)


def test_models_copy_and_save(pair: Any, tmp_path: Path) -> None:
    model, plain = pair("qwen3")
    assert isinstance(model.layers[0], type(plain.layers[0]))
    expected = model(TOKENS)
    twin = copy.deepcopy(model)
    for layer in model.layers:
        layer.self_attn.o_proj.scales = layer.self_attn.o_proj.scales * 0
    assert same(twin(TOKENS), expected)
    names = [name for name, _ in tree_flatten(twin.parameters())]
    assert names == [name for name, _ in tree_flatten(plain.parameters())]
    twin.save_weights(str(tmp_path / "w.safetensors"))
    plain.load_weights(str(tmp_path / "w.safetensors"))


def test_a_block_that_does_not_agree_is_left(pair: Any, tmp_path: Path) -> None:
    model = stock(tmp_path, "qwen3")

    class Odd(type(model.layers[0])):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return super().__call__(x, mask, cache) * 1.01

    Odd.__name__, Odd.__module__ = "TransformerBlock", type(model.layers[0]).__module__
    model.layers[1].__class__ = Odd
    report = accelerate(model)
    assert set(report.fused) == {"model.layers.0"}
    assert "differs from the original" in report.left["model.layers.1"]


def test_a_second_call_fuses_nothing_more(tmp_path: Path) -> None:
    model = stock(tmp_path, "llama")
    assert accelerate(model).fused
    block = model.layers[0]
    report = accelerate(model)
    assert (report.fused, report.left) == ({}, {})
    assert model.layers[0] is block


def test_kinds_of_layers_that_no_kernel_takes_are_named(tmp_path: Path) -> None:
    model = stock(tmp_path, "llama")
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda p, _: "0.mlp.up" in p)
    report = accelerate(model)
    assert "mlp.up_proj" in report.left["model.layers.0"]
    assert "model.layers.1" in report.fused


def of_records(model: nn.Module, k: str, v: str, **exact: int) -> list[Any]:
    """The caches that optiq.kv gives to a model, one for each layer."""
    layout = Layout(Format.parse(k), Format.parse(v), **exact)
    return [records(KVCache(), layout) for _ in model.layers]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each cache wrote what it holds itself, by the id of the cache."""
    count: Counter[int] = Counter()
    write = Records.write

    def counted(cache: Records, keys: mx.array, values: mx.array) -> None:
        count[id(cache)] += 1
        write(cache, keys, values)

    monkeypatch.setattr(Records, "write", counted)
    return count


def alike(got: mx.array, expected: mx.array, model: nn.Module) -> bool:
    """The last bits of a key may move one of its codes by a step, so the measure is what rounding
    the cache does at all.
    """
    rounding = mx.abs(expected - decode(model, make_prompt_cache(model))).mean()
    return bool(mx.abs(got - expected).mean() < 0.1 * rounding)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("formats", [("8g32", "4g32"), ("bf16", "5g32"), ("6g64", "bf16")])
def test_caches_of_records(
    name: str,
    formats: tuple[str, str],
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    writes: Counter[int],
) -> None:
    """Read by the block, and where all is quantized written by it from the second call on."""
    model, plain = pair(name)
    calls = Calls(model, monkeypatch)
    ours, theirs = (of_records(model, *formats) for _ in range(2))
    assert alike(decode(model, ours), decode(plain, theirs), plain)
    assert calls.count == 0
    steps = TOKENS.shape[1] - 10 + 1
    in_place = native.extension is not None and "bf16" not in formats
    for a, b in zip(ours, theirs, strict=True):
        assert a.offset == b.offset
        assert writes[id(a)] == (1 if in_place else steps)
        assert writes[id(b)] == steps


def test_a_cache_with_exact_tokens_is_written_by_itself(pair: Any, writes: Counter[int]) -> None:
    model, plain = pair()
    ours, theirs = (of_records(model, "3g32", "3g32", sink=3, recent=4) for _ in range(2))
    got, expected = decode(model, ours), decode(plain, theirs)
    assert alike(got, expected, plain)
    assert not alike(decode(plain, of_records(plain, "3g32", "3g32")), expected, plain)
    assert all(writes[id(a)] == writes[id(b)] for a, b in zip(ours, theirs, strict=True))


def test_a_cache_of_another_kind(pair: Any) -> None:
    model, plain = pair()

    class Own(KVCache):  # type: ignore[misc]
        """Somebody's subclass: only what a cache promises may be used of it."""

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            return super().update_and_fetch(keys, values * 0.5)

    ours, theirs = ([Own() for _ in model.layers] for _ in range(2))
    assert same(decode(model, ours), decode(plain, theirs))
