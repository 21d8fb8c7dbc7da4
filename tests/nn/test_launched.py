"""Blocks in few launches on a GPU, with a CPU that says it is one: what it computes is a stand-in's
(tests/ops/layer_stand_in.py), or that of the kernels themselves, emulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq.kv.model import attach
from optiq.nn.accelerate import accelerate
from optiq.nn.blocks import Runner
from optiq.nn.launched import Launched
from optiq.ops import metal, native
from optiq.ops.layer_cases import PLAIN
from tests.metal.launcher import run_layer, strides
from tests.msl.emulator import needs_emulator
from tests.nn import test_gemma4
from tests.nn.test_accelerate import TOKENS, divisible, same, stock
from tests.ops.test_on_gpu import REAL, Extension, on_device

# Family -> launches of a block where the keys are split: two more where results have norms.
FAMILIES = {"llama": 7, "qwen2": 7, "qwen3": 7, "phi3": 7, "mistral": 7, "gemma3_text": 9}
GEMMA4 = {"shared": 9, "keys are values": 9}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Extension:
    """On Metal, with counted calls. (In place of the fixture of this folder.)"""
    extension = Extension()
    on_device(monkeypatch, extension)
    return extension


def quantized(
    tmp_path: Path, name: str = "llama", dtype: mx.Dtype = mx.bfloat16, **config: Any
) -> nn.Module:
    if name in GEMMA4:
        name, config = "gemma4_text", test_gemma4.KINDS[name]
    model = stock(tmp_path, name, **config)
    model.set_dtype(dtype)
    nn.quantize(model, 64, 4, class_predicate=divisible)
    return model


def decode(model: nn.Module, prompt: int = 20, end: int = 40) -> mx.array:
    """Logits token by token."""
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, :prompt], cache=cache)]
    steps += [model(TOKENS[:, i : i + 1], cache=cache) for i in range(prompt, end)]
    return mx.concatenate(steps, axis=1)


def near(got: mx.array, expected: mx.array, dtype: mx.Dtype) -> bool:
    error = mx.abs(got.astype(mx.float32) - expected.astype(mx.float32)).max()
    return bool(error <= 8 * mx.finfo(dtype).eps * mx.abs(expected).max())


def runners(model: nn.Module) -> list[Runner]:
    return [block.runner for block in model.layers if hasattr(block, "runner")]


def calls_of_a_token(model: nn.Module, kernels: Extension) -> dict[str, int]:
    cache = make_prompt_cache(model)
    for start, end in ((0, 17), (17, 18), (18, 19)):  # a window that was exceeded is put in order
        kernels.calls.clear()
        mx.eval(model(TOKENS[:, start:end], cache=cache))
    return dict(kernels.calls)


@pytest.mark.parametrize("name", [*FAMILIES, *GEMMA4])
def test_a_token_is_one_node_a_block(tmp_path: Path, name: str, kernels: Extension) -> None:
    """And no trial: all that it launches has run before, in the model's dtype."""
    model = quantized(tmp_path, name)
    fused = len(accelerate(model).fused)
    calls = calls_of_a_token(model, kernels)
    assert fused
    assert calls["decode_layer"] == fused
    if fused == len(model.layers):
        assert "mixed_quantized_matmul" not in calls


@pytest.mark.parametrize("name", GEMMA4)
def test_logits_of_blocks_that_share(tmp_path: Path, name: str, kernels: Extension) -> None:
    """Those of the others are in test_on_gpu.py."""
    expected, model = (quantized(tmp_path, name, mx.float32) for _ in range(2))
    accelerate(model)
    got = decode(model)
    assert kernels.calls["decode_layer"] > 10
    assert same(got, decode(expected), "quantized")


@pytest.mark.parametrize("name", [*FAMILIES, *GEMMA4])
def test_plans_of_families(tmp_path: Path, name: str, kernels: Extension) -> None:
    """Of their blocks as they are loaded."""
    model = quantized(tmp_path, name)
    accelerate(model)
    decode(model, end=22)
    for runner in runners(model):
        parts = runner._parts
        assert isinstance(parts, Launched)
        layer = parts.kernels.layer
        cache = strides(mx.zeros((1, layer.kv_heads, 4096, layer.dim)))
        made = layer.native(REAL, mx.bfloat16, PLAIN)
        plan = made.plan(1, (2999, 3000, 2999), cache, cache)
        assert len(plan["launches"]) == (FAMILIES | GEMMA4)[name]


def test_records(tmp_path: Path, kernels: Extension) -> None:
    """A cache in few bits is written to, too."""
    expected, model = (attach(quantized(tmp_path), "8/4") for _ in range(2))
    accelerate(model)
    layers = len(model.layers)
    assert calls_of_a_token(model, kernels) == {"decode_layer": layers, "quantized_matmul": 1}
    got = decode(model)
    kernels.calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIQ_METAL", "0")
        assert near(got, decode(expected), mx.bfloat16)
    assert not kernels.calls


