"""KL scores against full forward passes of stock models with one module quantized by hand."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq.errors import SensitivityError, SourceError
from optiq.formats import DENSE, UNIFORM4, Format
from optiq.models.roles import Role, allowed, quantizable
from optiq.quantize.replay import logits
from optiq.quantize.sensitivity import kl
from optiq.quantize.sensitivity.kl import score_by_kl
from tests.quantize.sensitivity.cases import (
    MENU,
    MODELS,
    calibration,
    job,
    mean_kl,
    measure,
    scores,
    sequences,
    stock_quantized,
    tiny_source,
)

TEXTS = sequences(14, 23)


@pytest.mark.parametrize("name", MODELS)
def test_equals_naive_full_forwards(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    stock, _ = load_model(source.path)
    work = job(load_model(source.path)[0], TEXTS)
    score_by_kl(work)
    found = scores(work)
    expected = {
        (m.path, str(fmt)): mean_kl(stock, stock_quantized(source, {m.path: fmt}), TEXTS)
        for m in quantizable(stock)
        for fmt in allowed(m, MENU)
        if fmt != DENSE
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Stock multiplies with float32 activations, optiq with 16-bit fixed point: logits move by
        # some 1e-4 of the largest, and a KL by that times its root.
        slack = 1e-6 + 5e-4 * value**0.5
        assert found[key] == pytest.approx(value, abs=slack, rel=1e-4), key


@pytest.mark.parametrize("name", MODELS)
def test_block_executions_and_exact_restore(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path, name)
    work = job(load_model(source.path)[0], TEXTS)
    model, layers = work.model, len(work.model.layers)
    replays: list[kl.Replay] = []

    class Watched(kl.Replay):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            replays.append(self)

    monkeypatch.setattr(kl, "Replay", Watched)
    before = dict(model.named_modules())
    weights = dict(tree_flatten(model.parameters()))
    logits = np.array(model(mx.array([TEXTS[0]])))
    score_by_kl(work)

    probes = [(m, fmt) for m in work.modules for fmt in work.rounded(m)]
    runs = sum(
        0 if m.role.value == "head" else layers - (0 if m.block is None else m.block)
        for m, _ in probes
    )
    # What a router chooses is seen by a run of its block, without its experts, in each format.
    routers = [m for m in work.modules if m.role is Role.ROUTER]
    runs += sum(1 + len(work.rounded(m)) for m in routers)
    assert replays[0].executions == (layers + runs) * len(TEXTS)
    inside = [m for m, _ in probes if m.block is not None]
    suffixes = sum(layers - m.block for m in inside if m.block is not None)
    assert suffixes <= len(inside) * (layers + 1) / 2  # a naive sweep runs all `layers` each time

    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[path] is module for path, module in before.items())
    assert all(w is weights[name] for name, w in tree_flatten(model.parameters()))
    assert np.array_equal(np.array(model(mx.array([TEXTS[0]]))), logits)


def test_chunked_logits_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path, "llama tied")
    whole = job(load_model(source.path)[0], TEXTS)
    score_by_kl(whole)
    chunked = job(load_model(source.path)[0], TEXTS)
    monkeypatch.setattr(logits, "LOGITS_BYTES", 4 * 384 * 5)  # five rows
    score_by_kl(chunked)
    assert scores(chunked) == pytest.approx(scores(whole), abs=1e-7)


@pytest.mark.parametrize("name", ["llama untied", "qwen3_moe"])
def test_uniform4_compares_within_the_4_bit_model(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    text = calibration(14, 23)
    texts = [s.tokens for s in text.sequences]
    menu = [Format("affine", 3, 64), UNIFORM4, Format("affine", 8, 64), DENSE]
    found = measure(
        source, menu=menu, calibration=text, method="kl", reference="uniform4", progress=False
    )
    assert found["reference"] == "uniform4"

    stock, _ = load_model(source.path)
    modules = quantizable(stock)
    running = {m.path: Format("affine", 8, 64) if m.role.value == "router" else UNIFORM4
               for m in modules}  # fmt: skip
    rows = {row["path"]: row["scores"] for row in found["modules"]}
    chosen = [m for m in modules if m.block in (None, 1)]
    for m in chosen:
        teacher = stock_quantized(source, running | {m.path: DENSE})
        for fmt in allowed(m, menu):
            student = stock_quantized(source, running | {m.path: fmt})
            expected = mean_kl(teacher, student, texts)
            value = rows[m.path][str(fmt)]["kl"]
            assert value == pytest.approx(expected, abs=1e-6, rel=1e-3), (m.path, fmt)

    bf16 = measure(
        source, menu=menu, calibration=text, method="kl", reference="bf16", progress=False
    )
    pairs = [
        (rows[row["path"]][fmt]["kl"], score["kl"])
        for row in bf16["modules"]
        for fmt, score in row["scores"].items()
        if fmt != "bf16"
    ]
    x, y = np.log(np.array(pairs)).T
    assert np.corrcoef(x, y)[0, 1] > 0.9


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama untied")
    work = job(load_model(source.path)[0], TEXTS)
    bad, nan = work.model.layers[1].mlp.up_proj, mx.array(float("nan"))
    kept, bad.weight = bad.weight, mx.where(mx.arange(64) == 3, nan, bad.weight)
    with pytest.raises(SensitivityError, match="calibration sequence 1"):
        score_by_kl(work)
    bad.weight = kept
    unseen = 2  # no text holds this token, so the model's output stays finite
    table = work.model.model.embed_tokens
    table.weight = mx.where(mx.arange(384)[:, None] == unseen, nan, table.weight)
    with pytest.raises(SourceError, match="embed_tokens"):
        score_by_kl(work)


def test_scores_that_are_not_finite_are_named(tmp_path: Path) -> None:
    work = job(load_model(tiny_source(tmp_path, "llama tied").path)[0], TEXTS)
    column = {work.modules[1].path: {str(UNIFORM4): [0.5, float("nan")]}}
    with pytest.raises(SensitivityError, match=r"q_proj in 4g64"):
        work.save((0, 0), column)
