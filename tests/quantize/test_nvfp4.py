"""nvfp4, the optional format: bytes, rounding, layers, scores and folders against stock MLX."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import generate as stock_generate
from mlx_lm import load as stock_load
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model

import optiq
from optiq.calibration import gather
from optiq.errors import UsageError
from optiq.formats import DEFAULT_MENU, DENSE, NVFP4, UNIFORM4, Format, parse_menu
from optiq.models.roles import allowed, quantizable
from optiq.models.size import model_size
from optiq.nn.accelerate import accelerate
from optiq.nn.layers import NVFP4_ROWS
from optiq.ops import metal, native
from optiq.quality import divergence as compare
from optiq.quantize.convert import convert
from optiq.quantize.export import export
from optiq.quantize.rounding.render import render_layer
from optiq.quantize.rounding.weights import MINMAX, Rounding, round_weight
from optiq.quantize.sensitivity.fisher import score_by_fisher
from optiq.quantize.sensitivity.kl import score_by_kl
from optiq.quantize.sensitivity.weight_error import relative_error
from tests.planned import scores_of, source_of
from tests.quantize.sensitivity.cases import (
    job,
    mean_kl,
    scores,
    sequences,
    stock_quantized,
    tiny_source,
)
from tests.scored import build
from tests.tiny import tiny_folder

MENU = parse_menu("nvfp4,8g64,bf16")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
TOKENS = mx.array([[(7 * i * i + 3 * i) % 380 + 4 for i in range(40)]])

# The numbers of four bits: sign, two bits of exponent, one of mantissa (e2m1).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(byte: np.ndarray) -> np.ndarray:
    """Numbers of eight bits: sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    return np.where(byte & 128, -size, size)


def decoded(codes: mx.array, scales: mx.array) -> np.ndarray:
    """The weight that is stored, in float64, from the definition of the format."""
    octets = np.ascontiguousarray(np.array(codes)).view(np.uint8)
    nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return E2M1[nibbles] * np.repeat(e4m3(np.array(scales).astype(np.int64)), 16, axis=-1)


def test_it_is_an_option_by_name() -> None:
    assert parse_menu("4g64,nvfp4,bf16") == (Format("affine", 4, 64), DENSE, NVFP4)
    assert Format.parse(str(NVFP4)) == NVFP4
    assert NVFP4 not in DEFAULT_MENU
    assert NVFP4.config() == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    with pytest.raises(UsageError, match="bits=4 and group_size=16"):
        Format("nvfp4", 4, 32)


@settings(deadline=None)
@given(
    outer=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_bytes_are_those_of_stock_quantization(
    outer: list[int], width: int, dtype: mx.Dtype
) -> None:
    assert NVFP4.fits((*outer, width)) == (width % 32 == 0)
    shape = (*outer, 32 * width)
    w = mx.full(shape, 6, dtype)  # scale 1, code 6
    stock = mx.quantize(w, mode="nvfp4")
    assert NVFP4.nbytes(shape, dtype.size) == sum(a.nbytes for a in stock)
    assert mx.array_equal(mx.dequantize(*stock, mode="nvfp4"), w)


def test_rows_that_stock_cannot_store_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        mx.quantize(mx.ones((3, 48)), mode="nvfp4")
    with pytest.raises(UsageError, match="groups of 32"):
        round_weight(mx.ones((3, 48)), NVFP4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 96), (3, 8, 64)])
def test_rounding_is_stock_and_takes_the_nearest_code(
    shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    w = (0.1 * mx.random.normal(shape, key=mx.random.key(0))).astype(dtype)
    searching = Rounding("search", {"a": mx.ones(shape[-1])})
    codes, scales, biases = round_weight(w, NVFP4, searching, "a")
    assert biases is None
    for got, stock in zip((codes, scales), mx.quantize(w, mode="nvfp4"), strict=True):
        assert mx.array_equal(got, stock)
    exact = np.array(w.astype(mx.float32), dtype=np.float64)
    error = np.abs(decoded(codes, scales) - exact)
    steps = np.repeat(e4m3(np.array(scales).astype(np.int64)), 16, axis=-1)
    best = np.abs(steps[..., None] * E2M1 - exact[..., None]).min(axis=-1)
    assert (error <= best + 1e-6 * steps).all()
    # A scale is the largest weight of its group over 6, rounded to three bits of mantissa.
    largest = np.abs(exact).reshape(*shape[:-1], -1, 16).max(axis=-1)
    assert (np.abs(6 * steps[..., ::16] - largest) <= largest / 16 + 6 * 2.0**-10).all()


def test_a_large_weight_is_rounded_in_parts() -> None:
    w = mx.random.normal((4, 1024, 1024), key=mx.random.key(0))
    mx.eval(w)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    rounded = round_weight(w, NVFP4)[:2]
    mx.eval(rounded)
    assert mx.get_peak_memory() - before < 40 * w.size  # stock: 77 bytes a weight at once
    for got, stock in zip(rounded, mx.quantize(w, mode="nvfp4"), strict=True):
        assert mx.array_equal(got, stock)


def layer(kind: str) -> tuple[nn.Module, mx.array, tuple[Any, ...]]:
    """A dense layer, its weight, and what it is called with: few rows, and many."""
    mx.random.seed(0)
    many = mx.random.normal((2, NVFP4_ROWS + 1, 64))
    calls: tuple[Any, ...] = ((many[:1, :3],), (many,))
    if kind == "linear":
        made: nn.Module = nn.Linear(64, 40, bias=True)
    elif kind == "experts":
        made = SwitchLinear(64, 40, 3, bias=True)
        made.bias = mx.random.normal(made.bias.shape)
        picks = mx.random.randint(0, 3, (2, NVFP4_ROWS + 1, 2))
        calls = tuple(
            (x[0][..., None, None, :], picks[: len(x[0]), : x[0].shape[1]]) for x in calls
        )
    else:
        made = nn.Embedding(40, 64)
    return made, made.weight, calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "experts", "head"])
