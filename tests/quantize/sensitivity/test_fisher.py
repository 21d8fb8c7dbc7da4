"""Fisher scores against whole-model autodiff, finite differences, their formula and exact KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from optiq import ops
from optiq.errors import SensitivityError
from optiq.formats import Format
from optiq.models.roles import Module, Role, quantizable
from optiq.quantize.sensitivity import fisher
from optiq.quantize.sensitivity.fisher import scorable, score_by_fisher
from optiq.quantize.sensitivity.job import Job
from optiq.quantize.sensitivity.kl import score_by_kl
from tests.architectures import construct
from tests.families.table import family_folder
from tests.quantize.replay.test_replay import Toy
from tests.quantize.sensitivity.cases import (
    MODELS,
    job,
    log_probabilities,
    mean_kl,
    randomized,
    scores,
    sequences,
    stock_quantized,
    tiny_source,
)

TEXT = sequences(24)[0]
G32 = [Format("affine", 8, 32)]


def log_likelihood(model: nn.Module, tokens: list[int], seed: int, cached: bool) -> mx.array:
    """sum_t log p(y_t) with the very labels that the score of sequence 0 draws."""
    _, draw = mx.random.split(mx.random.split(mx.random.key(seed), 1)[0])
    cache = {"cache": make_prompt_cache(model)} if cached else {}
    logits = model(mx.array([tokens]), **cache)[0].astype(mx.float32)
    labels = ops.categorical(mx.stop_gradient(logits), draw)
    picked = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return mx.sum(picked - mx.logsumexp(logits, axis=-1))


def found_gradients(work: Job, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The weight gradients that scoring one sequence computes, by module path."""
    found: dict[str, np.ndarray] = {}
    part, gradient_of = fisher._Batch._add_smooth_part, fisher.weight_gradient

    def keep(batch: Any, module: Module, layer: nn.Module, calls: Any) -> None:
        (gradient,) = (gradient_of(layer, of) for of in calls)
        if module.role is Role.EMBEDDING:  # only the rows of the text's tokens are given
            full = np.zeros(module.shape)
            full[sorted(set(work.sequences[0]))] = gradient
            gradient = full
        found[module.path] = np.array(gradient)
        part(batch, module, layer, calls)

    monkeypatch.setattr(fisher._Batch, "_add_smooth_part", keep)
    score_by_fisher(work)
    return found


