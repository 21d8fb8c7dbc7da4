"""Measured KL decides between plans: against float64 KL of stock models, and brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from optiq.calibration import gather_selection, token_hash
from optiq.formats import Format
from optiq.planning.plan import Plan, Selection, uniform_plan
from optiq.planning.proposals import propose
from optiq.planning.size import UNIFORM4_SIZE
from optiq.quality.statistics import rank_correlation
from optiq.quantize import select as selection
from optiq.quantize.convert import convert
from optiq.quantize.rounding.weights import MINMAX, Rounding, round_weight
from optiq.quantize.select import Judge, decide
from optiq.sources import Source, load, resolve
from tests.architectures import construct
from tests.planned import describe, scores_of
from tests.quantize.sensitivity.cases import (
    MODELS,
    calibration,
    log_probabilities,
    mean_kl,
    randomized,
    stock_quantized,
    tiny_source,
)
from tests.tiny import tiny_folder

TEXT = calibration(14, 9, 30).sequences
TOKENS = [s.tokens for s in TEXT]


def uniform(source: Source, bits: int, kl: float = 0.01) -> Plan:
    """Every module in `bits` bits, with a predicted KL of `kl` each."""
    model, modules = describe(source)
    plan = uniform_plan(model, modules, Format("affine", bits, 64))
    return replace(plan, modules=tuple(replace(m, kl=kl) for m in plan.modules))


def stock(source: Source, plan: Plan) -> nn.Module:
    return stock_quantized(source, {m.module.path: m.format for m in plan.modules})


@pytest.mark.parametrize("name", MODELS)
def test_the_judges_kl_is_that_of_stock_models(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    with Judge(source, TEXT) as judge:
        for bits in (3, 6):
            plan = uniform(source, bits)
            found = judge.measure(plan)
            original, _ = load_model(source.path)
            student = stock(source, plan)
            assert found.mean == pytest.approx(mean_kl(original, student, TOKENS), rel=5e-3)
            assert found.se == pytest.approx(clustered(original, student), rel=1e-2)
        same = judge.measure(replace(plan, modules=()))
        assert same.mean == pytest.approx(0, abs=1e-6)


def clustered(original: nn.Module, student: nn.Module) -> float:
    """The standard error of a ratio of sums over sequences (docs/how-it-works.md)."""
    sums, lengths = [], np.array([len(tokens) for tokens in TOKENS])
    for tokens in TOKENS:
        p, q = log_probabilities(original, tokens), log_probabilities(student, tokens)
        sums.append((np.exp(p) * (p - q)).sum())
    mean = np.sum(sums) / lengths.sum()
    rest, n = np.square(np.array(sums) - mean * lengths).sum(), len(TOKENS)
    return float(np.sqrt(n / (n - 1) * rest) / lengths.sum())


def test_soft_caps_of_logits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma's final cap, low enough to change every logit, on a tied head."""

    def model(cap: float = 1.5) -> nn.Module:
        return randomized(lambda: construct("gemma4_text", final_logit_softcapping=cap))

    source: Any = None
    monkeypatch.setattr(selection, "load", lambda source: SimpleNamespace(model=model()))
    student = model()
    nn.quantize(student, 64, 3, class_predicate=lambda path, m: isinstance(m, nn.Embedding))
    expected = mean_kl(model(), student, TOKENS)
    with Judge(source, TEXT) as judge:
        assert judge.measure_model(student).mean == pytest.approx(expected, rel=1e-3)
    uncapped = [model(30.0), model(30.0)]
    nn.quantize(uncapped[1], 64, 3, class_predicate=lambda path, m: isinstance(m, nn.Embedding))
    assert abs(mean_kl(*uncapped, TOKENS) / expected - 1) > 0.05


def test_logits_in_chunks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path, "llama untied")
    plan = uniform(source, 4)
    with Judge(source, TEXT) as judge:
        whole = judge.measure(plan)
        monkeypatch.setattr("optiq.quantize.replay.logits.LOGITS_BYTES", 4 * 4 * 384)
        assert vars(judge.measure(plan)) == pytest.approx(vars(whole), rel=1e-5)


Measured = dict[tuple[str, str], float]


def measured(plan: Plan) -> Measured:
    """Mean KL by plan and rounding."""
    assert plan.selection is not None
    found = {(c.name, c.rounding): c.kl.mean for c in plan.selection.candidates}
    assert len(found) == len(plan.selection.candidates)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return tiny_source(tmp_path, "llama tied")


def test_the_plan_of_least_kl_is_taken_and_all_are_recorded(source: Source) -> None:
    plans = propose(scores_of(source), UNIFORM4_SIZE)
    assert len(plans) >= 3
    plan, how = decide(source, plans, MINMAX, TEXT, progress=False)
    original, _ = load_model(source.path)
    truth = {name: mean_kl(original, stock(source, p), TOKENS) for name, p in plans.items()}
    found = measured(plan)
    assert found == pytest.approx({(name, "minmax"): kl for name, kl in truth.items()}, rel=5e-3)
    best = min(truth, key=lambda name: truth[name])
    made = plan.selection
    assert made is not None
    assert (made.chosen, made.rounding, how) == (best, "minmax", MINMAX)
    assert replace(plan, selection=None) == plans[best]
    assert found[best, "minmax"] <= found["uniform", "minmax"]
    for c in made.candidates:
        assert c.nbytes == plans[c.name].nbytes
        assert c.predicted == plans[c.name].predicted_kl
    assert (made.tokens, made.sequences) == (53, 3)
    assert made.text_sha256 == token_hash(TEXT)
    assert made.ratio == pytest.approx(truth[best] / plan.predicted_kl, rel=5e-3)
    pairs = [(plans[name].predicted_kl, kl) for name, kl in truth.items()]
    assert made.rank_correlation == pytest.approx(spearman(*zip(*pairs, strict=True)))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_order_and_predictions_do_not_matter(source: Source) -> None:
    """The widest plan is best, wherever it stands and whatever its scores say of it."""
    plans = {"a": uniform(source, 3, 0.001), "b": uniform(source, 8, 9.0), "c": uniform(source, 4)}
    for names in ("abc", "bca", "cab"):
        given = {name: plans[name] for name in names}
        plan, _ = decide(source, given, MINMAX, TEXT, progress=False)
        assert plan.selection is not None
        assert plan.selection.chosen == "b"
        assert plan.selection.ratio == pytest.approx(
            measured(plan)["b", "minmax"] / (9.0 * len(plan.modules))
        )


