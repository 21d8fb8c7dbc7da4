"""`optiq sandbox run`: what it prints, its exit code, its limits."""

from __future__ import annotations

import io
import json
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
        (["run", "nothing.py"], "nothing.py and --file must be readable"),
        (["run", "{program}", "--file", "nothing"], "must be readable"),
        (["run", "{program}", "--wall", "0"], "limit wall=0.0 is not between"),
    ],
)
def test_wrong_usage(
    program: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    program.write_text("")
    assert main(["sandbox", *(a.format(program=program) for a in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_terminal_gets_no_control_characters() -> None:
    assert _shown("a\x1b[2J\rb\n\té", terminal=True) == "a\\x1b[2J\\rb\n\té"
    assert _shown("a\x1b[2J", terminal=False) == "a\x1b[2J"
