"""Weights fitted to their layers' output errors, against gradients of the stock model in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq import ops
from optiq.formats import DENSE, NVFP4, UNIFORM4, Format
from optiq.models.places import place_at
from optiq.models.roles import Module, Role, is_head, quantizable
from optiq.nn.accelerate import accelerate
from optiq.nn.replay import Replay
from optiq.planning.plan import Plan, uniform_plan
from optiq.quantize.export import export
from optiq.quantize.rounding import descent
from optiq.quantize.rounding.descent import Moments, best, descend
from optiq.quantize.rounding.render import render_model
from optiq.quantize.rounding.weights import MINMAX, Rounded, Rounding
from optiq.sources import Source, load
from tests.planned import describe
from tests.quantize.sensitivity.cases import (
    MODELS,
    calibration,
    log_probabilities,
    sequences,
    stock_quantized,
    tiny_source,
)

Floats = np.ndarray[Any, np.dtype[np.float64]]
Expected = tuple[Floats, Floats, float]  # as in Moments
Both = tuple[Floats, Floats | None]  # H and G
Seen = tuple[mx.array, tuple[Moments, Moments | None]]
SEED = 7


class Probe(nn.Module):
    """A layer that keeps its input and output, and adds `delta` to that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.delta = inner, mx.array(0.0)
        self.input = self.output = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.input, self.output = x, self.inner(x) + self.delta
        return self.output

    def as_linear(self, x: mx.array) -> mx.array:
        return self.inner.as_linear(x)


def brute_force(
    model: nn.Module, modules: Sequence[Module], tokens: Sequence[int], key: mx.array
) -> dict[str, Both]:
    """H and G of each module over one sequence, from gradients at the outputs of stock layers."""
    head = next(m for m in modules if is_head(m))
    paths = [m.path for m in modules if m.role is not Role.HEAD]
    lookups = {m.path for m in modules if m.role is Role.EMBEDDING}
    alone = {m.path for m in modules if m.path.endswith(("gate_proj", "up_proj"))}
    originals = {path: place_at(model, path).get() for path in paths}
    probes = {path: Probe(inner) for path, inner in originals.items()}
    for path, probe in probes.items():
        place_at(model, path).set(probe)
    ids = mx.array([list(tokens)])
    logits = model(ids)
    inputs = {path: np.array(probe.input, dtype=np.float64)[0] for path, probe in probes.items()}
    _, draw = mx.random.split(key)
    labels = mx.random.categorical(logits[0].astype(mx.float32), key=draw)[None]

    def likelihood(deltas: dict[str, mx.array]) -> mx.array:
        for path, probe in probes.items():
            probe.delta = deltas[path]
        logits = model(ids).astype(mx.float32)
        return -mx.sum(nn.losses.cross_entropy(logits, labels))

    zeros = {path: mx.zeros(probe.output.shape[-2:]) for path, probe in probes.items()}
    found: dict[str, Both] = {}
    for path, delta in mx.grad(likelihood)(zeros).items():
        g = np.array(delta, dtype=np.float64)
        both = np.einsum("ti,tj->ij", g, g)
        if path in lookups:
            found[path] = both, None
        else:
            weights = np.square(g).mean(axis=-1)
            h = np.einsum("t,ti,tj->ij", weights, inputs[path], inputs[path])
            found[path] = h, None if path in alone else both
    for path, inner in originals.items():
        place_at(model, path).set(inner)
    looked_up, _ = found.get(head.path, (0, None))
    found[head.path] = looked_up + _head(model, head, tokens), None
    return found


def _head(model: nn.Module, head: Module, tokens: Sequence[int]) -> Floats:
    """The expectation over all labels, each in turn."""
    slot, kept = place_at(model, head.path), []
    layer: Any = slot.get()
    if head.tied:
        layer.as_linear = lambda x: kept.append(x) or type(layer).as_linear(layer, x)
        model(mx.array([list(tokens)]))
        del layer.as_linear
    else:
        slot.set(probe := Probe(layer))
        model(mx.array([list(tokens)]))
        kept.append(probe.input)
        slot.set(layer)
    x = np.array(kept[0][0].astype(mx.float32), dtype=np.float64)
    weights = []
    for p in np.exp(log_probabilities(model, tokens)):
        gradients = np.eye(len(p)) - p  # a row for each label
        weights.append((p * np.square(gradients).sum(axis=-1)).sum())
    return np.einsum("t,ti,tj->ij", weights, x, x)


def brute_moments(
    source: Source,
    texts: Sequence[Sequence[int]],
    judges: Sequence[int],
    running: nn.Module | None = None,
) -> dict[str, tuple[Expected, Expected | None]]:
    """H and G of the sequences that are fitted to, and of those that judge; the former's noise."""
    dense, _ = load_model(source.path)
    model = running or dense
    modules = [m for m in quantizable(dense) if len(m.shape) == 2]
    keys = mx.random.split(mx.random.key(SEED), len(texts))
    each = [brute_force(model, modules, text, keys[t]) for t, text in enumerate(texts)]
    found = {}
    for path, (_, outputs) in each[0].items():
        inputs = expected_moments([of[path][0] for of in each], judges)
        found[path] = (
            inputs,
            None if outputs is None else expected_moments([of[path][1] for of in each], judges),
        )
    return found


