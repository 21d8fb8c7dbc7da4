"""Training against stock mlx-lm's layers and optimizer, finite differences, and itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers

from optiq import lora
from optiq.cli import main
from optiq.errors import AdapterError, CheckpointError, UsageError
from optiq.lora import start
from optiq.lora import training as trainer
from optiq.lora.data import Sample, read
from optiq.lora.layers import LowRank
from optiq.lora.options import Training
from optiq.lora.packing import pack, packable
from optiq.lora.state import State, learning_rate
from optiq.lora.training import batch_of, checkpoint_of, parameters_of
from optiq.lora.tuned import Tuned
from optiq.nn.accelerate import accelerate
from optiq.ops import native
from optiq.sources import load, resolve
from tests.lora.models import mixed_folder, rows, write_rows
from tests.tiny import VOCAB, tiny_folder

KINDS = ("llama", "qwen2", "gemma3_text")
# Natively activations are 16-bit fixed point.
NATIVE = 2e-3


def opened(folder: Path) -> nn.Module:
    model = load(resolve(str(folder)), allow_quantized=True).model
    accelerate(model, blocks=False)
    return model


def random_terms(model: nn.Module, rank: int = 3) -> dict[str, LowRank]:
    terms = start.zero(start.chosen(model, "all"), ranks_of(model, rank), 0)
    return {
        path: LowRank(a, 0.05 * mx.random.normal(b.shape, key=mx.random.key(i)))
        for i, (path, (a, b)) in enumerate(terms.items())
    }


def ranks_of(model: nn.Module, rank: int) -> dict[str, int]:
    return {m.path: rank for m in start.chosen(model, "all")}


def samples(*lengths: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(tuple(int(t) for t in rng.integers(4, VOCAB, n)), tuple(range(n // 2, n)), i)
        for i, n in enumerate(lengths, start=1)
    ]


def stock(folder: Path, terms: dict[str, LowRank], scale: float) -> nn.Module:
    """mlx-lm's own model and layers with the same terms."""
    model = stock_load(str(folder))[0]
    model.freeze()
    rank = next(iter(terms.values())).rank
    config = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(terms)}
    linear_to_lora_layers(model, 0, config)
    model.load_weights(list(parameters_of(terms).items()), strict=False)
    return model


def stock_loss(model: nn.Module, batch: list[Sample]) -> mx.array:
    total, count = mx.array(0.0), 0
    for sample in batch:
        logits = model(mx.array([sample.tokens]))[0]
        places = mx.array(sample.trained)
        labels = mx.array(sample.tokens)[places]
        total = total + nn.losses.cross_entropy(logits[places - 1], labels, reduction="sum")
        count += len(sample.trained)
    return total / count


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_stock_layers(
    tmp_path: Path, kind: str, recompute: bool
) -> None:
    folder, batch = mixed_folder(tmp_path, kind), samples(20, 9, 14)
    model = opened(folder)
    terms = random_terms(model)
    tuned = Tuned(model, terms, 2.0, recompute=recompute)
    count = sum(len(s.trained) for s in batch)
    assert tuned.alone == ""
    with tuned:
        (together,) = tuned.packs(batch, 64)
        loss, found = tuned.loss_and_gradients(
            tuned.parameters(), lambda: mx.sum(tuned.losses(together)) / count
        )
    theirs = stock(folder, terms, 2.0)
    expected, slopes = nn.value_and_grad(theirs, stock_loss)(theirs, batch)
    assert loss == pytest.approx(expected.item(), rel=NATIVE)
    flat = dict(tree_flatten(slopes))
    assert found.keys() == flat.keys()
    for name, slope in flat.items():
        assert mx.abs(found[name] - slope).max() <= 0.02 * mx.abs(slope).max(), name


@pytest.mark.parametrize("recompute", [True, False])
def test_logits_in_parts_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    model, batch = opened(mixed_folder(tmp_path)), samples(20, 9, 14)
    tuned = Tuned(model, random_terms(model), 2.0, recompute=recompute)
    found = []
    with tuned:
        (together,) = tuned.packs(batch, 64)
        for rows in (1000, 4, 1):
            monkeypatch.setattr("optiq.lora.tuned.LOGITS_BYTES", 4 * VOCAB * rows)
            weigh = mx.arange(len(together.learned)) % 3  # each token counts by its own weight
            of = partial(lambda w: mx.sum(w * tuned.losses(together)), weigh)
            found.append(tuned.loss_and_gradients(tuned.parameters(), of))
    (loss, slopes), *others = found
    for value, gradients in others:
        assert value == pytest.approx(loss, rel=1e-5)
        for name, slope in slopes.items():
            assert mx.abs(gradients[name] - slope).max() <= 2e-3 * mx.abs(slope).max(), name


