"""The walk of a new user through every command, with what goes wrong, at two widths of a terminal.

    python -m pytest -m walk tests/cli

About five minutes on two cores. `test_walk.py` has the part that every run of the tests takes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

from .terminal import CODE, run, written

pytestmark = pytest.mark.walk

DATA = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}"} for n in range(16)]
FEW = "--tokens 320 --sensitivity fisher"

# Commands, their exit code, and a word of what they say. Later ones use what earlier ones made.
STEPS = [
    ("--help", 0, "eval \"$(optiq completion bash)\""),
    ("--version", 0, "optiq"),
    ("convert model -o out --size 5bpw " + FEW, 0, "Next:"),
    ("convert model -o out", 1, "--overwrite"),
    ("convert nothere -o out2", 1, "there is no folder nothere"),
    ("convert modle -o out2", 1, "model"),
    ("convert model -o out2 --size 4", 2, "4bpw"),
    ("convert model -o /proc/x", 1, "cannot be written"),
    ("info out", 0, "bits"),
    ("info nothere", 1, "is not a folder"),
    ("info", 2, "FOLDER"),
    ("plan out --size 4.8bpw", 0, "budget"),
    ("plan nothere", 1, "no such file"),
    ("sensitivity model -o s.json " + FEW, 0, "Next:"),
    ("sensitivity model -o s.json", 2, "--overwrite"),
    ("sensitivity nothere -o s9.json", 1, "there is no folder"),
    ("frontier model -o fr --sizes 5bpw " + FEW, 0, "Next:"),
    ("frontier model", 2, "-o OUT"),
    ("frontier nothere -o fr9", 1, "there is no folder"),
    ("kv out -o kv.json --context 128 --samples 1", 0, "Next:"),
    ("kv out -o kv.json", 2, "--overwrite"),
    ("kv nothere -o k9.json", 1, "there is no folder"),
    ("generate out -p Hello -m 4", 0, ""),
    ("generate out -p Hello -m 4 --kv kv.json", 0, ""),
    ("generate out -p Hello --kv q8_0", 1, "8/4"),
    ("generate out", 2, "-p PROMPT"),
    ("chat nothere", 1, "there is no folder"),
    ("serve nothere", 1, "there is no folder"),
    ("serve out --port 99999", 2, "65535"),
    ("serve out --host 0.0.0.0", 2, "--api-key-file"),
    ("run", 2, "claude"),
    ("run nosuch --model out", 2, "claude"),
    ("run codex --model out --print", 0, "optiq"),
    ("mcp --nosuch", 2, "there is no option"),
    ("mcp --json", 0, "mcpServers"),
    ("lora", 2, "train, info, merge, export"),
    ("lora train out --data data.jsonl -o adapter --iters 2", 0, ""),
    ("lora train out --data nothere -o adapter9", 1, "nothere"),
    ("lora info adapter", 0, ""),
    ("compare out model --reference model --tokens 320 -o compare.html", 0, "page"),
    ("compare out", 2, "--reference"),
    ("compare out nothere --reference model", 1, "there is no folder"),
    ("eval out --suite kl --limit 2", 0, "QUICK LOOK"),
    ("eval nothere", 1, "there is no folder"),
    ("eval out --suite nosuch", 2, "gsm8k"),
    ("compare --evals out model", 1, "optiq eval"),
    ("card out", 0, "--upload-repo"),
    ("card nothere", 1, "nothere"),
    ("card out --license foo", 2, "foo"),
    ("guide model", 0, "Commands:"),
    ("guide gemma4", 0, "Commands:"),
    ("guide nothere", 1, "there is no folder"),
    ("doctor", 0, "native kernels"),
    ("doctor model", 0, ""),
    ("doctor nothere", 1, "there is no folder"),
    ("demo --dir /proc/x", 1, "cannot be written"),
    ("bench --nosuch", 2, "there is no option"),
    ("sandbox run hello.py", 0, "hello"),
    ("sandbox run nothere.py", 2, "nothere.py"),
    ("completion nosuch", 2, "bash"),
    ("nothere", 2, "there is no command"),
]  # fmt: skip


@pytest.fixture(scope="module", params=[80, 60])
def columns(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, columns: int) -> Path:
    home = tmp_path_factory.mktemp(f"w{columns}-")
    tiny_folder(home, name="model")
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (home / "hello.py").write_text("print('hello')\n")
    return home


@pytest.mark.parametrize(("command", "code", "said"), STEPS, ids=[step[0] for step in STEPS])
def test_a_step(home: Path, columns: int, command: str, code: int, said: str) -> None:
    ended, lines = run(*shlex.split(command), columns=columns, cwd=home)
    text = "\n".join(lines)
    assert ended == code, text
    assert said in " ".join(text.split()), text
    # A path or a word cannot be broken, nor JSON, nor what a model says.
    long = [line for line in lines if len(line) > columns and len(line.split()) > 2]
    assert not long or "--json" in command or command.startswith("generate"), "\n".join(long)
    for trace in ("Traceback", r"\[Errno", "\N{BOX DRAWINGS HEAVY HORIZONTAL}", r"\bnan\b"):
        assert not re.search(trace, text), text
    if code:
        assert len([line for line in lines if line]) <= (5 if columns == 80 else 7), text


@pytest.mark.parametrize(
    "command", ["info out", "doctor", "guide model", f"convert model -o nc {FEW}"]
)
def test_no_color_is_honoured(home: Path, columns: int, command: str) -> None:
    _, text = written(*command.split(), columns=columns, cwd=home, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text)


@pytest.mark.parametrize(
    "command", ["convert model -o {} ", "kv out -o {}", "frontier model -o {}"]
)
def test_quiet_says_the_result_alone(home: Path, columns: int, command: str) -> None:
    words = command.format(f"quiet-{command.split()[0]}").split()
    more = {"convert": FEW, "kv": "--context 128 --samples 1", "frontier": f"--sizes 5bpw {FEW}"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words, *more[words[0]].split(), "--quiet"],
        cwd=home, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "Next:" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "convert model -o stopped --tokens 8192",
        "frontier model -o stopped-fr",
        "kv out -o stopped.json --context 256",
        "lora train out --data data.jsonl -o stopped-adapter --iters 5000",
        "mcp",
    ],
)
def test_ctrl_c_is_one_line(home: Path, columns: int, command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *command.split()],
        cwd=home,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # As from a terminal; what starts the tests may ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    assert process.returncode in (0, 130), error
    assert process.returncode == 0 or "interrupted" in error.splitlines()[-1]
