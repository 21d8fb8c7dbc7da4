"""Distillation of gains, against stock mlx-lm and MLX's own gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.gemma3_text import RMSNorm as GemmaNorm
from mlx_lm.utils import load_model

from optiq.calibration import Calibration, Sample, token_hash
from optiq.errors import CheckpointError, UsageError
from optiq.formats import Format
from optiq.planning.plan import Plan, Selection
from optiq.quantize import convert as conversion
from optiq.quantize.convert import convert
from optiq.quantize.prepare import work_folder
from optiq.quantize.rounding import distill as refining
from optiq.quantize.rounding.distill import Training, refine
from optiq.quantize.rounding.gains import multiplied
from optiq.quantize.rounding.weights import MINMAX, Rounding
from optiq.quantize.select import Judge, decide
from optiq.sources import Source, load
from tests.planned import source_of, uniform
from tests.tiny import VOCAB, tiny_folder


def text_of(lengths: tuple[int, ...] = (40, 24, 33, 40), seed: int = 0) -> Calibration:
    rng = np.random.default_rng(seed)
    sequences = [
        Sample("x", [int(t) for t in rng.integers(4, VOCAB, n)], i) for i, n in enumerate(lengths)
    ]
    return Calibration(sequences, token_hash(sequences), {})


def mixed(source: Source) -> Plan:
    """Uniform 4-bit but for one layer in 3, one in 6 and one in 8 bits."""
    plan = uniform(source)
    formats = {"q_proj": Format("affine", 3, 64), "o_proj": Format("affine", 6, 32)}
    formats["up_proj"] = Format("affine", 8, 64)
    modules = [
        replace(p, format=formats.get(p.module.path.rpartition(".")[2], p.format))
        for p in plan.modules
    ]
    return replace(plan, modules=tuple(modules))


def kl(source: Source, plan: Plan, rounding: Rounding, text: Calibration) -> float:
    with Judge(source, text.sequences) as judge:
        return float(judge.measure(plan, rounding).mean)


@pytest.mark.parametrize(
    "variant", ["llama", "llama-untied", "llama-bf16", "qwen3_moe", "gemma3_text"]
)
def test_kl_falls_and_codes_and_dtypes_stay(tmp_path: Path, variant: str) -> None:
    source, text = source_of(tmp_path, variant), text_of()
    plan = mixed(source)
    refined = refine(source, plan, MINMAX, text, training=Training(4), progress=False)
    assert kl(source, plan, refined, text) < 0.75 * kl(source, plan, MINMAX, text)
    weights = dict(tree_flatten(load(source).model.parameters()))
    trained = {p.module.path: p.format for p in plan.modules if p.format.bits < 8}
    trained = {path: fmt for path, fmt in trained.items() if weights[f"{path}.weight"].ndim == 2}
    assert refined.fitted.keys() == set(trained.items())
    for (path, fmt), (codes, scales, biases) in refined.fitted.items():
        weight = weights[f"{path}.weight"]
        start = mx.quantize(weight, fmt.group_size, fmt.bits)
        assert mx.array_equal(codes, start[0])
        assert biases is not None
        assert scales.dtype == biases.dtype == weight.dtype
        assert not mx.array_equal(scales, start[1])
    assert refined.norms.keys() == {
        name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 1
    }
    for path, norm in refined.norms.items():
        assert norm.dtype == weights[f"{path}.weight"].dtype
        assert not mx.array_equal(norm, weights[f"{path}.weight"])


def test_the_gradient_is_that_of_stock_layers(tmp_path: Path) -> None:
    """The student with dense layers of the dequantized weights, in plain MLX."""
    source, text = source_of(tmp_path, "llama-untied"), text_of((40, 20))
    plan = mixed(source)
    sequences = [s.tokens for s in text.sequences]
    student = refining._Student(source, plan, MINMAX, refining._Teacher(source, sequences))
    with student.replay:
        value, gradients = student.loss_and_gradients(student.start(), 0)

    teacher, stock = (load_model(source.path)[0] for _ in range(2))
    ids = mx.array([sequences[0]])
    p = mx.softmax(teacher(ids)[0], axis=-1)
    weights: dict[str, mx.array] = dict(tree_flatten(stock.parameters()))
    for planned in plan.modules:
        name, fmt = f"{planned.module.path}.weight", planned.format
        packed = mx.quantize(weights[name], fmt.group_size, fmt.bits)
        weights[name] = mx.dequantize(*packed, fmt.group_size, fmt.bits)

    def loss(weights: dict[str, mx.array]) -> mx.array:
        stock.update(tree_unflatten(list(weights.items())))
        q = stock(ids)[0]
        return mx.sum(p * (mx.log(p) - (q - mx.logsumexp(q, axis=-1, keepdims=True)))) / 30

    expected, slopes = mx.value_and_grad(loss)(weights)
    assert value == pytest.approx(expected.item(), rel=1e-3)
    assert (len(student.layers), len(student.trained)) == (14, 19)
    for n, trained in enumerate(student.trained):
        of = slopes[f"{trained.path}.weight"] * weights[f"{trained.path}.weight"]
        truth = of if of.ndim == 1 else mx.sum(of, axis=-1, keepdims=True)
        near(gradients[f"#{n}"], truth)


def near(found: mx.array, truth: mx.array) -> None:
    assert found.shape == truth.shape
    # Activations are 16-bit fixed point.
    assert mx.abs(found - truth).max() <= 2e-3 * mx.abs(truth).max()


def test_what_a_norm_multiplies_by() -> None:
    weight = mx.random.normal((8,), key=mx.random.key(0))

    class Gated(nn.RMSNorm):
        def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
            return super().__call__(x) * gate

    for layer, gain in (
        (nn.RMSNorm(8), weight),
        (GemmaNorm(8), 1 + weight),
        (nn.LayerNorm(8), weight),
        (Gated(8), None),
        (nn.Linear(8, 8), None),
        (nn.Identity(), None),
    ):
        if gain is None:
            assert multiplied(layer) is None
            continue
        layer.weight = weight
        if "bias" in layer:
            layer.bias = mx.ones(8)
        assert mx.allclose(multiplied(layer), mx.abs(gain), atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = source_of(tmp_path, "llama-bf16"), text_of()
    plan = uniform(source)
    monkeypatch.setattr(refining, "SAVE_EVERY", 3)
    whole = refine(source, plan, MINMAX, text, training=Training(2), progress=False)
    checkpoint = tmp_path / "work" / "refine.safetensors"
    save, update, steps = refining._State.save, refining._State.update, []

    def counted(self: Any, *args: Any) -> None:
        update(self, *args)
        steps.append(self.step)

    def interrupted(self: Any) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(refining._State, "update", counted)
    monkeypatch.setattr(refining._State, "save", interrupted)
    job: dict[str, Any] = {"training": Training(2), "checkpoint": checkpoint, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        refine(source, plan, MINMAX, text, **job)
    monkeypatch.setattr(refining._State, "save", save)
    resumed = refine(source, plan, MINMAX, text, resume=True, **job)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [f.name for f in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert resumed.fitted.keys() == whole.fitted.keys()
    for key, arrays in whole.fitted.items():
        for a, b in zip(arrays, resumed.fitted[key], strict=True):
            assert a is not None
            assert b is not None
            assert mx.array_equal(a, b)

    for other in (Training(2, seed=1), Training(2, 0.1)):
        with pytest.raises(CheckpointError, match=r"another job \((seed|stride): "):
            refine(source, plan, MINMAX, text, resume=True, **{**job, "training": other})
    with pytest.raises(CheckpointError, match=r"another job \(text: "):
        refine(source, plan, MINMAX, text_of(seed=1), resume=True, **job)
    with pytest.raises(CheckpointError, match=r"another job \(rounded model: "):
        refine(source, mixed(source), MINMAX, text, resume=True, **job)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"is damaged .*; start anew with --restart"):
        refine(source, plan, MINMAX, text, resume=True, **job)


@pytest.mark.parametrize("stride", [300.0, 1e38])
def test_a_diverging_run_keeps_the_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stride: float,
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    source = source_of(tmp_path)
    training = Training(stride=stride)
    assert refine(source, uniform(source), MINMAX, text_of(), training=training) is MINMAX
    said = capsys.readouterr().err
    assert "memory: refining takes at most" in said
    assert "refining diverged: KL" in said
    assert "the weights are kept as they were" in said


def test_memory_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    monkeypatch.setattr(refining, "available_memory", lambda: 1_000_000)
    monkeypatch.setattr(refining, "_Teacher", None)
    with pytest.raises(UsageError, match=r"at most 0\.\d+ GB .* are available: leave"):
        refine(source, uniform(source), MINMAX, text_of(), progress=False)
    found = refine(source, uniform(source), MINMAX, text_of(), optional=True, progress=False)
    assert found is MINMAX


@pytest.mark.parametrize("variant", ["llama", "llama-untied", "gemma3_text"])
def test_memory_is_as_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setattr(refining, "LOGITS_BYTES", 32 << 10)  # or nothing else would count
    source, text = source_of(tmp_path, variant), text_of((300, 200))
    plan = uniform(source)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    refine(source, plan, MINMAX, text, progress=False)
    peak = mx.get_peak_memory() - before
    assert 0.1 < peak / refining.memory(plan, text).total <= 1


def test_the_judge_keeps_the_better_rounding(tmp_path: Path) -> None:
    source, text = source_of(tmp_path), text_of()
    plan = uniform(source)

    def good(plan: Plan, rounding: Rounding) -> Rounding:
        training = Training()
        return refine(source, plan, rounding, text, training=training, progress=False)

    better = good(plan, MINMAX)
    before, after = kl(source, plan, MINMAX, text), kl(source, plan, better, text)
    assert after < before

    def judged(**fits: Any) -> tuple[Selection, Rounding]:
        found, rounding = decide(
            source, {"u": plan}, MINMAX, text.sequences, progress=False, **fits
        )
        assert found.selection is not None
        assert found.modules == plan.modules
        return found.selection, rounding

    selection, kept = judged(refine=good)
    assert selection.rounding == "minmax, refined"
    assert [c.rounding for c in selection.candidates] == ["minmax", "minmax, refined"]
    means = [c.kl.mean for c in selection.candidates]
    assert means == pytest.approx([before, after], rel=1e-5)
    assert kl(source, plan, kept, text) == pytest.approx(after, rel=1e-5)

    doubled = {key: (w, s * 2, b) for key, (w, s, b) in better.fitted.items()}
    bad = replace(better, fitted=doubled)
    selection, kept = judged(refine=lambda plan, rounding: bad)
    assert kept is MINMAX
    assert selection.rounding == "minmax"
    assert len(selection.candidates) == 2

    calls: list[Rounding] = []

    def diverging(plan: Plan, rounding: Rounding) -> Rounding:
        calls.append(rounding)
        return rounding

    fitted = replace(better, method="descent")
    selection, kept = judged(fit=lambda plan: fitted, refine=diverging)
    assert calls == [fitted]
    assert kept is fitted
    assert [c.rounding for c in selection.candidates] == ["minmax", "descent"]


def test_unmeasured_it_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with pytest.raises(UsageError, match="--refine is kept only where it lowers measured KL"):
        decide(source, {"u": uniform(source)}, MINMAX, [], refine=lambda *_: MINMAX, progress=False)


def test_convert_refines_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    job: dict[str, Any] = {"tokens": 320, "held_out_tokens": 320, "refine_tokens": 640}
    kept: Any = vars(conversion)["export"]

    def full(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "export", full)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", progress=False, **job)
    state = work_folder(tmp_path / "out") / refining.CHECKPOINT
    assert state.exists()
    with pytest.raises(UsageError, match="holds unfinished work"):
        convert(folder, tmp_path / "out", progress=False, **job)
    monkeypatch.setattr(conversion, "export", kept)
    monkeypatch.setattr(refining._State, "update", None)  # nothing is trained twice
    convert(folder, tmp_path / "out", resume=True, progress=False, **job)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    plan = json.loads((tmp_path / "out" / "optiq" / "plan.json").read_text())
    assert plan["selection"]["candidates"][-1]["rounding"].endswith(", refined")
    before, after = (
        dict(tree_flatten(load_model(at)[0].parameters())) for at in (folder, tmp_path / "out")
    )
    for path in ("model.norm", "model.layers.1.input_layernorm"):
        assert not mx.array_equal(before[f"{path}.weight"], after[f"{path}.weight"])
