"""measure(): what it returns, stops and resumes, refuses, and says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from optiq.base import checkpoint
from optiq.base import progress as progress_module
from optiq.base.machine import machine
from optiq.base.memory import available_memory
from optiq.errors import CheckpointError, UsageError
from optiq.formats import DENSE, Format
from optiq.models.roles import Role, allowed, fixed_bytes, quantizable
from optiq.planning.files import read_scores
from optiq.planning.scores import Scores
from optiq.quantize.options import Options
from optiq.quantize.rounding import reference
from optiq.quantize.sensitivity import job
from optiq.sources import load
from tests.quantize.sensitivity.cases import MENU, calibration, measure, tiny_source

TEXT = calibration(14, 23, 9)


def numbers(scores: dict[str, Any]) -> Any:
    return scores["modules"]


@pytest.mark.parametrize("name", ["llama tied", "qwen3_moe"])
@pytest.mark.parametrize("method", ["kl", "fisher"])
def test_every_module_has_a_score_for_every_allowed_format(
    tmp_path: Path, name: str, method: str
) -> None:
    source = tiny_source(tmp_path, name)
    found = measure(source, menu=MENU, calibration=TEXT, method=method, progress=False)
    modules = quantizable(load_model(source.path)[0])
    assert [row["path"] for row in found["modules"]] == [m.path for m in modules]
    if name == "qwen3_moe":
        assert sum(row["role"] == "expert" for row in found["modules"]) == 6
    for row, m in zip(found["modules"], modules, strict=True):
        assert row.keys() == {"path", "role", "unit", "block", "shape", "tied", "stock", "scores"}
        assert row["shape"] == list(m.shape)
        assert row["block"] == m.block
        assert list(row["scores"]) == [str(fmt) for fmt in allowed(m, MENU)]
        for fmt, score in row["scores"].items():
            dense = fmt == "bf16"
            if dense:
                assert score == {"kl": 0, "se": 0, "mse": 0}
                continue
            exact = method == "kl" or m.role is Role.HEAD
            flips = {"flips"} if exact and m.role is Role.ROUTER else set()
            assert score.keys() == {"kl", "se", "mse", "method"} | flips
            assert score["kl"] > 0
            assert score["se"] > 0
            assert score["method"] == ("kl" if exact else "fisher")
    Scores.from_json(found).save(tmp_path / "s.json")
    assert read_scores(tmp_path / "s.json").to_json() == found
    with (source.path / "model.safetensors").open("rb") as file:
        assert found["model"].pop("header_bytes") > int.from_bytes(file.read(8), "little")
    assert found["model"] == {
        "name": Path(source.name).name,
        "fingerprint": source.fingerprint,
        "model_type": name.split()[0],
        "dtype": "float32",
        "itemsize": 4,
        "fixed_bytes": fixed_bytes(load_model(source.path)[0], modules),
        "tower_bytes": 0,
        "departures": [],
        "kind": "folder",
        "path": str(Path(source.name).resolve()),
    }
    assert found["calibration"] == {
        "source": "optiq.jsonl",
        "tokens": 46,
        "sequences": 3,
        "tokens_per_domain": {"prose": 46},
        "sha256": TEXT.sha256,
        "seed": 0,
    }
    assert found["method"] == method
    assert found["reference"] == "bf16"
    assert found["versions"].keys() == {"optiq", "mlx", "mlx_lm"}
    assert found["machine"]["cores"] >= 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["kl", "fisher"])
@pytest.mark.parametrize("where", ["bf16", "uniform4"])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 24)  # three batches
    source = tiny_source(tmp_path, "llama tied")
    menu = [Format("affine", 4, 64), Format("affine", 8, 64)]
    kept = tmp_path / "checkpoint.json"

    def run(**options: Any) -> Any:
        return measure(source, menu=menu, calibration=TEXT, method=method, reference=where,
                       progress=False, **options)  # fmt: skip

    saves: list[Path] = []
    write = checkpoint.write

    def save(path: Path, *content: Any) -> None:
        saves.append(path)
        write(path, *content)

    monkeypatch.setattr(checkpoint, "write", save)
    whole = numbers(run())
    steps = {"kl": 3 * 4, "fisher": 3}[method]  # per batch: 4 groups of modules, or 1
    original = progress_module.Progress.step
    before_stops = []
    for stop in range(1, 60, 11):
        seen = 0

        def step(self: Any, n: float = 1, note: str = "", stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt
            original(self, n, note)

        with monkeypatch.context() as patch:
            patch.setattr(progress_module.Progress, "step", step)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=kept)
        before_stops.append(len(saves))
        assert numbers(run(checkpoint=kept, resume=True)) == whole
        assert saves.count(kept) == steps  # what was done before the stop is not done again
        assert numbers(run(checkpoint=kept, resume=True)) == whole
        assert saves.count(kept) == steps
        kept.unlink(missing_ok=True)
        saves.clear()
    assert before_stops[0] == 0
    assert before_stops[-1] > 0
    assert not list(tmp_path.glob(".checkpoint*"))


def test_checkpoints_of_other_measurements_are_refused(tmp_path: Path) -> None:
    source, kept = tiny_source(tmp_path, "llama tied"), tmp_path / "c.json"

    def run(**options: Any) -> Any:
        options = {"menu": MENU[:2], "calibration": TEXT, "method": "fisher", "progress": False,
                   "checkpoint": kept, "resume": True} | options  # fmt: skip
        return measure(source, **options)

    first = run()
    with pytest.raises(CheckpointError, match=r"another job \(calibration"):
        run(calibration=calibration(14, 23, 9, seed=1))
    with pytest.raises(CheckpointError, match=r"another job \(menu"):
        run(menu=MENU)
    with pytest.raises(
        CheckpointError, match=r'job \(method: "fisher" then, "kl" now; seed: 0 then, 1 now\)'
    ):
        run(method="kl", seed=1)
    kept.write_text("{}")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run()
    assert numbers(run(resume=False)) == numbers(first)  # without resume it starts anew


def test_the_reference_of_the_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    source, kept = tiny_source(tmp_path, "llama tied"), tmp_path / "c.json"

    def run(memory: int, **options: Any) -> Any:
        monkeypatch.setattr(reference, "available_memory", lambda: memory)
        return measure(
            source, method="kl", menu=MENU[1:2], calibration=TEXT, checkpoint=kept, **options
        )

    for before, now, chosen in ((1 << 40, 1 << 16, "bf16"), (1 << 16, 1 << 40, "uniform4")):
        first = run(before)
        assert first["reference"] == chosen
        again = run(now, resume=True)
        assert (again["reference"], numbers(again)) == (chosen, numbers(first))
        assert f"reference {chosen}: as in the checkpoint" in capsys.readouterr().err
        other = {"bf16": "uniform4", "uniform4": "bf16"}[chosen]
        with pytest.raises(CheckpointError, match=r"another job \(reference"):
            run(before, resume=True, reference=other)  # what is asked for outright is not changed
        assert run(now)["reference"] == other  # nor is anything kept without resume
        kept.unlink()
        assert run(now, resume=True)["reference"] == other
        kept.unlink()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_out_of_range_is_refused_before_any_work(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed {seed} is not between 0 and 4294967295"):
        Options.parse(seed=seed)


def test_the_largest_seed_works(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    found = measure(source, menu=MENU[:1], calibration=TEXT, seed=2**32 - 1, progress=False)
    assert found["calibration"]["seed"] == 2**32 - 1


def test_options_are_chosen_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    dense, routed = (tiny_source(tmp_path, name) for name in ("llama tied", "qwen3_moe"))
    for source, memory, chosen in (
        (dense, 1 << 16, "bf16"),  # its blocks are read one by one
        (routed, 1 << 40, "bf16"),
        (routed, 1 << 16, "uniform4"),
    ):
        monkeypatch.setattr(reference, "available_memory", lambda memory=memory: memory)
        found = measure(source, menu=MENU[1:3], calibration=TEXT)
        assert (found["method"], found["reference"]) == ("auto", chosen)
        said = capsys.readouterr().err
        assert (f"reference {chosen}: " in said) is (chosen == "uniform4")  # what is unusual
    with pytest.raises(UsageError, match="reference 'x'"):
        measure(source, menu=MENU, calibration=TEXT, reference="x")
    with pytest.raises(UsageError, match="method 'x'"):
        measure(source, menu=MENU, calibration=TEXT, method="x")


def test_a_loaded_model_is_used_and_16_bit_weights_work(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama untied", dtype="bfloat16")
    loaded = load(source)
    found = measure(source, loaded=loaded, menu=MENU[:2], calibration=TEXT, progress=False)
    assert (found["model"]["dtype"], found["model"]["itemsize"]) == ("bfloat16", 2)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    again = measure(source, menu=MENU[:2], calibration=TEXT, progress=False)
    assert numbers(found) == numbers(again)


def test_a_menu_of_bf16_alone_needs_no_probe(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    for method in ("kl", "fisher"):
        found = measure(source, menu=[DENSE], calibration=TEXT, method=method, progress=False)
        dense = {"bf16": {"kl": 0, "se": 0, "mse": 0}}
        assert all(row["scores"] == dense for row in found["modules"])


def test_machine_is_described() -> None:
    described = machine()
    assert described["memory_bytes"] > available_memory() > 0
    assert described["cpu"]