def expected_moments(each: Sequence[Floats], judges: Sequence[int]) -> Expected:
    """Of the H of each sequence: entry by entry the variance of their sum, in correlations."""
    fitted = [h for t, h in enumerate(each) if t not in judges]
    fit, root = np.sum(fitted, axis=0), np.sqrt(np.diag(np.sum(each, axis=0)))
    correlations = [h / np.where(root > 0, np.outer(root, root), np.inf) for h in each]
    variance = len(fitted) * np.var(correlations, axis=0, ddof=1)
    observed = np.sum([c for t, c in enumerate(correlations) if t not in judges], axis=0) ** 2
    off = ~np.eye(len(fit), dtype=bool)
    noise = np.sqrt(min(1.0, variance[off].sum() / observed[off].sum()))
    return fit, np.sum([h for t, h in enumerate(each) if t in judges], axis=0), float(noise)


def check(
    found: tuple[Moments, Moments | None],
    expected: tuple[Expected, Expected | None],
    name: str,
    rel: float = 5e-4,
) -> None:
    for moments, truth in zip(found, expected, strict=True):
        assert (moments is None) == (truth is None), name
        if moments is not None and truth is not None:
            check_one(moments, truth, name, rel)


def check_one(found: Moments, expected: Expected, name: str, rel: float) -> None:
    *hessians, noise = expected
    for h, truth in zip((found.fit, found.judge), hessians, strict=True):
        assert h.dtype == mx.float32
        np.testing.assert_allclose(np.array(h), truth, 0, rel * np.abs(truth).max(), err_msg=name)
    assert found.noise.item() == pytest.approx(noise, abs=10 * rel), name


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_the_weighted_inputs(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    texts = sequences(14, 9, 17)
    expected = brute_moments(source, texts, judges=[2])
    model = load(source).model
    modules = quantizable(model)
    accelerate(model, blocks=False)
    matrices = [m for m in modules if len(m.shape) == 2]
    with Replay(model, modules) as replay:
        tapes = [replay.record(text) for text in texts]
        found = {m: of for m, *of in descent._moments(replay, tapes, matrices, SEED)}
    assert {m.path for m in found} == expected.keys()
    assert any(map(is_head, found))
    for module, (inputs, outputs) in found.items():
        check((inputs, outputs), expected[module.path], module.path)


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
    """The arguments of every call of `best`."""
    calls: list[Seen] = []

    def spy(
        w: mx.array, fmt: Format, inputs: Moments, outputs: Moments | None
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
    for (path, _), (_, moments) in zip(found, seen, strict=True):
        check(moments, expected[path], path)


def test_a_model_in_4_bits_is_run_and_its_full_weights_are_rounded(
    tmp_path: Path, seen: list[Seen]
) -> None:
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
    for (path, _), (w, moments) in zip(found, seen, strict=True):
        assert mx.array_equal(w, weights[f"{path}.weight"])
        check(moments, expected[path], path, rel=5e-3)  # activations in 16-bit fixed point


def error(w: mx.array, v: Rounded, fmt: Format, h: mx.array) -> float:
    """tr((v - w) H (v - w)') in float64."""
    values = mx.dequantize(*v, fmt.group_size, fmt.bits)
    change = np.array(values, dtype=np.float64) - np.array(w, dtype=np.float64)
    return float(np.einsum("oi,ij,oj->", change, np.array(h, dtype=np.float64), change))


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


@pytest.mark.parametrize("way", ["descent", "search", "minmax"])
@pytest.mark.parametrize("fmt", [Format("affine", 3, 128), Format("affine", 4, 64)])
def test_the_best_by_what_was_not_fitted(way: str, fmt: Format) -> None:
    w = mx.random.normal((96, 128), key=mx.random.key(3))
    w = w * mx.array([0.1, 1.0] * 64)  # who serves the small columns clips the large ones
    moments = moments_for(way)
    searched = ops.quantize(w, fmt, mx.diag(moments.fit))
    kept = (1 - moments.noise) * (1 - mx.eye(128)) + mx.eye(128)
    damped = moments.fit * kept + descent.DAMPING * mx.mean(mx.diag(moments.fit)) * mx.eye(128)
    start = ops.AffineWeight(*searched, fmt.group_size, fmt.bits)
    ways = {
        "descent": ops.descend(w, start, damped)[:3],
        "search": searched,
        "minmax": mx.quantize(w, fmt.group_size, fmt.bits),
    }
    errors = {name: error(w, v, fmt, moments.judge) for name, v in ways.items()}
    assert min(errors, key=lambda name: errors[name]) == way, errors
    # not a matter of taste: by what it was fitted to, the descent wins over the search
    assert error(w, ways["descent"], fmt, damped) <= error(w, searched, fmt, damped)
    name, found = best(w, fmt, moments)
    assert name == way
    assert all(mx.array_equal(a, b) for a, b in zip(found, ways[way], strict=True))


@pytest.mark.parametrize(("name", "dtype"), [("llama tied", "bfloat16"), ("qwen3_moe", "float32")])
def test_what_is_fitted_is_written_and_rendered(tmp_path: Path, name: str, dtype: str) -> None:
    source = tiny_source(tmp_path, name, dtype=dtype)
    plan = planned(source, Format("affine", 3, 64), Format("affine", 5, 64), DENSE, NVFP4)
    how = descend(source, plan, calibration(40, 30, 50), MINMAX, progress=False)
    fitted = {
        (p.module.path, p.format)
        for p in plan.modules
        if p.format.mode == "affine" and len(p.module.shape) == 2
    }
    assert how.fitted.keys() == fitted
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


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_moments_of_heads_are_what_the_output_error_says(transpose: bool, heads: int) -> None:
    """For one change of a row, (v - w)' H (v - w) summed over rows, against each token's own."""
    size, out, tokens = 8, 4, 5
    keys = mx.random.split(mx.random.key(3), 3)
    x = mx.random.normal((2, heads, tokens, size if transpose else out), key=keys[0])
    g = mx.random.normal((2, 3, tokens, out if transpose else size), key=keys[1])
    calls = ((x,), {"transpose": transpose}, g)
    found = descent._sum([False, True], [[descent._of_heads(calls)], []]).fit
    inputs, outputs = (x, g) if transpose else (g, x)
    a, b = (
        np.broadcast_to(np.array(v, np.float64), (2, 3, *v.shape[2:])) for v in (inputs, outputs)
    )
    expected = np.einsum("bht,bhti,bhtj->hij", np.square(b).mean(-1), a, a)
    np.testing.assert_allclose(np.array(found), expected, 1e-4, 1e-5)


def test_each_head_is_rounded_as_it_would_be_alone() -> None:
    fmt = Format("affine", 3, 32)
    w = mx.random.normal((3, 16, 64), key=mx.random.key(0))
    x = mx.random.normal((2, 3, 100, 64), key=mx.random.key(1)) * mx.arange(1, 65) / 64
    hessians = x.swapaxes(-1, -2) @ x
    moments = Moments(hessians[0], hessians[1], mx.array([0.0, 0.3, 1.0]))
    _, found = descent.best_of_each(w, fmt, moments)
    for h in range(3):
        _, alone = best(w[h], fmt, Moments(moments.fit[h], moments.judge[h], moments.noise[h]))
        for part, other in zip(found, alone, strict=True):
            assert part is not None
            assert other is not None
            assert mx.array_equal(part[h], other)


def correlated(n: int, tokens: int, count: int, scale: float = 1.0) -> list[descent.Rows]:
    """Inputs of so many sequences whose columns share a few directions of uneven strength."""
    shared = mx.random.normal((n // 8, n), key=mx.random.key(0))
    columns = mx.exp(mx.random.normal((n,), key=mx.random.key(1)))
    keys = mx.random.split(mx.random.key(2), 2 * count)
    rows = []
    for a, b in zip(keys[:count], keys[count:], strict=True):
        x = mx.random.normal((tokens, n // 8), key=a) @ shared
        x = (x + 4 * mx.random.normal((tokens, n), key=b)) * columns * scale
        rows.append((x, mx.ones(tokens)))
    return rows


@pytest.mark.parametrize("tokens", [4, 16, 64, 256])
def test_of_few_tokens_the_descent_is_better_than_the_search(tokens: int) -> None:
    """By the exact H of the inputs, which nobody sees; without shrinking it may be worse."""
    n, fmt = 128, Format("affine", 3, 64)
    rows = correlated(n, tokens, 8)
    moments = descent._sum([False] * 7 + [True], [[of] for of in rows])
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


def test_noise_falls_with_tokens_and_not_with_the_scale_of_inputs() -> None:
    def noise(tokens: int, count: int, scale: float = 1.0) -> float:
        rows = correlated(64, tokens, count, scale)
        judges = [False] * (count - 1) + [True]
        return float(np.array(descent._sum(judges, [[of] for of in rows]).noise))

    found = [noise(tokens, 8) for tokens in (2, 8, 32, 128)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.7
    assert found[-1] < 0.4
    assert noise(32, 8, 1000.0) == pytest.approx(noise(32, 8), rel=1e-3)


def test_inputs_that_never_differ_have_no_noise_and_dead_columns_do_no_harm() -> None:
    x = mx.random.normal((32, 64), key=mx.random.key(0)) * (mx.arange(64) >= 8)
    rows = [[(x, mx.ones(32))]] * 4
    moments = descent._sum([False, False, False, True], rows)
    assert moments.noise.item() == pytest.approx(0, abs=1e-3)
    assert mx.all(mx.isfinite(moments.shrunk))
    nothing = descent._sum([False, True], [[(mx.zeros((4, 64)), mx.ones(4))]] * 2)
    assert nothing.noise.item() == 0
    assert not mx.any(nothing.shrunk)
