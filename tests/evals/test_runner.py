"""Whole runs on a tiny model: what a killed run leaves is finished to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.cli import main
from optiq.errors import EvalError, SourceError, UsageError
from optiq.evals import judge, records
from optiq.evals.engine import Engine
from optiq.evals.runner import evaluate
from optiq.evals.tasks import bfcl, generation, gsm8k, humaneval, ifeval
from optiq.quantize.convert import convert
from tests.evals import questions
from tests.evals.test_tasks import run_here
from tests.tiny import tiny_folder

TASKS = ("mmlu", "gsm8k", "ifeval", "bfcl", "humaneval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion, whose plan.json names the model it was made from."""
    home = tmp_path_factory.mktemp("evals")
    tiny_folder(home, name="source")
    convert(str(home / "source"), home / "out", tokens=320, held_out_tokens=320, progress=False)
    return home / "out"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers, two items to a wave, little text, and no sandbox."""
    for module in (gsm8k, ifeval, bfcl, humaneval):
        monkeypatch.setattr(module, "MAX_TOKENS", 6)
    monkeypatch.setattr(generation, "WAVE", 2)
    monkeypatch.setattr("optiq.evals.tasks.kl.HELD_OUT_TOKENS", 320)
    monkeypatch.setattr(judge, "sandboxed", lambda: run_here)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return questions.write(tmp_path / "data", monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_the_whole_suite(model: Path, data: Path, tmp_path: Path) -> None:
    summary, out = evaluate(str(model), data_folder=data, out=tmp_path / "r", progress=False)
    counts = {"mmlu": 8, "gsm8k": 6, "ifeval": 3, "bfcl": 3, "humaneval": 4}
    assert sorted(contents(out)) == sorted(f"{task}.jsonl" for task in (*TASKS, "kl"))
    for task in TASKS:
        header, found = records.read(out / f"{task}.jsonl")
        assert header.limit is None
        assert header.items == len(found) == counts[task] == len({r.id for r in found})
        facts = summary["tasks"][task]
        assert facts["done"] == facts["items"] == counts[task]
        first = next(iter(facts["metrics"].values()))
        assert first["low"] <= first["value"] <= first["high"]
    assert {r.group for r in records.read(out / "mmlu.jsonl")[1]} == set(questions.SUBJECTS)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["capability"]["n"] == sum(counts.values())
    assert summary["quick_look"] is False
    assert summary["left_out"] == {}
    plan = json.loads((model / "optiq" / "plan.json").read_text())
    assert summary["size"]["nbytes"] == plan["nbytes"]
    assert summary["size"]["bpw"] == pytest.approx(plan["bpw"])
    weights = (model / "model.safetensors").stat().st_size
    assert summary["size"]["weight_file_bytes"] == weights
    # The same rows of the same text that the conversion measured itself on.
    divergence = summary["tasks"]["kl"]["divergence"]
    assert divergence["tokens"] == plan["measured"]["tokens"]
    for key, value in plan["measured"]["kl"].items():
        assert divergence["kl"][key] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("task", [*TASKS, "kl"])
def test_a_killed_run_is_finished_to_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Killed while the second wave runs, and again while it is being written."""

    def go(name: str, **options: Any) -> dict[str, Any]:
        folder = tmp_path / name
        how = {"suite": task, "data_folder": data, "progress": False, "out": folder}
        return evaluate(str(model), **{**how, **options})[0]

    go("whole")
    whole = contents(tmp_path / "whole")[f"{task}.jsonl"]
    append, written = records.append, []

    def die(path: Path, found: list[records.Record]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(None)
        append(path, found)

    monkeypatch.setattr(records, "append", die)
    with pytest.raises(KeyboardInterrupt):
        go("killed")
    monkeypatch.setattr(records, "append", append)
    path = tmp_path / "killed" / f"{task}.jsonl"
    half = path.read_bytes()
    assert whole.startswith(half)
    assert half.count(b"\n") > 1
    with pytest.raises(EvalError, match="holds results already; --resume goes on"):
        go("killed")
    for torn in (len(half), len(half) + 20, len(whole) - 1):
        path.write_bytes(whole[:torn])
        summary = go("killed", resume=True)
        assert path.read_bytes() == whole
        assert summary["tasks"][task]["done"] == summary["tasks"][task]["items"]


def test_finished_parts_are_not_asked_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"suite": "gsm8k", "data_folder": data, "out": tmp_path / "r", "progress": False}
    first, out = evaluate(str(model), **how)
    assert first["tasks"]["gsm8k"]["seconds"] >= 0
    before = contents(out)

    def never(*_: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(Engine, "answers", never)
    again, _ = evaluate(str(model), **how, resume=True)
    assert contents(out) == before
    assert again == first


def test_another_run_is_refused_before_anything_is_asked(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"data_folder": data, "out": tmp_path / "r", "progress": False, "resume": True}
    evaluate(str(model), suite="humaneval", **how)
    before = contents(tmp_path / "r")
    monkeypatch.setattr(Engine, "log_likelihoods", None)  # MMLU comes first
    with pytest.raises(EvalError, match=r"humaneval.jsonl was made with another items \(4, now 2"):
        evaluate(str(model), limit=2, **how)
    source = model.parent / "source"
    with pytest.raises(EvalError, match=r"humaneval.jsonl was made with another fingerprint"):
        evaluate(str(source), **how)
    assert contents(tmp_path / "r") == before


def test_a_quick_look_lies_apart_and_says_so(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(model), "--suite", "gsm8k", "--limit", "2", "--data", str(data)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("QUICK LOOK")
    assert "GSM8K, 3-shot" in text
    out = model / "optiq" / "evals" / "limit-2"
    assert str(out) in text
    header, found = records.read(out / "gsm8k.jsonl")
    assert (header.limit, header.items) == (2, 2)
    assert [r.id for r in found] == ["test/5", "test/4"]  # the manifest's order
    assert main(command) == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quick_look"] is True


def test_size_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), "--suite", "size", "-o", str(tmp_path)]) == 0
    plan = json.loads((model / "optiq" / "plan.json").read_text())
    assert f"{plan['bpw']:.3f} bits per weight" in capsys.readouterr().out
    found = json.loads((tmp_path / "size.json").read_text())
    assert (found["nbytes"], found["model"]) == (plan["nbytes"], str(model))


