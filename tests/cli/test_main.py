"""Parsing, exit codes, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import optiq
from optiq.cli import COMMANDS, SHARED, doctor, main, options
from optiq.errors import BudgetError, OptiqError, UsageError

# The least that each command wants; the others want a model.
ARGUMENTS = {
    "convert": ["m", "-o", "o"],
    "frontier": ["m", "-o", "o"],
    "kv": ["m", "-o", "o"],
    "compare": ["m", "n"],
    "generate": ["m", "-p", "hello"],
    "plan": ["m", "--size", "5bpw"],
    "lora": ["train", "m", "--data", "d", "-o", "o"],
    "sandbox": ["run", "a.py"],
    "bench": [],
    "mcp": [],
    "run": ["codex"],
    "doctor": [],
    "completion": ["bash"],
    "demo": [],
}


def exit_of(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert exit_of("--version") == 0
    assert capsys.readouterr().out == f"optiq {optiq.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(command, "--help") == 0
    text = capsys.readouterr().out
    assert COMMANDS[command].split(",")[0] in " ".join(text.split())
    assert "--json" in text
    assert "--debug" in text


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(SHARED)))
def test_ranks_only_measure(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else each would write the same files."""
    monkeypatch.setenv("MLX_RANK", "0")
    assert main([command, *ARGUMENTS.get(command, ["m"])]) == 2
    assert "runs in one process, not under mlx.launch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["convert"],
        ["convert", "m"],
        ["convert", "m", "-o", "o", "--tokens", "0"],
        ["convert", "m", "-o", "o", "--tokens", "many"],
        ["convert", "m", "-o", "o", "--sensitivity", "guess"],
        ["convert", "m", "-o", "o", "--reference", "q8"],
        ["convert", "m", "-o", "o", "--rounding", "x"],
        ["convert", "m", "-o", "o", "--nothing"],
        ["plan"],
        ["generate", "m"],
        ["compare"],
    ],
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(*argv) == 2
    assert "usage: optiq" in capsys.readouterr().err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`optiq doctor` with something else to do."""

    def with_body(body: Callable[[], Any], *argv: str) -> int:
        monkeypatch.setattr(doctor, "run", lambda args: body())
        return main(["doctor", *argv])

    return with_body


def fail(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OptiqError("x is y; do z"), 1, "optiq doctor: x is y; do z\n"),
        (BudgetError("too small"), 1, "optiq doctor: too small\n"),
        (UsageError("not so"), 2, "optiq doctor: not so\n"),
        (KeyboardInterrupt(), 130, "\noptiq doctor: interrupted\n"),
        (KeyboardInterrupt("; go on"), 130, "\noptiq doctor: interrupted; go on\n"),
        (OSError(36, "Too long"), 1, "optiq doctor: OSError: [Errno 36] Too long; --debug shows"),
        (ValueError("a\n b"), 1, "optiq doctor: ValueError: a b; --debug shows where\n"),
    ],
)
def test_an_error_is_one_line(
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    assert run(fail(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize("error", [OptiqError("x"), ValueError("y")])
def test_debug_shows_the_traceback(run: Callable[..., int], error: Exception) -> None:
    with pytest.raises(type(error)):
        run(fail(error), "--debug")


def test_ctrl_c_says_how_to_go_on_if_there_is_something_to_go_on_from(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.json"
    with pytest.raises(KeyboardInterrupt) as stop, options.resumable(checkpoint):
        raise KeyboardInterrupt
    assert str(stop.value) == ""
    checkpoint.touch()
    hint = "the same command with --resume goes on"
    with pytest.raises(KeyboardInterrupt, match=hint), options.resumable(checkpoint):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="other"), options.resumable(checkpoint):
        raise ValueError("other")
