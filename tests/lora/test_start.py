"""What an adapter begins with: closed forms against numpy's SVD, gradients against MLX's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from optiq import lora
from optiq.errors import UsageError
from optiq.lora import closed_form, start
from optiq.lora.data import Sample
from optiq.lora.layers import put
from optiq.lora.moments import moments
from optiq.lora.options import Training
from optiq.models.places import place_at
from optiq.nn.accelerate import accelerate
from optiq.sources import load, resolve
from tests.lora.models import mixed_folder, rows, write_rows
from tests.lora.test_preferences import ROWS as PAIRS
from tests.tiny import VOCAB, tiny_folder


def opened(folder: Path) -> nn.Module:
    model = load(resolve(str(folder)), allow_quantized=True).model
    accelerate(model, blocks=False)
    return model


def samples(n: int = 6) -> list[Sample]:
    rng = np.random.default_rng(3)
    return [
        Sample(tuple(int(t) for t in rng.integers(4, VOCAB, 24)), tuple(range(1, 24)), i)
        for i in range(n)
    ]


@pytest.mark.parametrize(("out", "width"), [(20, 30), (30, 20)])
def test_a_repair_leaves_the_least_error_at_the_output(out: int, width: int) -> None:
    rng = np.random.default_rng(0)
    error = rng.normal(size=(out, width))
    x = rng.normal(size=(400, width)) * np.exp(rng.normal(size=width))
    found = closed_form.repair(error, x.T @ x / 400, 20)
    values = np.linalg.svd(error @ x.T / 20, compute_uv=False) ** 2
    assert found.energies[:20] == pytest.approx(values[:20], rel=1e-3)
    for rank in (1, 5, 20):
        a, b = (np.asarray(m, np.float64) for m in found.term(rank, 2.0))
        left = x @ (error - 2.0 * (a @ b).T).T / 20
        assert np.sum(left**2) == pytest.approx(values[rank:].sum(), rel=1e-3, abs=1e-2)
        # Training begins with what a random `a` would make of x, on average.
        random = rng.uniform(-(width**-0.5), width**-0.5, (width, 20_000))
        assert np.mean((x @ a) ** 2, axis=0) == pytest.approx(np.mean((x @ random) ** 2), rel=0.05)
    plain = np.linalg.svd(error)
    rest = x @ (error - (plain[0][:, :5] * plain[1][:5]) @ plain[2][:5]).T / 20
    assert np.sum(rest**2) > 1.2 * values[5:].sum()


def test_a_moment_that_rounding_has_spoiled_still_gives_a_repair() -> None:
    """Of fewer tokens than columns, and below zero by more than the ridge, as sums may be."""
    rng = np.random.default_rng(2)
    error, x = rng.normal(size=(20, 30)), rng.normal(size=(25, 30))
    moment = x.T @ x / 25 - 3 * closed_form.RIDGE * np.eye(30)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment + closed_form.RIDGE * np.eye(30))
    found = closed_form.repair(error, moment, 10)
    values = np.linalg.svd(error @ x.T / 5, compute_uv=False) ** 2
    assert found.energies[:10] == pytest.approx(values[:10], rel=1e-3)


def test_a_diagonal_moment_weighs_columns() -> None:
    rng = np.random.default_rng(1)
    error, squares = rng.normal(size=(12, 16)), np.exp(rng.normal(size=16))
    by_diagonal = closed_form.repair(error, squares, 4).energies
    assert by_diagonal == pytest.approx(closed_form.repair(error, np.diag(squares), 4).energies)


def test_moments_are_those_of_what_goes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(mixed_folder(tmp_path))
    modules = start.chosen(model, "all")
    seen: list[mx.array] = []
    place = place_at(model, "model.layers.1.mlp.down_proj")
    inner = place.get()

    class Tap(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            seen.append(x[0])
            y: mx.array = inner(x)
            return y

    place.set(Tap())
    for sample in samples():
        model(mx.array([sample.tokens]))
    place.set(inner)
    x = np.asarray(mx.concatenate(seen), np.float64)
    found = moments(model, modules, samples())
    expected = x.T @ x / len(x)
    assert np.abs(found["model.layers.1.mlp.down_proj"] - expected).max() < 1e-4 * expected.max()
    assert found["model.layers.0.mlp.up_proj"] is found["model.layers.0.mlp.gate_proj"]
    monkeypatch.setattr("optiq.lora.moments.EXACT_BYTES", 0)
    diagonal = moments(model, modules, samples())["model.layers.1.mlp.down_proj"]
    assert diagonal == pytest.approx(np.diag(expected), rel=1e-3)


def test_gains_of_the_task_are_the_spectrum_of_the_gradient(tmp_path: Path) -> None:
    """With as many random directions as the input has, a projection loses nothing."""
    folder = tiny_folder(tmp_path)
    model = opened(folder)
    modules = [m for m in start.chosen(model, "all") if m.shape[1] == 64 <= m.shape[0]]
    options = Training(rank=16, ranks="sensitivity")
    gains = start.Beginning(options, model, modules, samples(), progress=False)._task_gains()

    def loss(model: Any) -> mx.array:
        return sum(
            (
                nn.losses.cross_entropy(
                    model(mx.array([s.tokens[:-1]]))[0], mx.array(s.tokens[1:]), reduction="sum"
                )
                for s in samples()
            ),
            mx.array(0.0),
        )

    plain = load(resolve(str(folder)), allow_quantized=True).model
    gradients = dict(tree_flatten(nn.value_and_grad(plain, loss)(plain)[1]))
    for m in modules:
        values = np.linalg.svd(np.asarray(gradients[f"{m.path}.weight"]), compute_uv=False) ** 2
        count = min(m.shape)
        found = np.asarray(gains[m.path])[:count]
        assert np.abs(found - values[:count]).max() <= 0.01 * values[0], m.path


def begun(tmp_path: Path, **fields: Any) -> tuple[nn.Module, nn.Module, start.Start, Training]:
    folder = mixed_folder(tmp_path)
    original = load(resolve(str(tiny_folder(tmp_path, name="dense")))).model
    model, options = opened(folder), Training(**fields)
    modules = start.chosen(model, "all")
    lost = {m.path: 1.0 for m in modules}
    begin = start.Beginning(
        options, model, modules, samples(), original=original, lost=lost, progress=False
    )
    return model, original, begin.make(), options


def distance(model: nn.Module, original: nn.Module) -> float:
    rng = np.random.default_rng(9)
    ids = mx.array(rng.integers(4, VOCAB, (1, 48)))
    p, q = (nn.log_softmax(m(ids).astype(mx.float32), axis=-1) for m in (original, model))
    return float(mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item())


def test_qera_gives_back_some_of_what_quantization_lost(tmp_path: Path) -> None:
    model, original, begin, options = begun(tmp_path, init="qera", rank=16)
    before = distance(model, original)
    put(model, begin.terms, options.scale)
    assert distance(model, original) < 0.8 * before


def test_pissa_begins_where_the_base_is(tmp_path: Path) -> None:
    model, _, begin, options = begun(tmp_path, init="pissa", rank=4)
    ids = mx.array([[5, 6, 7, 8]])
    base = model(ids)
    put(model, begin.terms, options.scale, begin.minus)
    assert mx.abs(model(ids) - base).max() <= 1e-4 * mx.abs(base).max()
    path, (a, b) = next(iter(begin.terms.items()))
    layer: Any = place_at(model, path).get()
    weight = start.weight_of(layer.linear)
    left, values, right = np.linalg.svd(weight)
    truth = (left[:, :4] * values[:4]) @ right[:4]
    assert np.abs(2.0 * np.asarray(a @ b).T - truth).max() < 1e-4 * values[0]


def test_what_pissa_learned_is_in_the_adapter(tmp_path: Path) -> None:
    """The folder holds the difference to the base, of twice the rank, for a base as it is."""
    folder = mixed_folder(tmp_path)
    data = write_rows(tmp_path / "data", rows(8), rows(4, 1))
    result = lora.train(
        str(folder), data, tmp_path / "out", progress=False,
        init="pissa", rank=2, iters=5, batch_size=4, learning_rate=3e-3,
    )  # fmt: skip
    assert set(result.adapter.ranks.values()) == {4}
    assert result.held_out_loss is not None
    assert result.held_out_loss < result.judged[0].loss - 0.02


def test_sensitivity_spends_the_budget_and_says_on_what(tmp_path: Path) -> None:
    model, _, begin, _ = begun(tmp_path, ranks="sensitivity", rank=4)
    modules = start.chosen(model, "all")
    spent = sum(t.a.size + t.b.size for t in begin.terms.values())
    budget = 4 * sum(sum(m.shape) for m in modules)
    assert budget - max(sum(m.shape) for m in modules) < spent <= budget
    assert len({t.rank for t in begin.terms.values()}) > 2
    assert begin.notes == ("gradient of the task", "what quantization lost and a rank repairs")


def test_bits_give_wide_layers_more(tmp_path: Path) -> None:
    model, _, begin, _ = begun(tmp_path, ranks="bits", rank=8)
    bits = {p: start.bits_of(place_at(model, p).get()) for p in begin.terms}
    by_width = {b: [begin.terms[p].rank for p in bits if bits[p] == b] for b in (3, 8)}
    assert min(by_width[8]) > max(by_width[3])


def test_qera_needs_the_original(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", rows(4))
    folder, out = str(mixed_folder(tmp_path)), tmp_path / "out"
    with pytest.raises(UsageError, match="--original MODEL"):
        lora.train(folder, data, out, progress=False, init="qera", iters=1)
    other = str(tiny_folder(tmp_path, name="other", intermediate_size=192))
    with pytest.raises(UsageError, match="quantized from"):
        lora.train(folder, data, out, original=other, progress=False, init="qera", iters=1)
    dense = str(tiny_folder(tmp_path, name="dense"))
    for dpo, init in ((False, "qera"), (True, "zero")):  # unless another one is asked for
        given = write_rows(tmp_path / "pairs", PAIRS) if dpo else data
        of = out.with_name(init)
        result = lora.train(folder, given, of, original=dense, progress=False, iters=1, dpo=dpo)
        assert result.adapter.made["options"]["init"] == init
