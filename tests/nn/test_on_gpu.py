"""`accelerate` on a GPU, with a CPU that says it is one, as in tests/ops/test_on_gpu.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from optiq.kv.model import attach
from optiq.models.roles import blocks
from optiq.nn.accelerate import Accelerated, accelerate
from optiq.ops import native
from tests.nn.test_accelerate import FUSED, TOKENS, divisible, leaves, same, stock
from tests.ops.test_on_gpu import HOW, Extension, Fault, broken, on_device


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Extension:
    """On Metal, with counted calls. (In place of the fixture of this folder.)"""
    extension = Extension()
    on_device(monkeypatch, extension)
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
    swapped = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    assert report.swapped == [p for p, m in leaves(expected).items() if type(m) in swapped]
    assert same(model(TOKENS), expected(TOKENS), "quantized")
    assert same(decode(model), decode(expected), "quantized")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_several_tokens_take_four_products_a_block(
    tmp_path: Path, dtype: mx.Dtype, kernels: Extension
) -> None:
    """And no trial, once so many have run. A token alone takes less (test_launched.py)."""
    model = quantized(tmp_path, dtype=dtype)
    assert set(accelerate(model).fused) == set(blocks(model))
    cache = make_prompt_cache(model)
    mx.eval(model(TOKENS[:, :3], cache=cache))
    kernels.calls.clear()
    mx.eval(model(TOKENS[:, 3:6], cache=cache))
    # q, k, v; the output; gate, up; down; and the model's head.
    assert kernels.calls == {
        "mixed_quantized_matmul": 4 * len(model.layers),
        "quantized_matmul": 1,
    }


def test_a_token_is_rehearsed_with_the_dtypes_and_the_cache_that_it_meets(
    tmp_path: Path, kernels: Extension
) -> None:
    """A norm in float32 makes the activations after it float32."""
    model = attach(quantized(tmp_path, dtype=mx.float16), "8/4")
    norm = model.layers[1].post_attention_layernorm
    norm.weight = norm.weight.astype(mx.float32)
    accelerate(model)
    cache = make_prompt_cache(model)
    mx.eval(model(TOKENS[:, :17], cache=cache))
    kernels.calls.clear()
    mx.eval(model(TOKENS[:, 17:18], cache=cache))
    assert kernels.calls == {
        "decode_layer": 1,  # the first block, which the norm does not concern
        "mixed_quantized_matmul": 4,
        "quantized_matmul": 1,
        "quantized_attention": 1,
        "quantize_kv": 2,
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


def test_dense_layers_stay(tmp_path: Path, kernels: Extension) -> None:
    why = "on a GPU stock MLX runs dense layers and those of heads"
    model = stock(tmp_path, "llama")
    report = accelerate(model)
    assert (report.swapped, report.fused) == ([], {})
    assert type(model.model.embed_tokens) is nn.Embedding
    assert {report.left[p] for p in leaves(model) if p in report.left} == {why}
    assert {report.left[p] for p in blocks(model)} == {
        "no quantized projections share an input, so a GPU gains nothing"
    }


def experts(report: Accelerated) -> list[str]:
    return [path for path in report.swapped if "switch_mlp" in path]


def test_experts_of_a_prompt(tmp_path: Path, kernels: Extension) -> None:
    """They are ours where mlx-lm sorts them, from 64 rows on. Those of a token are stock."""
    expected, model = (quantized(tmp_path, "qwen3_moe") for _ in range(2))
    report = accelerate(model)
    assert len(experts(report)) == 6
    assert set(report.fused.values()) == {"attention"}
    model(TOKENS)  # new in an answer: products with as many rows for each expert
    sorted_rows: list[int] = []

    def noted(y: mx.array, x: mx.array, *args: Any, **how: Any) -> mx.array:
        if how.get("sorted_indices"):
            sorted_rows.append(len(x))
        return y

    kernels.faults["quantized_matmul"] = noted
    assert same(model(TOKENS), expected(TOKENS), "quantized")
    assert sorted_rows == [2 * TOKENS.size] * 6
    assert same(decode(model), decode(expected), "quantized")
    assert len(sorted_rows) == 6  # of a prompt of 20 tokens there are 40


@pytest.mark.parametrize(
    ("how", "up_to", "swapped"), [("raises in eval", 0, 0), *((how, 128, 6) for how in HOW)]
)
def test_experts_that_fail_are_stock_with_one_warning(
    tmp_path: Path, how: str, up_to: int, swapped: int, kernels: Extension
) -> None:
    """All of them, or those with more rows than are tried before the first token."""

    def fault(y: mx.array, x: mx.array, *args: Any, **given: Any) -> mx.array:
        return broken(how)(y) if given.get("sorted_indices") and len(x) > up_to else y

    expected, model = (quantized(tmp_path, "qwen3_moe") for _ in range(2))
    kernels.faults["quantized_matmul"] = fault
    prompt = mx.concatenate([TOKENS, TOKENS], axis=1)

    def answer() -> mx.array:
        assert len(experts(accelerate(model, blocks=False))) == swapped
        return model(prompt)

    with pytest.warns(RuntimeWarning, match="quantized_matmul is left alone") as warned:
        got = answer()
    assert len(warned) == 1
    again = silently(lambda model: model(prompt), model)
    assert all(same(logits, expected(prompt), "quantized") for logits in (got, again))


@pytest.mark.parametrize("how", ["another GPU", "switched off", "no extension"])
def test_without_kernels_all_stays(
    tmp_path: Path, how: str, kernels: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tmp_path)
    if how == "another GPU":
        monkeypatch.setattr(native, "device", lambda: "cuda")
    elif how == "switched off":
        monkeypatch.setenv("OPTIQ_METAL", "0")
    else:
        monkeypatch.setattr(native, "extension", None)
    report = accelerate(model)
    assert (report.swapped, report.fused) == ([], {})
    assert set(report.left.values()) == {"the default device is a GPU, where stock MLX runs it"}


def both(kernels: Extension, fault: Fault) -> None:
    """The fault in the products of one weight and of several."""
    kernels.faults |= {"quantized_matmul": fault, "mixed_quantized_matmul": fault}


def silently(decode: Callable[[nn.Module], mx.array], model: nn.Module) -> mx.array:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode(model)


@pytest.mark.parametrize("how", HOW)
def test_where_all_fails_the_model_stays_stock_with_one_warning(
    tmp_path: Path, how: str, kernels: Extension
) -> None:
    expected, model = quantized(tmp_path), quantized(tmp_path)
    both(kernels, broken(how))
    with pytest.warns(RuntimeWarning, match="Metal kernel for quantized_matmul is left alone") as w:
        report = accelerate(model)
    assert len(w) == 1
    assert same(silently(decode, model), decode(expected), "quantized")
    assert (report.swapped, report.fused) == ([], {})
    assert set(report.left) == {*leaves(model)} & {*report.left} | {*blocks(model)}
    assert all("Metal kernel" in reason for reason in report.left.values())


@pytest.mark.parametrize("how", HOW)
def test_a_width_that_fails_leaves_its_layers_only(
    tmp_path: Path, how: str, kernels: Extension
) -> None:
    """Three bits in one block, four in the other; the launches are those of the model's dtype."""

    def mixed() -> nn.Module:
        model = stock(tmp_path, "llama")
        model.set_dtype(mx.bfloat16)

        def width(path: str, module: nn.Module) -> bool | dict[str, int]:
            bits = 3 if "layers.0" in path else 4
            return divisible(path, module) and {"group_size": 64, "bits": bits}

        nn.quantize(model, class_predicate=width)
        return model

    def three(y: Any, *args: Any, **kwargs: Any) -> Any:
        parts = args[1] if isinstance(y, list) else [(*args[1:4], *args[5:])]
        return broken(how)(y) if any(part[4] == 3 for part in parts) else y

    expected, model = mixed(), mixed()
    both(kernels, three)
    with pytest.warns(RuntimeWarning, match="bfloat16, 1, .*64 3") as warned:
        report = accelerate(model)
    assert len(warned) == 1
    got, logits = (silently(decode, m).astype(mx.float32) for m in (model, expected))
    assert mx.abs(got - logits).max() <= 8 * mx.finfo(mx.bfloat16).eps * mx.abs(logits).max()
    assert set(report.fused) == {"model.layers.1"}
    assert not any("layers.0" in path for path in report.swapped)
    assert any("layers.1" in path for path in report.swapped)


