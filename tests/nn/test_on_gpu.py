"""`accelerate` on a GPU, with a CPU that says it is one, as in tests/ops/test_on_gpu.py."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from optiq.models.roles import blocks
from optiq.nn.accelerate import accelerate
from optiq.ops import native
from tests.nn.test_accelerate import FUSED, TOKENS, divisible, leaves, same, stock
from tests.ops.test_on_gpu import Extension


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Extension:
    """On Metal, with counted calls. (In place of the fixture of this folder.)"""
    extension = Extension()
    monkeypatch.setattr(native, "device", lambda: "metal")
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.delenv("OPTIQ_METAL", raising=False)
    return extension


def quantized(tmp_path: Path, name: str = "llama", dtype: mx.Dtype = mx.float32) -> nn.Module:
    model = stock(tmp_path, name)
    model.set_dtype(dtype)
    nn.quantize(model, 64, 4, class_predicate=divisible)
    return model


def decode(model: nn.Module, prompt: int = 20) -> mx.array:
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, :prompt], cache=cache)]
    steps += [model(TOKENS[:, i : i + 1], cache=cache) for i in range(prompt, TOKENS.shape[1])]
    return mx.concatenate(steps, axis=1)


@pytest.mark.parametrize("name", FUSED)
def test_logits_are_those_of_the_stock_model(tmp_path: Path, name: str, kernels: Extension) -> None:
    expected, model = quantized(tmp_path, name), quantized(tmp_path, name)
    report = accelerate(model)
    swapped = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    assert report.swapped == [p for p, m in leaves(expected).items() if type(m) in swapped]
    assert same(model(TOKENS), expected(TOKENS), "quantized")
    assert same(decode(model), decode(expected), "quantized")


def test_a_token_takes_four_products_a_block(tmp_path: Path, kernels: Extension) -> None:
    model = quantized(tmp_path)
    assert set(accelerate(model).fused) == set(blocks(model))
    cache = make_prompt_cache(model)
    kernels.calls.clear()
    mx.eval(model(TOKENS[:, :17], cache=cache))
    assert not kernels.calls
    mx.eval(model(TOKENS[:, 17:18], cache=cache))
    # q, k, v; the output; gate, up; down; and the model's head.
    assert kernels.calls == {
        "mixed_quantized_matmul": 4 * len(model.layers),
        "quantized_matmul": 1,
    }


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtypes_stay(tmp_path: Path, dtype: mx.Dtype, kernels: Extension) -> None:
    model = quantized(tmp_path, dtype=dtype)
    before = tree_map(lambda a: a.dtype, model.parameters())
    assert accelerate(model).fused
    assert tree_map(lambda a: a.dtype, model.parameters()) == before
    cache = make_prompt_cache(model)
    assert model(TOKENS[:, :3], cache=cache).dtype == dtype
    assert cache[0].keys.dtype == dtype


def test_dense_layers_and_experts_stay(tmp_path: Path, kernels: Extension) -> None:
    why = "on a GPU stock MLX runs dense layers and experts"
    model = stock(tmp_path, "llama")
    report = accelerate(model)
    assert (report.swapped, report.fused) == ([], {})
    assert type(model.model.embed_tokens) is nn.Embedding
    assert {report.left[p] for p in leaves(model) if p in report.left} == {why}
    assert {report.left[p] for p in blocks(model)} == {
        "no quantized projections share an input, so a GPU gains nothing"
    }
    report = accelerate(quantized(tmp_path, "qwen3_moe"))
    experts = [p for p in report.left if "switch_mlp" in p]
    assert len(experts) == 6
    assert {report.left[p] for p in experts} == {why}
    assert set(report.fused.values()) == {"attention"}


@pytest.mark.parametrize("how", ["another GPU", "switched off", "failed trial", "no extension"])
def test_without_proven_kernels_all_stays(
    tmp_path: Path, how: str, kernels: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tmp_path)
    if how == "another GPU":
        monkeypatch.setattr(native, "device", lambda: "cuda")
    elif how == "switched off":
        monkeypatch.setenv("OPTIQ_METAL", "0")
    elif how == "failed trial":
        kernels.faults["quantized_matmul"] = lambda y, *a, **k: y * 2
    else:
        monkeypatch.setattr(native, "extension", None)
    if how == "failed trial":
        with pytest.warns(RuntimeWarning, match="does not agree"):
            report = accelerate(model)
    else:
        report = accelerate(model)
    assert (report.swapped, report.fused) == ([], {})
    assert set(report.left.values()) == {"the default device is a GPU, where stock MLX runs it"}


def test_a_residual_stream_that_saturates_does_so_fused(tmp_path: Path, kernels: Extension) -> None:
    """Gemma 3 in float16 has sums beyond its range, where mlx-lm clips them."""
    models = [quantized(tmp_path, "gemma3_text", mx.float16) for _ in range(2)]
    assert accelerate(models[0]).fused
    x = mx.full((1, 5, 64), 65000, dtype=mx.float16)
    outs = []
    for m in models:
        block = m.layers[0]
        norm = block.post_attention_layernorm
        norm.weight = mx.full(norm.weight.shape, 1000, dtype=mx.float16)
        outs.append(block(x, "causal", None))
    assert mx.isfinite(outs[1]).all()
    assert (mx.abs(outs[1]) == mx.finfo(mx.float16).max).any()
    assert mx.allclose(outs[0], outs[1], rtol=1e-2)
