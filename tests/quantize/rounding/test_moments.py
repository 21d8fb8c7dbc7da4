"""H and G of inputs and of gradients, and their noise, against NumPy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from optiq.distributed.ranks import ALONE
from optiq.models.roles import Role, is_head, quantizable
from optiq.nn.accelerate import accelerate
from optiq.nn.replay import Replay
from optiq.quantize.replay.shared import Shared
from optiq.quantize.rounding import moments
from optiq.quantize.rounding.importance import PRIOR_ROWS
from optiq.quantize.rounding.moments import Moments
from optiq.sources import load, resolve
from tests.quantize.rounding.cases import (
    SEED,
    Floats,
    brute_experts,
    brute_moments,
    check,
    check_one,
    correlated,
    expected_moments,
)
from tests.quantize.sensitivity.cases import MODELS, sequences, tiny_source
from tests.tiny import tiny_folder


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
        shared = Shared.record(ALONE, replay, texts)
        found = {m: of for m, *of in moments.moments(replay, shared, matrices, SEED)}
    assert {m.path for m in found} == expected.keys()
    assert any(map(is_head, found))
    for module, (inputs, outputs) in found.items():
        check((inputs, outputs), expected[module.path], module.path)


def test_an_embedding_is_given_up_before_the_head_is_read(tmp_path: Path) -> None:
    """Each is as large as many blocks."""
    folder = tiny_folder(tmp_path, tie_word_embeddings=False)
    model = load(resolve(str(folder))).model
    modules = quantizable(model)
    accelerate(model, blocks=False)
    seen: list[Role | int | None] = []
    with Replay(model, modules) as replay:
        shared = Shared.record(ALONE, replay, sequences(14, 9))
        for module, *_ in moments.moments(replay, shared, modules, SEED, after=seen.append):
            seen.append(module.role)
    assert seen[-3:] == [Role.EMBEDDING, None, Role.HEAD]


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_moments_of_heads_are_what_the_output_error_says(transpose: bool, heads: int) -> None:
    """For one change of a row, (v - w)' H (v - w) summed over rows, against each token's own."""
    size, out, tokens = 8, 4, 5
    keys = mx.random.split(mx.random.key(3), 3)
    x = mx.random.normal((2, heads, tokens, size if transpose else out), key=keys[0])
    g = mx.random.normal((2, 3, tokens, out if transpose else size), key=keys[1])
    calls = ((x,), {"transpose": transpose}, g)
    found = mx.stack([of.fit for of in moments._of_heads([False, True], [[calls], []], 3)])
    inputs, outputs = (x, g) if transpose else (g, x)
    a, b = (
        np.broadcast_to(np.array(v, np.float64), (2, 3, *v.shape[2:])) for v in (inputs, outputs)
    )
    expected = np.einsum("bht,bhti,bhtj->hij", np.sqrt(np.square(b).mean(-1)), a, a)
    np.testing.assert_allclose(np.array(found), expected, 1e-4, 1e-5)


EXPERTS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("length", [9, 60])  # of many rows mlx-lm sorts the experts
def test_moments_of_experts_are_of_what_is_routed_to_them(
    tmp_path: Path, name: str, length: int
) -> None:
    source = tiny_source(tmp_path, "qwen3_moe")
    texts = sequences(length, length + 4, length + 2)
    model = load(source).model
    modules = quantizable(model)
    module = next(m for m in modules if m.path.endswith(f"switch_mlp.{name}"))
    accelerate(model, blocks=False)
    with Replay(model, modules) as replay:
        shared = Shared.record(ALONE, replay, texts)
        each = next(of for _, of, _ in moments.moments(replay, shared, [module], SEED))
        assert not isinstance(each, Moments)
        found = list(each)
    truth, rows = brute_experts(source, module, texts)
    layer = expected_moments(list(truth.sum(axis=1)), [2])
    prior = shrunk(*layer) * PRIOR_ROWS / rows[:2].sum()
    assert len(found) == module.shape[0]
    for e, of in enumerate(found):
        expected = expected_moments(list(truth[:, e]), [2], prior)
        check_one(of, expected, f"{name} {e}", 1e-3)
        scale = np.sqrt(np.outer(np.diag(expected[0]), np.diag(expected[0])))
        root = np.sqrt(np.diag(prior))
        target = prior / np.outer(root, root) * scale
        assert of.correlations is not None
        np.testing.assert_allclose(
            np.array(of.shrunk), shrunk(*expected, target), 0, 1e-3 * np.abs(target).max()
        )


def shrunk(fit: Floats, judge: Floats, noise: float, target: Floats | None = None) -> Floats:
    diagonal = np.diag(np.diag(fit))
    moved = (1 - noise) * fit + noise * (diagonal if target is None else target)
    return np.asarray(moved + moments.DAMPING * np.diag(fit).mean() * np.eye(len(fit)))


def test_experts_that_few_tokens_reach_take_after_the_others() -> None:
    """The truth: all have the same correlations, but columns are driven unevenly."""
    experts, n, judges = 6, 32, [False] * 7 + [True]
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(n, n // 8)) @ rng.normal(size=(n // 8, n)) / n + 0.3 * np.eye(n)
    strength = np.exp(0.5 * rng.normal(size=(experts, n)))
    calls = []
    for _ in judges:
        chosen = rng.choice(experts, 100, p=[0.5, 0.3, 0.1, 0.06, 0.04, 0])
        x = rng.normal(size=(100, n)) @ mixing.T * strength[chosen]
        call = (mx.array(x[:, None], mx.float32), mx.array(chosen)), {}, mx.ones((100, 1, 4))
        calls.append([call])
    rows = [[moments._expert_rows(call) for call in of] for of in calls]
    *found, unseen = moments._of_experts(judges, calls, range(experts))

    def distance(of: mx.array) -> float:
        """Of the correlations from the true ones."""
        h, root = np.array(of, np.float64), np.sqrt(np.diag(np.array(of, np.float64)))
        truth, scale = mixing @ mixing.T, np.sqrt(np.diag(mixing @ mixing.T))
        return float(np.linalg.norm(h / np.outer(root, root) - truth / np.outer(scale, scale)))

    for e, of in enumerate(found):
        alone = moments._sum(judges, [list(moments._chosen(of, e)) for of in rows])
        assert distance(of.shrunk) < (0.7 if e > 1 else 1) * distance(alone.shrunk), e
    assert unseen.noise.item() == 0
    assert distance(unseen.shrunk) < 1.5 * distance(found[0].shrunk)


def test_noise_falls_with_tokens_and_not_with_the_scale_of_inputs() -> None:
    def noise(tokens: int, count: int, scale: float = 1.0) -> float:
        rows = correlated(64, tokens, count, scale)
        judges = [False] * (count - 1) + [True]
        return float(np.array(moments._sum(judges, [[of] for of in rows]).noise))

    found = [noise(tokens, 8) for tokens in (2, 8, 32, 128)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.7
    assert found[-1] < 0.4
    assert noise(32, 8, 1000.0) == pytest.approx(noise(32, 8), rel=1e-3)


@pytest.mark.parametrize("tokens", [7, 39, 41])
def test_wide_moments_are_made_in_parts_and_few_rows_judge_as_such(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(moments, "PART", 32)
    judges, width, out = [False, True, False, False], 80, 24
    rows = [correlated(width, 11, 1)[0], *correlated(width, tokens, 3)]
    rows = [(x, mx.random.uniform(shape=(len(x),), key=mx.random.key(7))) for x, _ in rows]
    each = [
        np.einsum("t,ti,tj->ij", *(np.array(a, np.float64) for a in (w, x, x))) for x, w in rows
    ]
    found = moments._sum(judges, [[of] for of in rows])
    assert moments.few(*found.judge.shape) == (2 * tokens < width)
    check_one(found, expected_moments(each, judges=[1]), "wide", 5e-4)
    gradients = correlated(out, tokens // 4, 4)
    outputs = moments._sum(judges, [[of] for of in gradients])
    change = mx.random.normal((out, width), key=mx.random.key(8))
    g = np.array(gradients[1][0], np.float64)
    d = np.array(change, np.float64)
    alone, both = np.trace(d @ each[1] @ d.T), np.trace(g.T @ g @ d @ each[1] @ d.T)
    assert found.judged(change).item() == pytest.approx(alone, rel=1e-4)
    assert found.judged(change, outputs).item() == pytest.approx(both, rel=1e-4)


def test_inputs_that_never_differ_have_no_noise_and_dead_columns_do_no_harm() -> None:
    x = mx.random.normal((32, 64), key=mx.random.key(0)) * (mx.arange(64) >= 8)
    rows = [[(x, mx.ones(32))]] * 4
    found = moments._sum([False, False, False, True], rows)
    assert found.noise.item() == pytest.approx(0, abs=1e-3)
    assert mx.all(mx.isfinite(found.shrunk))
    nothing = moments._sum([False, True], [[(mx.zeros((4, 64)), mx.ones(4))]] * 2)
    assert nothing.noise.item() == 0
    assert not mx.any(nothing.shrunk)