def test_layers_multiply_with_the_stored_weight(kind: str, dtype: mx.Dtype) -> None:
    dense, weight, calls = layer(kind)
    dense.weight = weight.astype(dtype)
    stored = decoded(*round_weight(dense.weight, NVFP4)[:2])
    ours = render_layer(dense, NVFP4, MINMAX, "a")
    for call in calls:
        x = np.array(call[0], dtype=np.float64)
        if kind == "experts":
            got = ours(*call)
            expected = np.einsum("btxi,btkoi->btko", x[..., 0, :, :], stored[np.array(call[1])])
            got, expected = got[..., 0, :], expected + np.array(dense.bias)[np.array(call[1])]
        else:
            got = ours.as_linear(*call) if kind == "head" else ours(*call)
            expected = x @ stored.T + (np.array(dense.bias) if kind == "linear" else 0)
        assert got.dtype == mx.float32
        assert np.abs(np.array(got) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_lookups_are_exact() -> None:
    dense = nn.Embedding(40, 64)
    ids = mx.array([[3, 39, 0]])
    got = render_layer(dense, NVFP4, MINMAX, "a")(ids)
    stored = decoded(*round_weight(dense.weight, NVFP4)[:2])
    assert np.array_equal(np.array(got), stored[np.array(ids)].astype(np.float32))


@pytest.mark.parametrize("name", ["llama untied", "qwen3_moe", "gemma3_text"])
def test_models_run_as_stock_does(tmp_path: Path, name: str) -> None:
    path = tiny_source(tmp_path, name).path
    expected, model = (load_model(path)[0] for _ in range(2))
    for m in (expected, model):
        # Stock looks embeddings up in bfloat16, so that all of the model would run in it.
        nn.quantize(m, mode="nvfp4", class_predicate=lambda p, m: hasattr(m, "to_quantized")
                    and "embed" not in p)  # fmt: skip
    report = accelerate(model)
    quantized = [p for p, m in model.named_modules() if getattr(m, "mode", None) == "nvfp4"]
    assert quantized
    assert set(quantized) <= set(report.swapped)
    assert "in nvfp4" in report.left["model.layers.0"]
    got, logits = model(TOKENS), expected(TOKENS)
    assert mx.abs(got - logits).max().item() <= 1e-3 * mx.abs(logits).max().item()


def test_experts_with_a_global_scale_are_left() -> None:
    model = nn.Module()
    model.up = SwitchLinear(64, 32, 2, bias=False).to_quantized(16, 4, "nvfp4", global_scale=True)
    assert accelerate(model).left == {"up": "mode 'nvfp4' has no native kernel"}


def test_on_a_gpu_stock_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.up = nn.Linear(64, 32).to_quantized(16, 4, "nvfp4")
    monkeypatch.setattr(native, "on_cpu", lambda: False)
    monkeypatch.setattr(metal, "enabled", lambda: native.extension)
    assert accelerate(model).left == {"up": "mode 'nvfp4' has no native kernel"}


@pytest.mark.parametrize("name", ["llama untied", "qwen3_moe"])
def test_kl_scores_equal_naive_full_forwards(tmp_path: Path, name: str) -> None:
    source, texts = tiny_source(tmp_path, name), sequences(14, 23)
    stock, _ = load_model(source.path)
    work = job(load_model(source.path)[0], texts, MENU)
    score_by_kl(work)
    found = scores(work)
    chosen = [m for m in quantizable(stock) if NVFP4 in allowed(m, MENU)]
    assert {m.path for m in chosen} == {path for path, fmt in found if fmt == "nvfp4"}
    for m in chosen:
        if m.role.value == "embedding":  # stock would run in bfloat16
            continue
        expected = mean_kl(stock, stock_quantized(source, {m.path: NVFP4}), texts)
        assert found[m.path, "nvfp4"] == pytest.approx(expected, rel=1e-3, abs=1e-6), m.path


@pytest.mark.parametrize("name", ["llama tied", "llama untied"])
def test_fisher_scores_agree_with_exact_ones(tmp_path: Path, name: str) -> None:
    source, texts = tiny_source(tmp_path, name), sequences(*[30] * 12)
    exact, estimate = (job(load_model(source.path)[0], texts, [NVFP4]) for _ in range(2))
    score_by_kl(exact)
    score_by_fisher(estimate)
    x, y = scores(estimate), scores(exact)
    assert x.keys() == y.keys()
    ratios = np.array([x[key] / y[key] for key in y])
    assert 0.7 < np.median(ratios) < 1.4
    if "lm_head" in dict(y.keys()):
        assert x["lm_head", "nvfp4"] == pytest.approx(y["lm_head", "nvfp4"], rel=1e-4)


@pytest.mark.parametrize("variant", ["llama", "llama-bf16", "qwen3_moe", "gemma3_text"])
def test_folders_equal_quantizing_in_memory(tmp_path: Path, variant: str) -> None:
    source = source_of(tmp_path, variant)
    given = scores_of(source)
    modules = (
        replace(s, scores={**s.scores, NVFP4: s.scores[UNIFORM4]}) if UNIFORM4 in s.scores else s
        for s in given.modules
    )
    given = replace(given, modules=tuple(modules))
    plan = build(given, "5.3bpw", MENU)
    formats = plan.quantization()
    assert {NVFP4.bits, 8} <= {m.format.bits for m in plan.modules}
    export(source, plan, tmp_path / "out", scores=given)

    got, _ = stock_load(str(tmp_path / "out"))
    expected, _ = load_model(source.path)
    nn.quantize(expected, class_predicate=lambda p, m: formats.get(p, False))
    stored = dict(tree_flatten(got.parameters()))
    for name, array in tree_flatten(expected.parameters()):
        assert mx.array_equal(stored.pop(name), array), name
    assert not stored
    assert mx.array_equal(got(TOKENS), expected(TOKENS))
    assert model_size(got) == (plan.nbytes, plan.bpw)


def test_a_conversion_with_nvfp4_in_the_menu(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model", dtype="bfloat16", tie_word_embeddings=False)
    out = tmp_path / "out"
    result = convert(
        folder, out, size="5.2bpw", formats="nvfp4,8g64,bf16", tokens=320, held_out_tokens=320,
        progress=False,
    )  # fmt: skip
    chosen = [m.module.path for m in result.plan.modules if m.format == NVFP4]
    assert chosen
    tensors = mx.load(str(out / "model.safetensors"))
    assert sum(t.nbytes for t in tensors.values()) == result.nbytes <= result.plan.budget
    config = json.loads((out / "config.json").read_text())["quantization"]
    for path in chosen:
        assert config[path] == NVFP4.config()
        assert tensors[f"{path}.scales"].dtype == mx.uint8
        assert f"{path}.biases" not in tensors
    assert "nvfp4" in (out / "optiq" / "report.html").read_text()

    stock, tokenizer = stock_load(str(out))
    assert isinstance(stock_generate(stock, tokenizer, "The river", max_tokens=4), str)
    ours, _ = optiq.load(str(out))
    held_out = gather(tokenizer, None, "heldout", 320, 0).sequences
    original, _ = load_model(folder)
    accelerate(original)
    again = compare.measure(original, {"out": ours}, held_out, progress=False)["out"]
    assert again.kl.mean == pytest.approx(result.kl, rel=1e-6)
    # One module more in nvfp4 in place of 8 bits costs KL: the whole in nvfp4 costs most.
    coarse = convert(folder, tmp_path / "small", size="4.6bpw", formats=[NVFP4, DENSE],
                     scores=out / "optiq" / "sensitivity.json", held_out_tokens=320,
                     tokens=320, progress=False)  # fmt: skip
    assert {str(m.format) for m in coarse.plan.modules} == {"nvfp4"}
    assert coarse.kl is not None
    assert result.kl is not None
    assert coarse.kl > result.kl


def test_small_weights_lose_precision_and_then_everything() -> None:
    """A scale cannot be finer than 2^-9, whatever the weights: docs/how-it-works.md says so."""
    dense, errors = nn.Linear(256, 64, bias=False), []
    w = mx.random.normal((64, 256), key=mx.random.key(1))
    for factor in (1, 0.02, 0.01, 0.001):
        dense.weight = factor * w
        errors.append(relative_error(dense, render_layer(dense, NVFP4, MINMAX, "a")))
    assert errors[0] < 0.011
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(1, abs=1e-6)
