"""`optiq sandbox run`: what it prints, its exit code, its limits."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optiq.cli import main
from optiq.cli.sandbox import _shown
from tests.sandbox.levels import process_level

pytestmark = process_level()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "p.py"


def test_output_goes_where_it_belongs(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text("import sys; print('o'); print('e', file=sys.stderr)")
    assert main(["sandbox", "run", str(program)]) == 0
    assert capsys.readouterr() == ("o\n", "e\n")


def test_a_program_from_stdin_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_text("seven")
    monkeypatch.setattr(sys, "stdin", io.StringIO("print(open('data.txt').read())"))
    assert main(["sandbox", "run", "-", "--file", str(tmp_path / "data.txt")]) == 0
    assert capsys.readouterr().out == "seven\n"


def test_failures_are_1_and_say_why(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text("while True: pass")
    assert main(["sandbox", "run", str(program), "--wall", "0.3"]) == 1
    assert capsys.readouterr().err == "optiq sandbox: timeout: more than 0.3 s\n"
    program.write_text("1 / 0")
    assert main(["sandbox", "run", str(program)]) == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: division by zero\n")


def test_arguments_stdin_files_and_the_exit_status(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.write_text(
        "import os, sys\nprint(sys.argv[1:], input())\nos.mkdir('d')\n"
        "open('d/out', 'w').write('1')\nsys.exit(7)"
    )
    (tmp_path / "in").write_text("line\n")
    saved = tmp_path / "saved"
    options = ["--arg", "a", "--arg=-b", "--stdin", str(tmp_path / "in"), "--save", str(saved)]
    assert main(["sandbox", "run", str(program), *options]) == 7
    assert capsys.readouterr().out == "['a', '-b'] line\n"
    assert (saved / "d" / "out").read_text() == "1"


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        (["--files", "2"], "for i in range(3): open(str(i), 'w')"),
        (["--output", "1"], "print('x' * 2**21)"),
        (
            ["--threads", "2"],
            "import threading as t\nopen_ = t.Event()\n"
            "for _ in range(4): t.Thread(target=open_.wait, daemon=True).start()\nopen_.set()",
        ),
    ],
)
def test_every_limit(program: Path, limit: list[str], code: str) -> None:
    program.write_text(code)
    assert main(["sandbox", "run", str(program), *limit]) == 1
    assert main(["sandbox", "run", str(program)]) in (0, limit[0] == "--output")


def test_packages(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text("import numpy; print(numpy.arange(4).sum())")
    assert main(["sandbox", "run", str(program)]) == 1
    assert main(["sandbox", "run", str(program), "--package", "numpy"]) == 0
    assert capsys.readouterr().out == "6\n"


def test_an_encoding_without_the_character(program: Path) -> None:
    program.write_text("print('é\\U0001f600')")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    start = "import sys; from optiq.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "sandbox", "run", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\xe9\\U0001f600\n"


def test_what_an_exception_says_writes_nothing_to_a_terminal(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program.write_text("raise PermissionError(1, '\\x1b[2J\\u202e')")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["sandbox", "run", str(program)]) == 1
    error = capsys.readouterr().err
    assert "optiq sandbox: denied:" in error
    assert "\x1b" not in error
    assert "\u202e" not in error


def test_json(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text("bytearray(10**9)")
    assert main(["sandbox", "run", str(program), "--json", "--memory", "128"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "memory"
    assert "seccomp" in result["mechanisms"]
    assert result["usage"]["memory"] < 2**27


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "nothing.py"], "nothing.py cannot be read: No such file"),
        (["run", "{program}", "--file", "nothing"], "nothing cannot be read"),
        (["run", "{program}", "--wall", "0"], "limit wall=0.0 is not between"),
        (["run", "{program}", "--file", "a/x", "--file", "b/x"], "two files are named x; rename"),
        (["run", "-", "--stdin", "-"], "give --stdin a file"),
        (["run", "{program}", "--stdin", "nothing"], "nothing cannot be read"),
        (["run", "{program}", "--package", "no-such"], "'no-such' is not installed here"),
        (["run", "{program}", "--packages", "/nothing"], "is not a folder"),
        (["run", "{program}", "--package", "x", "--packages", "y"], "exclude each other"),
    ],
)
def test_wrong_usage(
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    program.write_text("")
    monkeypatch.chdir(program.parent)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x").touch()
    assert main(["sandbox", *(a.format(program=program) for a in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_terminal_gets_no_control_characters() -> None:
    assert _shown("a\x1b[2J\rb\n\té", terminal=True) == "a\\x1b[2J\\rb\n\té"
    assert _shown("a\x1b[2J", terminal=False) == "a\x1b[2J"