def test_gradients_are_those_of_finite_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "extension", None)  # float32 all through
    model, batch = opened(mixed_folder(tmp_path)), samples(16, 12)
    tuned = Tuned(model, random_terms(model), 2.0, recompute=True)
    with tuned:
        (together,) = tuned.packs(batch, 64)

        def loss() -> mx.array:
            return mx.sum(tuned.losses(together))

        at = tuned.parameters()
        _, gradients = tuned.loss_and_gradients(at, loss)
        for seed in range(3):
            keys = mx.random.split(mx.random.key(seed), len(at))
            along = {
                name: mx.random.normal(a.shape, key=key)
                for (name, a), key in zip(at.items(), keys, strict=True)
            }
            slope = sum(float(mx.sum(gradients[n] * along[n]).item()) for n in at)
            step, values = 1e-3, []
            for sign in (1, -1):
                tuned.set({n: a + sign * step * along[n] for n, a in at.items()})
                values.append(float(loss().item()))
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_sees_another(tmp_path: Path, kind: str) -> None:
    model = opened(mixed_folder(tmp_path, kind))
    tuned = Tuned(model, random_terms(model), 2.0, recompute=False)
    first, second, third = samples(30, 11, 17)
    other = Sample(tuple(reversed(first.tokens)), first.trained, 9)
    n = len(first.trained)
    with tuned:
        (one,), (two,) = pack([first, second, third], 64), pack([other, second, third], 64)
        assert [s.line for s in one.samples] == [1, 3, 2]
        a, b = tuned.losses(one), tuned.losses(two)
        assert mx.array_equal(a[n:], b[n:])
        assert not mx.allclose(a[:n], b[:n])
        alone = mx.concatenate([tuned.losses(pack([s], 64)[0]) for s in (first, third, second)])
        assert mx.abs(a - alone).max() <= NATIVE * mx.abs(alone).max()


