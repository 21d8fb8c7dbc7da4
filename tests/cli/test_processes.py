"""The command as a process: how fast it starts, what it prints, Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from optiq.quantize.prepare import CHECKPOINT
from tests.planning.test_plan import scores_of
from tests.scored import PEER
from tests.tiny import tiny_folder

CODE = "import sys; from optiq.cli import main; sys.exit(main())"


def optiq(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def seconds(*argv: str) -> float:
    """Median of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert optiq(*argv).returncode == 0
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_help_is_quick() -> None:
    assert seconds("--help") < 0.3


@pytest.mark.parametrize("argv", [["--help"], ["convert", "--help"], ["plan", "{file}"]])
def test_what_needs_no_mlx_does_not_import_it(tmp_path: Path, argv: list[str]) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(scores_of()))
    code = (
        "import atexit, sys; from optiq.cli import main\n"
        "heavy = ('mlx', 'mlx_lm', 'transformers', 'torch', 'huggingface_hub')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *(a.format(file=file) for a in argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_a_large_plan_takes_less_than_a_second(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(scores_of(blocks=84, hidden=2048, inner=6144)))
    assert seconds("plan", str(file), "--size", "4.8bpw") < 1
    file.write_text(json.dumps(PEER))
    assert seconds("plan", str(file), "--size", "7.5bpw") < 1


def test_errors_are_one_line_and_their_exit_code(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model")
    (folder / "tokenizer.json").unlink()
    done = optiq("convert", "model", "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("optiq convert: model has no tokenizer")
    assert done.stderr.count("\n") == 1
    done = optiq("convert", "model", "-o", "out", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = optiq("convert", "model", "-o", "out", "--size", "small", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_hub_id_without_network(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = optiq("convert", "org/none", "-o", str(tmp_path / "o"), env={**os.environ, **offline})
    assert (done.returncode, done.stdout) == (1, "")
    assert "org/none is not a folder here" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("native", "kind"), [("", "qwen3_moe"), ("0", "llama")])
def test_a_conversion_prints_its_result_and_nothing_else(
    tmp_path: Path, native: str, kind: str
) -> None:
    """With the native part and, as OPTIQ_NATIVE=0, without it."""
    tiny_folder(tmp_path, kind, name="model")
    quick = ["--effort", "quick", "--tokens", "200", "--size", "7bpw", "--formats", "4,8"]
    environment = {**os.environ, "OPTIQ_NATIVE": native}
    job = ["convert", "model", "-o", "out", *quick, "--json", "--quiet"]
    done = optiq(*job, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["measured"]["kl"]["mean"] > 0


def test_the_reader_of_the_output_may_leave(tmp_path: Path) -> None:
    """As in `optiq plan ... --json | head`."""
    file = tmp_path / "s.json"
    file.write_text(json.dumps(scores_of(blocks=84, hidden=2048, inner=6144)))
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "plan", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 1
    process.stderr.close()


SCORES = ["--effort", "quick", "--sensitivity", "kl", "--tokens", "640"]
JOB = ["convert", "model", "-o", "out", *SCORES, "--quiet"]


def stop_while_measuring(tmp_path: Path, stop: signal.Signals) -> None:
    """Nothing but what --resume needs is left."""
    tiny_folder(tmp_path, name="model", num_hidden_layers=4)
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *JOB],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs that a script puts into the background start with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / "out.optiq-work" / CHECKPOINT
    until = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    hint = "interrupted; the same command with --resume goes on from here"
    assert err == f"\noptiq convert: {hint}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.optiq-work"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_measuring(tmp_path: Path, stop: signal.Signals) -> None:
    stop_while_measuring(tmp_path, stop)


def test_a_stopped_job_goes_on(tmp_path: Path) -> None:
    stop_while_measuring(tmp_path, signal.SIGINT)
    done = optiq(*JOB, cwd=tmp_path)
    assert done.returncode == 2
    assert "holds unfinished work; --resume goes on" in done.stderr
    (tmp_path / "out.optiq-work" / "mine.txt").write_text("not optiq's")
    done = optiq(*JOB, "--resume", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "report.html" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "out.optiq-work"]
    assert [p.name for p in (tmp_path / "out.optiq-work").iterdir()] == ["mine.txt"]


def test_closed_standard_input(tmp_path: Path) -> None:
    tiny_folder(tmp_path, name="model")
    command = [sys.executable, "-c", CODE, "generate", "model", "-p"]
    for prompt, code in (("hello", 0), ("-", 2)):
        line = shlex.join([*command, prompt, "-m", "2"])
        done = subprocess.run(
            ["sh", "-c", f"{line} <&-"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
