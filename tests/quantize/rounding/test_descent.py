"""Weights fitted to their layers' output errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq import ops
from optiq.errors import ExportError
from optiq.formats import DENSE, NVFP4, UNIFORM4, Format
from optiq.models.places import place_at
from optiq.models.roles import Role, quantizable
from optiq.nn.replay import Replay
from optiq.planning.plan import Plan, uniform_plan
from optiq.quantize.export import export
from optiq.quantize.rounding import descent
from optiq.quantize.rounding.descent import best, descend
from optiq.quantize.rounding.importance import column_squares
from optiq.quantize.rounding.moments import DAMPING, InputMoments, Moments, _sum
from optiq.quantize.rounding.render import render_model
from optiq.quantize.rounding.weights import MINMAX, Rounded, Rounding
from optiq.sources import Source, load
from tests.planned import describe
from tests.quantize.rounding.cases import (
    SEED,
    Floats,
    brute_experts,
    brute_moments,
    check,
    correlated,
    error,
)
from tests.quantize.sensitivity.cases import (
    calibration,
    sequences,
    stock_quantized,
    tiny_source,
)

Seen = tuple[mx.array, tuple[InputMoments, Moments | None]]


def planned(source: Source, *formats: Format) -> Plan:
    """A plan that gives these formats to the modules in turn."""
    model, modules = describe(source)
    plan = uniform_plan(model, modules)
    cycle = [formats[i % len(formats)] for i in range(len(modules))]
    return Plan(
        model=model,
        asked="",
        budget=0,
        modules=tuple(
            type(p)(p.module, f, f.nbytes(p.module.shape, model.itemsize), None)
            for p, f in zip(plan.modules, cycle, strict=True)
        ),
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The arguments of every call of `best`, which `best_of_rows` calls for each part."""
    calls: list[Seen] = []

    def spy(
        w: mx.array, fmt: Format, inputs: InputMoments, outputs: Moments | None = None
    ) -> tuple[str, Rounded]:
        calls.append((w, (inputs, outputs)))
        return best(w, fmt, inputs, outputs)

    monkeypatch.setattr(descent, "best", spy)
    return calls


@pytest.mark.parametrize(("count", "judges"), [(2, [1]), (3, [2]), (17, [7, 15])])
def test_every_eighth_sequence_judges_and_at_least_the_last(
    tmp_path: Path, count: int, judges: list[int], seen: list[Seen]
) -> None:
    source = tiny_source(tmp_path, "llama untied")
    text = calibration(*[9] * count)
    plan = planned(source, UNIFORM4)
    found = descend(source, plan, text, MINMAX, seed=SEED, progress=False).fitted
    tokens = [s.tokens for s in text.sequences]
    expected = brute_moments(source, tokens, judges)
    assert {path for path, _ in found} == expected.keys()
    for (path, _), (_, of) in zip(found, seen, strict=True):
        check(of, expected[path], path)


