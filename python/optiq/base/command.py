"""The command that this process was started with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath


def command_line() -> str:
    """The command that makes the same from the start; empty when called from Python.

    Of paths on this machine only the last part is kept, as files with it are published.
    """
    program, *arguments = sys.argv or [""]
    arguments = [a for a in arguments if a not in ("--resume", "--restart", "--overwrite")]
    if Path(program).name != "optiq":
        return ""
    return shlex.join(["optiq", *without_folders(arguments)])


def without_folders(words: Sequence[str]) -> list[str]:
    """Words of a command with the last part of every path."""
    return [_last_part(word) for word in words]


def _last_part(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not value.startswith(("/", "~", ".")):
        return word
    return f"{option}{equals}{PurePath(value).name or value}"