def check_against_autodiff(
    build: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    text: list[int] = TEXT,
    cached: bool = False,
) -> None:
    stock = build()
    paths = [m.path for m in quantizable(stock) if m.role is not Role.HEAD]

    def likelihood(weights: dict[str, Any]) -> mx.array:
        stock.update(weights)
        return log_likelihood(stock, text, 5, cached)

    parameters = dict(tree_flatten(stock.parameters()))
    picked = {f"{path}.weight": parameters[f"{path}.weight"] for path in paths}
    gradients = dict(tree_flatten(mx.grad(likelihood)(tree_unflatten(list(picked.items())))))

    work = job(build(), [text], G32, seed=5)
    called = scorable(work)
    work.formats = {path: formats for path, formats in work.formats.items() if path in called}
    found = found_gradients(work, monkeypatch)
    scored = {m.path for m in work.modules if work.rounded(m)}
    assert found.keys() >= scored & set(paths)
    for path in set(paths) - called:
        assert not mx.any(gradients[f"{path}.weight"])
    for m in work.modules:
        if m.role is Role.HEAD or m.tied:  # the head's own part is scored exactly
            continue
        if m.path not in scored:
            continue
        expected = np.array(gradients[f"{m.path}.weight"])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[m.path], expected, 0, 2e-4 * scale, err_msg=m.path)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_whole_model_autodiff(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_source(tmp_path, name).path
    check_against_autodiff(lambda: load_model(path)[0], monkeypatch)


@pytest.mark.parametrize(
    "name", ["gemma4_text", "deepseek_v3", "lfm2", "gpt_oss", "qwen3_next", "mamba2"]
)
def test_gradients_in_other_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_autodiff(lambda: randomized(lambda: construct(name)), monkeypatch)


@pytest.mark.parametrize("name", ["gemma3n", "afm7"])
def test_gradients_through_the_cache_of_another_block(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = family_folder(tmp_path, name)
    check_against_autodiff(lambda: load_model(path)[0], monkeypatch, cached=True)


def test_gradients_of_looped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_autodiff(lambda: randomized(Toy), monkeypatch, [t % 64 for t in TEXT])


def test_gradients_equal_finite_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path, "llama untied")
    found = found_gradients(job(load_model(source.path)[0], [TEXT], G32, seed=3), monkeypatch)
    stock, _ = load_model(source.path)
    # labels of the unperturbed model, then float64 likelihoods of perturbed ones
    _, draw = mx.random.split(mx.random.split(mx.random.key(3), 1)[0])
    labels = np.array(ops.categorical(stock(mx.array([TEXT]))[0], draw))

    def likelihood() -> float:
        return float(log_probabilities(stock, TEXT)[np.arange(len(TEXT)), labels].sum())

    for path in ("model.embed_tokens", "model.layers.0.self_attn.v_proj",
                 "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):  # fmt: skip
        module = dict(stock.named_modules())[path]
        weight, step = module.weight, 2e-3
        toward = mx.random.normal(weight.shape, key=mx.random.key(1))
        toward = toward * mx.array(found[path] != 0)
        values = []
        for sign in (1, -1):
            module.weight = weight + sign * step * toward
            values.append(likelihood())
        module.weight = weight
        slope = (values[0] - values[1]) / (2 * step)
        expected = float((found[path].astype(np.float64) * np.array(toward)).sum())
        assert slope == pytest.approx(expected, rel=0.02, abs=0.05), path


def test_score_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path, "llama untied")
    work = job(load_model(source.path)[0], [TEXT])
    found = found_gradients(work, monkeypatch)
    stock = dict(load_model(source.path)[0].named_modules())
    table = scores(work)
    for m in work.modules:
        if m.role is Role.HEAD:
            continue
        w = stock[m.path].weight
        for fmt in work.rounded(m):
            rounded = mx.dequantize(*mx.quantize(w, fmt.group_size, fmt.bits),
                                    group_size=fmt.group_size, bits=fmt.bits)  # fmt: skip
            change = np.array(rounded, dtype=np.float64) - np.array(w, dtype=np.float64)
            rows = (found[m.path].astype(np.float64) * change).sum(axis=-1)
            expected = 0.5 * (rows**2).sum() / len(TEXT)
            assert table[m.path, str(fmt)] == pytest.approx(expected, rel=1e-3), (m.path, fmt)


def test_head_is_exact(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama untied")
    texts = sequences(14, 23)
    work = job(load_model(source.path)[0], texts)
    score_by_fisher(work)
    stock, _ = load_model(source.path)
    for fmt in work.rounded(work.modules[-1]):
        expected = mean_kl(stock, stock_quantized(source, {"lm_head": fmt}), texts)
        assert scores(work)["lm_head", str(fmt)] == pytest.approx(expected, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("name", ["llama tied", "llama untied", "gemma3_text"])
def test_agrees_with_exact_kl(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    texts = sequences(*[30] * 12)
    menu = [Format("affine", 4, 64), Format("affine", 8, 64)]
    exact = job(load_model(source.path)[0], texts, menu)
    score_by_kl(exact)
    estimate = job(load_model(source.path)[0], texts, menu)
    score_by_fisher(estimate)
    x, y = scores(estimate), scores(exact)
    assert x.keys() == y.keys()
    pairs = np.array([[x[key], y[key]] for key in y if key[1] == "8g64"])
    ratios = pairs[:, 0] / pairs[:, 1]
    assert 0.85 < np.median(ratios) < 1.15  # 8 bits are a small change: the quadratic is exact
    assert ratios.min() > 0.5
    assert ratios.max() < 2
    ranks = np.array([np.argsort(np.argsort(pairs[:, i])) for i in (0, 1)])
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_router_and_experts_are_scored(tmp_path: Path) -> None:
    work = job(load_model(tiny_source(tmp_path, "qwen3_moe").path)[0], sequences(20, 30))
    score_by_fisher(work)
    table = scores(work)
    assert all(table[m.path, str(fmt)] > 0 for m in work.modules for fmt in work.rounded(m))


def test_batches_do_not_change_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, texts = tiny_source(tmp_path, "llama tied").path, sequences(14, 23, 9)
    together = job(load_model(path)[0], texts)
    score_by_fisher(together)
    monkeypatch.setattr("optiq.quantize.sensitivity.job.BATCH_TOKENS", 1)
    monkeypatch.setattr(fisher, "GRADIENT_BYTES", 1)
    apart = job(load_model(path)[0], texts)
    score_by_fisher(apart)
    assert scores(apart) == pytest.approx(scores(together), rel=1e-4)


def test_layers_that_are_never_called_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    model.spare = nn.Linear(32, 32)
    work = job(model, [[t % 64 for t in TEXT]], G32)
    with pytest.raises(SensitivityError, match=r"spare .* --sensitivity kl"):
        score_by_fisher(work)
