"""Whole runs on a tiny model: what a killed run leaves is finished to the same bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from optiq.cli import main
from optiq.errors import CheckpointError, EvalError, SourceError, UsageError
from optiq.evals import programs, records
from optiq.evals.engine import Engine
from optiq.evals.runner import evaluate
from optiq.evals.summary import Summary
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
    monkeypatch.setattr(programs, "sandboxed", lambda: run_here)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return questions.write(tmp_path / "data", monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_the_whole_suite(model: Path, data: Path, tmp_path: Path) -> None:
    summary = evaluate(model, tmp_path / "r", data=data, progress=False)
    out = tmp_path / "r"
    assert summary.folder == out
    counts = {"mmlu": 8, "gsm8k": 6, "ifeval": 3, "bfcl": 3, "humaneval": 4}
    assert sorted(contents(out)) == sorted(f"{task}.jsonl" for task in (*TASKS, "kl"))
    for task in TASKS:
        header, answered = records.read(out / f"{task}.jsonl")
        assert header.limit is None
        assert header.items == len(answered) == counts[task] == len({r.id for r in answered})
        found = summary.tasks[task]
        assert found.done == found.header.items == counts[task]
        first = next(iter(found.metrics.values()))
        assert first.low <= first.value <= first.high
    assert {r.group for r in records.read(out / "mmlu.jsonl")[1]} == set(questions.SUBJECTS)
    check_file(json.loads((out / "summary.json").read_text()), summary)
    assert summary.capability
    assert summary.capability.n == sum(counts.values())
    assert not summary.quick_look
    assert summary.left_out == {}
    plan = json.loads((model / "optiq" / "plan.json").read_text())
    assert summary.size
    assert summary.size.nbytes == plan["nbytes"]
    assert summary.size.bpw == pytest.approx(plan["bpw"])
    assert summary.size.weight_file_bytes == (model / "model.safetensors").stat().st_size
    # The same rows of the same text that the conversion measured itself on.
    divergence = summary.tasks["kl"].divergence
    assert divergence
    assert divergence.tokens == plan["measured"]["tokens"]
    assert asdict(divergence.kl) == pytest.approx(plan["measured"]["kl"], rel=1e-4)


def check_file(data: dict[str, Any], summary: Summary) -> None:
    """summary.json, key by key as readers of it know it."""
    top = "schema kind model fingerprint versions seed quick_look capability tasks size left_out"
    assert list(data) == [*top.split(), "machine"]
    assert (data["schema"], data["kind"], data["seed"]) == (1, "optiq.evals", 0)
    gsm8k, kl = data["tasks"]["gsm8k"], data["tasks"]["kl"]
    facts = ["protocol", "items", "limit", "data_sha256", "done", "seconds", "noted", "metrics"]
    assert list(gsm8k) == facts
    assert list(gsm8k["metrics"]) == ["flexible", "strict"]
    assert gsm8k["metrics"]["strict"] == asdict(summary.tasks["gsm8k"].metrics["strict"])
    assert list(kl) == [*facts, "divergence"]
    assert list(kl["divergence"]) == ["kl", "top1", "ppl_ratio", "tokens", "sequences"]
    sizes = ["model", "fingerprint", "nbytes", "bpw", "weight_file_bytes", "folder_bytes"]
    assert list(data["size"]) == sizes


@pytest.mark.parametrize("task", [*TASKS, "kl"])
def test_a_killed_run_is_finished_to_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Killed while the second wave runs, and again while it is being written."""

    def go(name: str, *, resume: bool = False) -> Summary:
        how: Any = {"tasks": task, "data": data, "progress": False, "resume": resume}
        return evaluate(model, tmp_path / name, **how)

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
        found = go("killed", resume=True).tasks[task]
        assert path.read_bytes() == whole
        assert found.done == found.header.items


def test_finished_parts_are_not_asked_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"tasks": "gsm8k", "data": data, "progress": False}
    first = evaluate(model, tmp_path / "r", **how)
    seconds = first.tasks["gsm8k"].seconds
    assert seconds is not None
    assert seconds >= 0
    before = contents(first.folder)

    def never(*_: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(Engine, "answers", never)
    again = evaluate(model, tmp_path / "r", **how, resume=True)
    assert contents(again.folder) == before
    assert again == first


def test_another_run_is_refused_before_anything_is_asked(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"out": tmp_path / "r", "data": data, "progress": False, "resume": True}
    evaluate(model, tasks="humaneval", **how)
    before = contents(tmp_path / "r")
    monkeypatch.setattr(Engine, "log_likelihoods", None)  # MMLU comes first
    with pytest.raises(
        CheckpointError, match=r"humaneval.jsonl belongs to another job \(items: 4 th"
    ):
        evaluate(model, limit=2, **how)
    source = model.parent / "source"
    with pytest.raises(CheckpointError, match=r"humaneval.jsonl belongs to another job \(fingerp"):
        evaluate(source, **how)
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
    assert (found["nbytes"], found["model"]) == (plan["nbytes"], model.name)


def test_several_suites_on_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(model), "--limit", "2", "--data", str(data), "-o", str(tmp_path)]
    assert main([*command, "--suite", "gsm8k,bfcl", "--suite", "size"]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"gsm8k.jsonl", "bfcl.jsonl", "size.json"}
    assert not (tmp_path / "mmlu.jsonl").exists()
    assert "bits per weight" in capsys.readouterr().out


def test_full_asks_what_the_sample_leaves_out(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = questions.fit_manifest(data, monkeypatch)
    for name, keep in (("mmlu", 3), ("gsm8k", 2)):
        manifest[name] = replace(manifest[name], ids=manifest[name].ids[:keep])
    for suite, full, count in (
        ("mmlu", False, 3),
        ("mmlu", True, 8),
        ("gsm8k", False, 2),
        ("gsm8k", True, 6),
    ):
        out = tmp_path / f"{suite}-{full}"
        how: Any = {"tasks": suite, "data": data, "progress": False}
        assert evaluate(model, out, full=full, **how).tasks[suite].header.items == count


def test_kl_needs_a_reference(model: Path, data: Path, tmp_path: Path) -> None:
    source = model.parent / "source"
    how: Any = {"data": data, "progress": False}
    with pytest.raises(UsageError, match=r"optiq did not make this .*--reference MODEL"):
        evaluate(source, tmp_path / "a", tasks=("kl",), **how)
    summary = evaluate(source, tmp_path / "b", **how)
    assert "--reference" in summary.left_out["kl"]
    assert "kl" not in summary.tasks
    given = evaluate(source, tmp_path / "c", tasks=("kl",), reference=str(model), **how)
    divergence = given.tasks["kl"].divergence
    assert divergence
    assert divergence.kl.mean > 0
    with pytest.raises(SourceError, match="there is no folder"):
        evaluate(source, tmp_path / "d", tasks=("kl",), reference="nothing", **how)
    changed = source / "config.json"
    before = changed.read_text()
    changed.write_text(before + " ")  # another fingerprint
    try:
        summary = evaluate(model, tmp_path / "e", tasks="capability", **how)
    finally:
        changed.write_text(before)
    assert "is not the model this one was made from" in summary.left_out["kl"]


def test_a_model_without_a_chat_template(data: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    summary = evaluate(folder, tmp_path / "r", data=data, progress=False)
    assert summary.capability is not None
    assert "as text" in summary.tasks["gsm8k"].header.protocol


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
        (["--suite", "arc"], "no task is called 'arc'; use one of capability, mmlu"),
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
        evaluate(model, tmp_path / "file" / "r", tasks="gsm8k", data=data)