def test_packs_hold_every_sample_once_and_keep_their_limit() -> None:
    every = samples(*range(3, 40, 2))
    packs = pack(every, 48)
    assert sorted(s.line for p in packs for s in p.samples) == list(range(1, len(every) + 1))
    assert all(len(p.tokens) <= 48 for p in packs)
    assert len(packs) <= -(-sum(len(s.tokens) for s in every) // 48) + 1
    for packed in packs:
        wanted = [s.tokens[i] for s in packed.samples for i in s.trained]
        assert [packed.tokens[i] for i in packed.learned] == wanted


class Positions(nn.Module):
    """A model that learns where a token stands."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(64, 8)
        self.layers = [nn.Linear(8, 8)]

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self.layers[0](self.places(mx.arange(ids.shape[1]))[None])


def test_a_model_that_counts_places_is_not_packed() -> None:
    assert packable(Positions()).startswith("packed they differ")


def test_the_loss_curve_is_that_of_stock_layers_and_adamw(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    data = write_rows(tmp_path / "data", rows(12))
    fields: dict[str, Any] = {"iters": 8, "batch_size": 3, "rank": 4, "learning_rate": 5e-3}
    result = lora.train(str(folder), data, tmp_path / "adapter", progress=False, **fields)

    options, model = Training(**fields), opened(folder)
    terms = start.zero(start.chosen(model, "all"), ranks_of(model, 4), 0)
    theirs = stock(folder, terms, options.scale)
    every = read(data, stock_load(str(folder))[1], 2048).train
    adam = optimizers.AdamW(0.0, weight_decay=options.weight_decay, bias_correction=True)
    step = nn.value_and_grad(theirs, stock_loss)
    for i in range(8):
        loss, slopes = step(theirs, batch_of(every, options, i))
        slopes, norm = optimizers.clip_grad_norm(slopes, options.clip)
        adam.learning_rate = learning_rate(options, i)
        adam.update(theirs, slopes)
        assert result.updates[i].loss == pytest.approx(loss.item(), abs=1e-3), i
        assert result.updates[i].norm == pytest.approx(norm.item(), rel=0.02)
    assert result.updates[-1].loss < result.updates[0].loss - 0.1


def test_passes_of_a_batch_add_up(tmp_path: Path) -> None:
    folder, data = str(mixed_folder(tmp_path)), write_rows(tmp_path / "data", rows(12))
    fields: dict[str, Any] = {"iters": 3, "batch_size": 6, "rank": 2, "learning_rate": 1e-3}
    one, many = (
        lora.train(folder, data, tmp_path / str(n), progress=False, pack_length=n, **fields)
        for n in (2048, 64)
    )
    for a, b in zip(one.updates, many.updates, strict=True):
        assert (a.tokens, a.rate) == (b.tokens, b.rate)
        assert a.tokens > 2 * 64
        assert b.loss == pytest.approx(a.loss, abs=1e-4)
    for path, term in one.adapter.terms.items():
        for x, y in zip(term, many.adapter.terms[path], strict=True):
            assert mx.abs(x - y).max() <= 1e-3 * mx.abs(x).max()


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    options = Training(iters=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(options, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_every_row_is_seen_once_in_an_epoch() -> None:
    every, options = samples(*range(5, 15)), Training(batch_size=4)
    seen = [s.line for i in range(5) for s in batch_of(every, options, i)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11))
    assert seen[:10] != seen[10:]


FIELDS: dict[str, Any] = {"iters": 7, "batch_size": 2, "rank": 2, "save_every": 2, "eval_every": 3}


def tensors(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "adapters.safetensors")))  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", [{}, {"init": "pissa", "ranks": "sensitivity"}])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: dict[str, Any]
) -> None:
    folder, fields = str(mixed_folder(tmp_path)), {**FIELDS, **begin}
    data = write_rows(tmp_path / "data", rows(9), rows(3, 1))
    whole = lora.train(folder, data, tmp_path / "whole", progress=False, **fields)
    update, out = State.update, tmp_path / "cut"

    def dies(self: State, *args: Any) -> None:
        if self.step == 5:  # a step after the last save
            raise KeyboardInterrupt
        update(self, *args)

    monkeypatch.setattr(State, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        lora.train(folder, data, out, progress=False, **fields)
    assert checkpoint_of(out).exists()
    assert not out.exists()
    monkeypatch.setattr(State, "update", update)
    with pytest.raises(UsageError, match="--resume"):
        lora.train(folder, data, out, progress=False, **fields)
    with pytest.raises(CheckpointError, match="options"):
        lora.train(folder, data, out, progress=False, resume=True, **{**fields, "seed": 5})
    with pytest.raises(UsageError, match="choose one"):
        lora.train(folder, data, out, progress=False, resume=True, restart=True, **fields)
    resumed = lora.train(folder, data, out, progress=False, resume=True, **fields)
    assert resumed.updates == whole.updates
    assert resumed.judged == whole.judged
    assert not checkpoint_of(out).exists()
    a, b = tensors(tmp_path / "whole"), tensors(out)
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from optiq import lora

replace, saved = Path.replace, []

def dies(self, target):
    if self.name.endswith(".optiq-training.safetensors"):
        saved.append(self)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = dies
model, data, out, fields = json.loads(sys.argv[1])
lora.train(model, data, out, progress=False, **fields)
"""


def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder, out = str(mixed_folder(tmp_path)), tmp_path / "cut"
    data = write_rows(tmp_path / "data", rows(9), rows(3, 1))
    job = json.dumps([folder, str(data), str(out), FIELDS])
    process = subprocess.run([sys.executable, "-c", KILLED, job], stderr=subprocess.PIPE, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not out.exists()
    state = mx.load(str(checkpoint_of(out)), return_metadata=True)[1]
    assert len(json.loads(state["updates"])) == 4  # of 6 that were made
    resumed = lora.train(folder, data, out, progress=False, resume=True, **FIELDS)
    whole = lora.train(folder, data, tmp_path / "whole", progress=False, **FIELDS)
    assert resumed.updates == whole.updates
    assert resumed.judged == whole.judged
    a, b = tensors(tmp_path / "whole"), tensors(out)
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(mixed_folder(tmp_path))
    data = write_rows(tmp_path / "data", rows(9), rows(3, 1))
    good, kept = Tuned.loss_and_gradients, {}

    def broken(self: Tuned, parameters: Any, of: Any) -> Any:
        kept["last"] = dict(parameters)
        loss, gradients = good(self, parameters, of)
        return (float("nan") if len(calls) == 3 else loss), (calls.append(1) or gradients)

    calls: list[int] = []
    monkeypatch.setattr(Tuned, "loss_and_gradients", broken)
    options = {**FIELDS, "eval_every": 1, "learning_rate": 1e-3}
    with pytest.raises(AdapterError, match=r"the loss is nan in update 4 .* rows of lines"):
        lora.train(folder, data, tmp_path / "out", progress=False, **options)
    written = lora.read(tmp_path / "out")
    assert len(written.made["updates"]) == 3
    best = min(written.made["judged"], key=lambda j: j["loss"])
    assert best["step"] == 3
    found = parameters_of(dict(written.terms))
    assert all(mx.array_equal(found[name], a) for name, a in kept["last"].items())


def test_training_stops_early_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(mixed_folder(tmp_path))
    data = write_rows(tmp_path / "data", rows(9), rows(3, 1))
    losses = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    monkeypatch.setattr(trainer.Run, "_held_out_loss", lambda self: next(losses))
    options = {**FIELDS, "iters": 20, "eval_every": 1, "patience": 2}
    result = lora.train(folder, data, tmp_path / "out", progress=False, **options)
    assert [j.step for j in result.judged] == [0, 1, 2, 3]
    assert result.held_out_loss == 2.0
    assert len(result.updates) == 3


def test_experts_are_refused_and_attention_is_not(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path, "qwen3_moe"))
    data = write_rows(tmp_path / "data", rows(4))
    with pytest.raises(UsageError, match="experts, which cannot be adapted"):
        lora.train(folder, data, tmp_path / "out", progress=False, iters=1)
    result = lora.train(
        folder, data, tmp_path / "out", progress=False, iters=1, targets="attention"
    )
    assert {path.split(".")[-2] for path in result.adapter.ranks} == {"self_attn"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("iters", 0), ("learning_rate", float("nan")), ("clip", 0.0), ("warmup", -1),
     ("weight_decay", -1.0), ("init", "x"), ("targets", "x"), ("scale", float("inf"))],
)  # fmt: skip
def test_options_that_cannot_be_honoured_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        Training(**{field: value})