def test_a_batch(tmp_path: Path, kernels: Extension) -> None:
    expected, model = quantized(tmp_path), quantized(tmp_path)
    accelerate(model)
    outs = []
    for m in (model, expected):
        cache = make_prompt_cache(m)
        prompts = mx.concatenate([TOKENS[:, i : i + 9] for i in (0, 7, 13)])
        m(prompts, cache=cache)
        kernels.calls.clear()
        outs.append(m(prompts[:, :1], cache=cache))
        if m is model:
            assert kernels.calls["decode_layer"] >= len(model.layers)
    assert near(*outs, mx.bfloat16)


def widened(model: nn.Module) -> None:
    """A norm in float32 makes what follows it float32, and there are kernels for the next block."""
    for block in model.layers:
        norm = block.post_attention_layernorm
        norm.weight = norm.weight.astype(mx.float32)


def with_bias(model: nn.Module) -> None:
    for block in model.layers:
        block.self_attn.o_proj.bias = mx.ones(64, mx.bfloat16)


def dense(model: nn.Module) -> None:
    for block in model.layers:
        down = block.mlp.down_proj
        block.mlp.down_proj = nn.Linear(1, 1, bias=False)
        block.mlp.down_proj.weight = mx.dequantize(down.weight, down.scales, down.biases)


@pytest.mark.parametrize(
    ("name", "change", "launched"),
    [("llama", widened, 1), ("llama", with_bias, 0), ("llama", dense, 0), ("olmo2", None, 0)],
)
def test_what_the_kernels_lack_is_composed(
    tmp_path: Path,
    name: str,
    change: Callable[[nn.Module], None] | None,
    launched: int,
    kernels: Extension,
) -> None:
    expected, model = quantized(tmp_path, name), quantized(tmp_path, name)
    for m in (expected, model):
        if change:
            change(m)
    assert accelerate(model).fused
    assert calls_of_a_token(model, kernels).get("decode_layer", 0) == launched
    assert near(decode(model), decode(expected), mx.bfloat16)


def test_sums_that_saturate_are_composed(tmp_path: Path, kernels: Extension) -> None:
    """As those of Gemma 3 in float16 do in mlx-lm."""
    model = quantized(tmp_path, "gemma3_text", mx.float16)
    assert accelerate(model).fused
    assert "decode_layer" not in calls_of_a_token(model, kernels)


def test_a_traced_token_is_composed(tmp_path: Path, kernels: Extension) -> None:
    """The primitive has no gradient."""
    model = quantized(tmp_path)
    accelerate(model)
    cache = make_prompt_cache(model)
    mx.eval(model(TOKENS[:, :17], cache=cache))
    block, x = model.layers[0], mx.ones((1, 1, 64), mx.bfloat16)
    kernels.calls.clear()
    gradient = mx.grad(lambda x: block(x, None, cache[0]).sum())(x)
    assert mx.abs(gradient).max() > 0
    assert not kernels.calls["decode_layer"]


def test_a_slower_layer_is_left(
    tmp_path: Path, kernels: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the block composed of fewer kernels."""
    real = metal.slower
    monkeypatch.setattr(
        metal,
        "slower",
        lambda work, *how: "slow" if work.startswith("decode_layer") else real(work, *how),
    )
    model = quantized(tmp_path)
    assert accelerate(model).fused
    calls = calls_of_a_token(model, kernels)
    assert calls == {"mixed_quantized_matmul": 4 * len(model.layers), "quantized_matmul": 1}


@needs_emulator
@pytest.mark.parametrize("name", ["qwen3"])
def test_the_tokens_of_the_kernels(
    tmp_path: Path, name: str, kernels: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, they choose the same tokens as the blocks that they stand for."""
    assert native.extension is kernels
    kernels.faults["decode_layer"] = lambda _, layer, *step: run_layer(
        layer.native, *step, mode="fast"
    )[0]
    monkeypatch.setattr(metal, "proven", lambda op, *launch: metal.enabled())
    monkeypatch.setattr(metal, "refusal", lambda *work: "")
    expected, model = quantized(tmp_path, name), quantized(tmp_path, name)
    accelerate(model)
    chosen = []
    for m in (model, expected):
        cache, token = make_prompt_cache(m), TOKENS[:, :17]
        tokens = []
        for _ in range(4):
            logits = m(token, cache=cache)
            token = logits[:, -1:].argmax(-1)
            tokens.append(token.item())
        chosen.append(tokens)
    assert chosen[0] == chosen[1]
    assert kernels.calls["decode_layer"] >= 3 * len(model.layers)
