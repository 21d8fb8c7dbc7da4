"""Programs of the model's that the server runs, as they happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NOTHING = "(no output)"


@dataclass(frozen=True)
class Running:
    """A program of the model's begins."""

    id: str
    container: str
    code: str


@dataclass(frozen=True)
class Ran:
    """A program has ended. `stdout` and `stderr` say all that the model is told."""

    id: str
    container: str
    code: str
    stdout: str
    stderr: str
    failed: bool
    files: Mapping[str, bytes]

    @property
    def text(self) -> str:
        return told(self.stdout, self.stderr)


def told(stdout: str, stderr: str) -> str:
    """What the model is told of a run."""
    return "\n".join(text for text in (stdout.rstrip(), stderr.rstrip()) if text) or NOTHING