def fitted(source: Source, plan: Plan, spoil: Callable[[mx.array], mx.array]) -> Rounding:
    """A rounding that knows all weights of the plan, rounded from what `spoil` makes of them."""
    weights = mx.load(str(source.path / "model.safetensors"))
    return Rounding(
        "descent",
        fitted={
            (m.module.path, m.format): round_weight(
                spoil(weights[f"{m.module.path}.weight"]), m.format
            )
            for m in plan.modules
        },
    )


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_fit_that_is_no_better_is_recorded_and_left(source: Source, factor: float) -> None:
    plans = {"a": uniform(source, 4), "b": uniform(source, 3)}

    def fit(plan: Plan) -> Rounding:
        assert plan == plans["a"]
        return fitted(source, plan, lambda w: factor * w)

    plan, how = decide(source, plans, MINMAX, TEXT, fit, progress=False)
    assert plan.selection is not None
    assert (plan.selection.chosen, plan.selection.rounding) == ("a", "minmax")
    assert how is MINMAX
    assert measured(plan).keys() == {("a", "minmax"), ("b", "minmax"), ("a", "descent")}


def test_a_fit_that_is_better_is_taken(source: Source) -> None:
    plan, bad = uniform(source, 4), Rounding()
    worse = fitted(source, plan, lambda w: 1.1 * w)
    better = fitted(source, plan, lambda w: w)
    found, how = decide(source, {"a": plan}, worse, TEXT, lambda plan: better, progress=False)
    assert how is better
    assert found.selection is not None
    assert found.selection.rounding == "descent"
    first, second = (c.kl.mean for c in found.selection.candidates)
    assert second < first
    assert found.selection.ratio == first / found.predicted_kl  # of what scores speak of
    # a fit that could fit nothing is not measured again
    found, how = decide(source, {"a": plan}, MINMAX, TEXT, lambda plan: bad, progress=False)
    assert how is MINMAX
    assert measured(found).keys() == {("a", "minmax")}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_read_block_by_block_is_measured_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = tiny_source(tmp_path, name)
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(selection, "SMALL_BYTES", limit)
        with Judge(source, TEXT) as judge:
            found.append([judge.measure(uniform(source, bits)).mean for bits in (3, 6)])
    assert found[1] == pytest.approx(found[0], rel=3e-4)


def test_without_text_the_first_plan_is_taken(source: Source) -> None:
    plans = {"a": uniform(source, 3), "b": uniform(source, 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "Judge", None)  # nothing is loaded
        plan, how = decide(source, plans, MINMAX, [], progress=False)
        fit = fitted(source, plan, lambda w: w)
        trusted, by = decide(source, plans, MINMAX, [], lambda plan: fit, progress=False)
    assert (how, by) == (MINMAX, fit)
    for found, rounding in ((plan, "minmax"), (trusted, "descent")):
        assert replace(found, selection=None) == plans["a"]
        assert found.selection == Selection("a", rounding)
    plan, _ = decide(source, plans, MINMAX, TEXT, progress=False)
    assert plan.selection is not None
    assert plan.selection.chosen == "b"


def test_a_conversion_is_what_was_measured_on_text_of_its_own(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model", hidden_size=128)
    result = convert(folder, tmp_path / "out", tokens=640, held_out_tokens=320, progress=False)
    made = result.plan.selection
    assert made is not None
    origin = resolve(str(folder))
    loaded = load(origin)
    text = gather_selection(loaded.tokenizer, None, seed=0)
    assert made.text_sha256 == token_hash(text)
    assert result.plan.measured is not None
    others = {result.scores.calibration.sha256, result.plan.measured.text_sha256}
    assert made.text_sha256 not in others
    exported, _ = load_model(tmp_path / "out")
    found = measured(result.plan)
    kl = mean_kl(loaded.model, exported, [s.tokens for s in text])
    assert found[made.chosen, made.rounding] == pytest.approx(kl, rel=5e-3)
    assert found[made.chosen, made.rounding] == min(found.values())
    # never worse than the same bytes spread evenly, as stock rounds them
    even = stock(origin, uniform(origin, 4))
    assert kl < mean_kl(loaded.model, even, [s.tokens for s in text])
    assert found[made.chosen, made.rounding] <= found["uniform", "search"]


def spearman(x: Any, y: Any) -> float:
    """Pearson's coefficient of ranks, each counted out by comparing all pairs."""

    def ranks(values: Any) -> Any:
        v = np.array(values)
        return (v[None] < v[:, None]).sum(1) + 0.5 * (v[None] == v[:, None]).sum(1)

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


FEW = st.integers(-3, 3).map(float)


@given(st.lists(st.tuples(FEW, FEW), max_size=12))
def test_rank_correlation_is_spearmans(pairs: list[tuple[float, float]]) -> None:
    found = rank_correlation(pairs)
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        assert found is None
    else:
        assert found == pytest.approx(spearman(*zip(*pairs, strict=True)), abs=1e-12)