def test_a_model_in_4_bits_is_run_and_its_full_weights_are_rounded(
    tmp_path: Path, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Activations are in fixed point here; a draw by Gumbel noise moves least with their last bits.
    gumbel = mx.random.categorical
    monkeypatch.setattr("optiq.ops.categorical", lambda logits, key: gumbel(logits, key=key))
    source = tiny_source(tmp_path, "llama tied")
    text = calibration(14, 9, 17)
    plan = planned(source, Format("affine", 3, 64))
    found = descend(
        source, plan, text, MINMAX, reference="uniform4", seed=SEED, progress=False
    ).fitted
    running = stock_quantized(source, {m.module.path: UNIFORM4 for m in plan.modules})
    weights = mx.load(str(source.path / "model.safetensors"))
    tokens = [s.tokens for s in text.sequences]
    expected = brute_moments(source, tokens, [2], running)
    assert len(seen) == len(found) == len(expected) == len(plan.modules)
    for (path, _), (w, of) in zip(found, seen, strict=True):
        assert mx.array_equal(w, weights[f"{path}.weight"])
        check(of, expected[path], path, rel=5e-3)  # activations in 16-bit fixed point


def coupled(n: int, seed: int) -> mx.array:
    """Moments of inputs that share a few directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * n, n // 8)) @ rng.normal(size=(n // 8, n))
    x += 0.1 * rng.normal(size=x.shape)
    return mx.array(x.T @ x / len(x), dtype=mx.float32)


def moments_for(way: str) -> Moments:
    h = coupled(128, 0)
    if way == "descent":
        return Moments(h, coupled(128, 0) + 0.01 * mx.eye(128), mx.array(0.0))
    if way == "search":  # what was fitted to couples columns, what judges does not
        uneven = mx.array(np.geomspace(1e-3, 1e3, 128), dtype=mx.float32)
        root = mx.sqrt(uneven)
        return Moments(h * root[:, None] * root, mx.diag(uneven * mx.diag(h)), mx.array(0.0))
    uneven = mx.array([1e6, 1.0] * 64)  # columns that hardly counted are all that counts
    return Moments(mx.diag(uneven), mx.diag(1 / uneven), mx.array(0.5))


@pytest.mark.parametrize("way", ["descent", "search"])
@pytest.mark.parametrize("fmt", [Format("affine", 3, 128), Format("affine", 4, 64)])
def test_the_best_by_what_was_not_fitted(way: str, fmt: Format) -> None:
    w = mx.random.normal((96, 128), key=mx.random.key(3))
    w = w * mx.array([0.1, 1.0] * 64)  # who serves the small columns clips the large ones
    moments = moments_for(way)
    searched = ops.quantize(w, fmt, mx.diag(moments.fit))
    kept = (1 - moments.noise) * (1 - mx.eye(128)) + mx.eye(128)
    damped = moments.fit * kept + DAMPING * mx.mean(mx.diag(moments.fit)) * mx.eye(128)
    start = ops.AffineWeight(*searched, fmt.group_size, fmt.bits)
    ways = {
        "descent": ops.descend(w, start, damped)[:3],
        "search": searched,
    }
    errors = {name: error(w, v, fmt, moments.judge) for name, v in ways.items()}
    assert min(errors, key=lambda name: errors[name]) == way, errors
    # not a matter of taste: by what it was fitted to, the descent wins over the search
    assert error(w, ways["descent"], fmt, damped) <= error(w, searched, fmt, damped)
    name, found = best(w, fmt, moments)
    assert name == way
    assert all(mx.array_equal(a, b) for a, b in zip(found, ways[way], strict=True))


@pytest.mark.parametrize(
    ("name", "dtype", "folder"),
    [("llama tied", "bfloat16", None), ("qwen3_moe", "float32", "fitted")],
)
def test_what_is_fitted_is_written_and_rendered(
    tmp_path: Path, name: str, dtype: str, folder: str | None
) -> None:
    source = tiny_source(tmp_path, name, dtype=dtype)
    plan = planned(source, Format("affine", 3, 64), Format("affine", 5, 64), DENSE, NVFP4)
    into = tmp_path / folder if folder else None
    how = descend(source, plan, calibration(40, 30, 50), MINMAX, folder=into, progress=False)
    fitted = {(p.module.path, p.format) for p in plan.modules if p.format.mode == "affine"}
    assert how.fitted.keys() == fitted
    assert into is None or len(list(into.glob("*/*"))) == len(fitted)
    export(source, plan, tmp_path / "out", rounding=how)
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    run = dict(tree_flatten(render_model(load(source), plan, rounding=how).parameters()))
    changed = 0
    for (path, fmt), parts in how.fitted.items():
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            assert array.dtype == (mx.uint32 if part == "weight" else getattr(mx, dtype))
            assert mx.array_equal(written[f"{path}.{part}"], array)
            assert mx.array_equal(run[f"{path}.{part}"], array)
        stock = mx.quantize(_source_weight(source, path), fmt.group_size, fmt.bits)
        changed += not mx.array_equal(stock[0], parts[0])
    assert changed > len(fitted) / 2
    plain = tmp_path / "plain"
    export(source, plan, plain)
    for name, array in mx.load(str(plain / "model.safetensors")).items():
        if all(not name.startswith(f"{path}.") for path, _ in fitted):
            assert mx.array_equal(written[name], array)  # all else is as without


def _source_weight(source: Source, path: str) -> mx.array:
    weight: mx.array = place_at(load(source).model, path).get().weight
    return weight


def test_a_place_that_does_not_take_fitted_weights(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    (tmp_path / "file").touch()
    plan = planned(source, Format("affine", 3, 64))
    with pytest.raises(ExportError, match=r"fitted weights cannot be kept in .*; free space or"):
        descend(source, plan, calibration(9, 9), MINMAX, folder=tmp_path / "file", progress=False)


def test_where_no_layer_can_be_fitted_nothing_is(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama untied")
    for fmt in (NVFP4, DENSE):
        plan = planned(source, fmt)
        assert not descend(source, plan, calibration(9, 9), MINMAX, progress=False).fitted


@pytest.mark.parametrize("left", ["model.layers.0.", "model.layers.1.", "model.layers.2."])
def test_a_block_without_layers_to_fit(tmp_path: Path, left: str) -> None:
    """Its neighbours' moments are what they are with it."""
    source = tiny_source(tmp_path, "llama untied")
    whole = planned(source, UNIFORM4)
    text = calibration(14, 9)
    some = replace(
        whole,
        modules=tuple(
            replace(p, format=DENSE) if p.module.path.startswith(left) else p for p in whole.modules
        ),
    )
    every = descend(source, whole, text, MINMAX, progress=False).fitted
    found = descend(source, some, text, MINMAX, progress=False).fitted
    assert found.keys() == {key for key in every if not key[0].startswith(left)}
    for key, parts in found.items():
        assert all(mx.array_equal(a, b) for a, b in zip(parts, every[key], strict=True))


def test_one_sequence_cannot_both_fit_and_judge(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    plan, given = planned(source, UNIFORM4), Rounding("search", {"x": mx.zeros(1)})
    assert descend(source, plan, calibration(30), given, progress=False) is given


@pytest.mark.parametrize(("room", "used"), [(0.0, 2), (2.5, 2), (3.0, 3), (4.9, 4), (100.0, 6)])
def test_no_more_is_recorded_than_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, used: int
) -> None:
    model, _ = load_model(tiny_source(tmp_path, "llama tied").path)
    modules, texts = quantizable(model), sequences(*[10] * 6)
    with Replay(model, modules) as replay:
        one = sum(a.nbytes for a in replay.record(texts[0]).outputs)
    monkeypatch.setattr(descent, "TAPE_BYTES", int(room * one))
    assert descent._fitting(texts, model, modules) == texts[:used]


def test_each_of_a_stack_is_rounded_alone_and_the_way_is_that_of_least_error_in_sum() -> None:
    fmt = Format("affine", 3, 32)
    w = mx.random.normal((3, 16, 64), key=mx.random.key(0))
    x = mx.random.normal((2, 3, 100, 64), key=mx.random.key(1)) * mx.arange(1, 65) / 64
    fit, judge = x.swapaxes(-1, -2) @ x
    noise = mx.array([0.0, 0.3, 1.0])
    each = [Moments(*of) for of in zip(fit, judge, noise, strict=True)]
    name, found = descent.best_of_each(w, fmt, iter(each))
    errors: dict[str, float] = {}
    for h, of in enumerate(each):
        searched = ops.AffineWeight(*ops.quantize(w[h], fmt, mx.diag(of.fit)), 32, 3)
        ways = {
            "search": searched[:3],
            "descent": ops.descend(w[h], searched, of.shrunk)[:3],
        }
        for way, v in ways.items():
            errors[way] = errors.get(way, 0) + error(w[h], v, fmt, of.judge)
        for part, alone in zip(found, ways[name], strict=True):
            assert part is not None
            assert mx.array_equal(part[h], alone)
    assert name == min(errors, key=lambda way: errors[way])


def test_experts_lose_less_than_by_the_search_on_other_text(tmp_path: Path) -> None:
    """By the H of each expert over sequences that nothing was fitted to."""
    source = tiny_source(tmp_path, "qwen3_moe")
    fmt = Format("affine", 3, 32)
    text, other = calibration(*[60] * 16), sequences(*[60] * 8, seed=1)
    plan = planned(source, fmt)
    found = descend(source, plan, text, MINMAX, progress=False).fitted
    importance = column_squares(
        load(source).model,
        [p.module for p in plan.modules],
        [s.tokens for s in text.sequences],
        progress=False,
    )
    ratios = []
    for module in (p.module for p in plan.modules if p.module.role is Role.EXPERT):
        weight = _source_weight(source, module.path)
        searched = ops.quantize(weight, fmt, importance[module.path])
        hessians, _ = brute_experts(source, module, other)
        each = hessians.sum(axis=0)

        def loss(v: Rounded, weight: mx.array = weight, each: Floats = each) -> float:
            codes, scales, biases = v
            assert biases is not None
            experts = zip(weight, codes, scales, biases, each, strict=True)
            return sum(error(w, (c, s, b), fmt, h) for w, c, s, b, h in experts)

        ratios.append(loss(found[module.path, fmt]) / loss(searched))
    assert max(ratios) < 1
    assert np.exp(np.mean(np.log(ratios))) < 0.9


@pytest.mark.parametrize("tokens", [4, 16, 64, 256])
def test_of_few_tokens_the_descent_is_better_than_the_search(tokens: int) -> None:
    """By the exact H of the inputs, which nobody sees; without shrinking it may be worse."""
    n, fmt = 128, Format("affine", 3, 64)
    rows = correlated(n, tokens, 8)
    moments = _sum([False] * 7 + [True], [[of] for of in rows])
    many = correlated(n, 20_000, 1)[0][0]
    truth = many.T @ many
    w = mx.random.normal((64, n), key=mx.random.key(3))
    searched = ops.quantize(w, fmt, mx.diag(moments.fit))
    limit = error(w, searched, fmt, truth)
    start = ops.AffineWeight(*searched, fmt.group_size, fmt.bits)
    name, found = best(w, fmt, moments)
    assert name == "descent"
    assert error(w, found, fmt, truth) < 0.9 * limit
    whole = replace(moments, noise=mx.array(0.0)).shrunk
    unshrunk = error(w, ops.descend(w, start, whole)[:3], fmt, truth)
    assert error(w, found, fmt, truth) < unshrunk
    assert tokens > 4 or unshrunk > limit
