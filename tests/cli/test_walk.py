"""A new user's walk in terminals of 80 and 60 columns: nothing wraps, nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_folder

from .terminal import run, screen

LONG = "a-folder-with-a-name-that-is-as-long-as-those-of-models-often-are-4bit"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("w")
    tiny_folder(home, name="model")
    (home / LONG).mkdir()
    tiny_folder(home / LONG, name="model")
    return home


def test_the_walk(home: Path) -> None:
    tokens = ["--tokens", "320"]
    convert = ["convert", "model", "-o", "out", *tokens, "--size", "5bpw"]
    seen = {
        command[0]: look(home, columns, code, *command)
        for columns, code, command in (
            (80, 0, convert),
            (60, 0, ["info", "out"]),
            (60, 0, ["plan", "out", "--size", "4.8bpw"]),
            (60, 0, ["compare", "out", f"{LONG}/model", "--reference", "model", *tokens]),
            (80, 0, ["generate", "out", "-p", "Hello", "-m", "4"]),
            (80, 0, ["doctor", "model"]),
            (60, 0, ["kv", "out", "-o", "kv.json", "--context", "128", "--samples", "1"]),
            (80, 0, ["completion", "--help"]),
        )
    }
    shown = "\n".join(seen["convert"])
    for phase in ("measuring sensitivity", "choosing formats", "fitting weights", "writing"):
        assert f"{phase} " in shown
    for word in ("estimate: about", "before, ", "stock uniform 4-bit", "Next:", "optiq eval out"):
        assert word in shown
    assert len(seen["convert"]) < 60
    assert f"B: {LONG}/model" in seen["compare"]


def look(home: Path, columns: int, code: int, *argv: str) -> list[str]:
    """The screen that a command leaves, which fits and has no trace of progress on it."""
    ended, lines = run(*argv, columns=columns, cwd=home)
    assert ended == code, "\n".join(lines)
    # A path or a word cannot be broken, nor what the model says.
    long = [line for line in lines if len(line) > columns and len(line.split()) > 2]
    assert argv[0] == "generate" or not long, "\n".join(long)
    assert not [line for line in lines if "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in line]
    return lines


def test_the_screen_is_read_as_a_terminal_shows_it() -> None:
    written = "one\r\n\x1b[1mtw\x1b[0mo\r\x1b[2Knew\r\nthree\r\n\x1b[1A\x1b[2Kthe\r\nlast"
    assert screen(written) == ["one", "new", "the", "last"]
