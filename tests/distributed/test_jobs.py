"""Ranks that share a job write what one process writes, and lose nothing with one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs
from tests.ports import hostfile
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
# What says how a file was made: when, in how long, by which command.
HOW = ("command", "seconds", "memory", "machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `source`, and in `alone` what one process makes of it."""
    folder = tmp_path_factory.mktemp("jobs")
    tiny_folder(folder, "qwen3_moe", tie_word_embeddings=True, name="source")
    (folder / "alone").mkdir()
    for job in jobs.JOBS.values():
        job(folder / "source", folder / "alone")
    return folder


def start(folder: Path, out: str, names: Sequence[str]) -> list[subprocess.Popen[str]]:
    (folder / out).mkdir(exist_ok=True)
    command = ["-m", "tests.distributed.jobs", str(folder / "source"), str(folder / out), *names]
    shared = {**os.environ, "MLX_HOSTFILE": str(hostfile(folder / out, 2))}
    shared["TRANSFORMERS_VERBOSITY"] = "error"
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**shared, "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; nothing is printed."""
    try:
        found = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out for out, _ in found] == ["", ""]
    return [(p.returncode, err) for p, (_, err) in zip(processes, found, strict=True)]


def content(path: Path) -> Any:
    """The bytes of a file, or what JSON says but for how it was made."""
    if path.suffix != ".json":
        return path.read_bytes()
    return without(json.loads(path.read_text()))


def without(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without(value) for key, value in data.items() if key not in HOW}
    return [without(value) for value in data] if isinstance(data, list) else data


def same(found: Path, expected: Path) -> None:
    if expected.is_file():
        assert content(found) == content(expected)
        return
    files = [p.relative_to(expected) for p in expected.rglob("*") if p.is_file()]
    files = [name for name in files if name.suffix != ".html"]
    assert files
    for name in files:
        assert content(found / name) == content(expected / name), name


def test_two_ranks_make_what_one_does(folder: Path) -> None:
    assert finish(start(folder, "both", list(jobs.JOBS))) == [(0, ""), (0, "")]
    same(folder / "both", folder / "alone")
    plan = json.loads((folder / "both" / "model" / "optiq" / "plan.json").read_text())
    assert plan["selection"]["rounding"].endswith("refined")
    names = {path.name for path in (folder / "both").iterdir()}
    assert names == {path.name for path in (folder / "alone").iterdir()} | {"hosts.json"}


def test_a_dead_rank_is_named_and_one_process_goes_on(folder: Path) -> None:
    processes = start(folder, "killed", ["convert"])
    scores = folder / "killed" / "model.optiq-work" / "sensitivity.json"
    until = time.monotonic() + 120
    while not scores.exists() and processes[1].poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGKILL)
    (code, err), _ = finish(processes)
    assert code == 1
    assert err == "\noptiq: rank 1 died; what is measured is kept, go on with --resume\n"
    left = [path.name for path in (folder / "killed").iterdir() if "scratch" not in path.name]
    assert sorted(left) == ["hosts.json", "model.optiq-work"]

    jobs.convert(folder / "source", folder / "killed", resume=True)
    same(folder / "killed" / "model", folder / "alone" / "model")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "made", "left", "lines"),
    [
        ("kv", "kv.json", "kv.checkpoint.json", 0),
        ("frontier", "frontier", "frontier.optiq-work/frontier.checkpoint.json", 0),
        ("eval", "evals", "evals/kl.jsonl", 2),  # the first is not a record
    ],
)
def test_what_a_dead_rank_leaves_is_used(
    folder: Path, name: str, made: str, left: str, lines: int
) -> None:
    out, alone = folder / f"killed-{name}", folder / "alone"
    shutil.copytree(alone / "model", out / "model")
    processes = start(folder, out.name, [name, "--killed-after", left, str(lines)])
    (code, err), (killed, _) = finish(processes)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert err == "\noptiq: rank 1 died; what is measured is kept, go on with --resume\n"
    kept = out / left
    assert kept.read_bytes().count(b"\n") >= lines
    if name != "eval":  # whose records are what it makes
        assert not (out / made).exists()
    written = kept.read_bytes()
    jobs.JOBS[name](folder / "source", out, resume=True)
    same(out / made, alone / made)
    assert kept.exists() == (name == "eval")
    assert name != "eval" or kept.read_bytes().startswith(written)