@pytest.mark.parametrize("how", HOW)
def test_rows_that_are_new_in_an_answer_may_fail(
    tmp_path: Path, how: str, kernels: Extension
) -> None:
    """As when a draft is verified: three tokens at once after some alone."""
    both(kernels, lambda y, x, *a, **k: broken(how)(y) if x.size // x.shape[-1] == 3 else y)
    expected, model = quantized(tmp_path), quantized(tmp_path)
    assert accelerate(model).fused
    steps = [(0, 20), (20, 21), (21, 24), (24, 27), (27, 28)]

    def answer(model: nn.Module) -> mx.array:
        cache = make_prompt_cache(model)
        parts = []
        for start, end in steps:
            parts.append(model(TOKENS[:, start:end], cache=cache))
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=1)

    with pytest.warns(RuntimeWarning, match="quantized_matmul is left alone") as warned:
        got = answer(model)
    assert len(warned) == 1
    assert same(got, answer(expected), "quantized")


def test_what_raises_in_the_middle_of_an_answer_is_stock_from_then_on(
    tmp_path: Path, kernels: Extension
) -> None:
    expected, model = quantized(tmp_path), quantized(tmp_path)
    accelerate(model)
    decode(model)
    kernels.calls.clear()

    def late(y: Any, *args: Any, **kwargs: Any) -> Any:
        return broken("raises")(y) if sum(kernels.calls.values()) > 20 else y

    both(kernels, late)
    with pytest.warns(RuntimeWarning, match="no such function") as warned:
        assert same(decode(model), decode(expected), "quantized")
    assert len(warned) == 1
    decode(model)  # the launches of the prompt also
    kernels.calls.clear()
    decode(model)
    assert not kernels.calls["mixed_quantized_matmul"]


def test_a_layer_is_wrong_at_its_own_size_only(tmp_path: Path, kernels: Extension) -> None:
    """And for one row of x, where the small case of its trial is right."""
    expected, model = quantized(tmp_path), quantized(tmp_path)
    both(kernels, lambda y, x, *a, **k: broken("wrong")(y) if x.size < 1000 else y)
    with pytest.warns(RuntimeWarning, match="differs from stock MLX") as warned:
        report = accelerate(model)
    assert len(warned) == 1
    assert (report.swapped, report.fused) == ([], {})
    assert same(decode(model), decode(expected), "quantized")


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