def test_memory_that_does_not_suffice_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = mixed_folder(tmp_path), write_rows(tmp_path / "data", rows(4))
    monkeypatch.setattr(trainer, "available_memory", lambda: 1000)
    monkeypatch.setattr(start, "moments", lambda *_: pytest.fail("begun before memory was said"))
    with pytest.raises(UsageError, match=r"ranks and beginning .* lower --max-length"):
        lora.train(
            str(folder), data, tmp_path / "out", progress=False,
            init="qera", original=str(tiny_folder(tmp_path, name="dense")),
        )  # fmt: skip


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        lora.train("anything", tmp_path, tmp_path / "out")
    assert json.dumps([p.name for p in (tmp_path / "out").iterdir()]) == '["mine"]'


def test_the_command_writes_adapter_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data", rows(6), rows(2, 1))
    command = ["lora", "train", str(mixed_folder(tmp_path)), "--data", str(data)]
    command += ["-o", str(tmp_path / "out"), "--iters", "2", "--rank", "2", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["updates"]) == 2
    assert said["held_out_loss"] == min(j["loss"] for j in said["judged"])
    assert "<svg" in (tmp_path / "out" / "optiq" / "report.html").read_text()
    assert lora.read(tmp_path / "out").ranks == said["ranks"]


@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_damaged_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = str(mixed_folder(tmp_path))
    data, out = write_rows(tmp_path / "data", rows(5)), tmp_path / "out"
    save = State.save

    def stopped(self: State, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        lora.train(folder, data, out, progress=False, **FIELDS)
    file = checkpoint_of(out)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        mx.save_safetensors(str(file), {"x": mx.zeros(3)})
    with pytest.raises(CheckpointError, match=r"is damaged.*--restart"):
        lora.train(folder, data, out, progress=False, resume=True, **FIELDS)
    monkeypatch.setattr(State, "save", save)
    anew = lora.train(folder, data, out, progress=False, restart=True, **FIELDS)
    assert len(anew.updates) == FIELDS["iters"]
    assert not file.exists()