def test_full_asks_what_the_sample_leaves_out(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = questions.fit_manifest(data, monkeypatch)
    for name, keep in (("mmlu", 3), ("gsm8k", 2)):
        manifest[name]["ids"] = manifest[name]["ids"][:keep]
    for suite, full, count in (
        ("mmlu", False, 3),
        ("mmlu", True, 8),
        ("gsm8k", False, 2),
        ("gsm8k", True, 6),
    ):
        out = tmp_path / f"{suite}-{full}"
        how: Any = {"suite": suite, "data_folder": data, "out": out, "progress": False}
        assert evaluate(str(model), full=full, **how)[0]["tasks"][suite]["items"] == count


def test_kl_needs_a_reference(model: Path, data: Path, tmp_path: Path) -> None:
    source = model.parent / "source"
    how: Any = {"data_folder": data, "progress": False}
    with pytest.raises(UsageError, match=r"optiq did not make this .*--reference MODEL"):
        evaluate(str(source), suite="kl", out=tmp_path / "a", **how)
    summary, _ = evaluate(str(source), out=tmp_path / "b", **how)
    assert "--reference" in summary["left_out"]["kl"]
    assert "kl" not in summary["tasks"]
    given, _ = evaluate(str(source), suite="kl", reference=str(model), out=tmp_path / "c", **how)
    assert given["tasks"]["kl"]["divergence"]["kl"]["mean"] > 0
    with pytest.raises(SourceError, match="neither an existing folder"):
        evaluate(str(source), suite="kl", reference="nothing", out=tmp_path / "d", **how)
    changed = source / "config.json"
    before = changed.read_text()
    changed.write_text(before + " ")  # another fingerprint
    try:
        summary, _ = evaluate(str(model), suite="capability", out=tmp_path / "e", **how)
    finally:
        changed.write_text(before)
    assert "is not the model this one was made from" in summary["left_out"]["kl"]


def test_a_model_without_a_chat_template(data: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    summary, out = evaluate(str(folder), data_folder=data, out=tmp_path / "r", progress=False)
    assert summary["capability"] is not None
    assert "as text" in records.read(out / "gsm8k.jsonl")[0].protocol


def test_missing_questions_stop_before_the_first_is_asked(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "humaneval" / "HumanEval.jsonl").unlink()
    out = tmp_path / "r"
    assert main(["eval", str(model), "--data", str(data), "-o", str(out)]) == 1
    message = capsys.readouterr().err
    assert "has no data set humaneval" in message
    assert "Traceback" not in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "arc"], "no suite is called 'arc'; use one of capability, mmlu"),
        (["--full", "--limit", "3"], "give one of them"),
        (["--data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_wrong_usage(
    model: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["eval", str(model), *argv]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (model / "optiq" / "evals" / "mmlu.jsonl").exists()


def test_where_nothing_can_be_written(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="-o"):
        evaluate(str(model), suite="gsm8k", data_folder=data, out=tmp_path / "file" / "r")
