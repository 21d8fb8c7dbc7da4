"""The command that this process was started with."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """The command that makes the same from the start; empty when called from Python."""
    program, *arguments = sys.argv or [""]
    arguments = [a for a in arguments if a not in ("--resume", "--restart", "--overwrite")]
    return shlex.join(["optiq", *arguments]) if Path(program).name == "optiq" else ""
