"""What a run may use, and what came of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ..errors import UsageError

Status = Literal[
    "ok", "error", "denied", "timeout", "memory", "output", "disk", "cancelled", "killed"
]
Stream = Literal["stdout", "stderr"]
OnOutput = Callable[[Stream, str], None]
VerdictStatus = Status | Literal["passed", "failed"]


@dataclass(frozen=True)
class Limits:
    """Most that one run, or one session, may use; seconds, bytes and numbers.

    `wall`, `cpu` and `output` (of stdout and of stderr each) are of a run, or of each snippet of a
    session. `disk` and `files` are of the work folder, `memory` and `threads` of the process.
    `returned`: bytes of files that come back in a Result.
    """

    wall: float = 10.0
    cpu: float = 10.0
    memory: int = 512 * 2**20
    output: int = 2**20
    disk: int = 64 * 2**20
    files: int = 256
    threads: int = 16
    returned: int = 16 * 2**20

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            low, high = _RANGES.get(f.name, (1, 2**40))
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise UsageError(f"limit {f.name}={value} is not between {low:g} and {high:g}")


_RANGES = {
    "wall": (0.01, 86400.0),
    "cpu": (0.01, 86400.0),
    "memory": (64 * 2**20, 2**46),
    "files": (0, 400),  # nested folders, at the worst: what takes them away again is recursive
    "output": (0, 2**30),
    "disk": (0, 2**40),
    "returned": (0, 2**40),
}


@dataclass(frozen=True)
class Usage:
    """What a run took: seconds, and bytes of resident memory at the peak; None: not measured."""

    wall: float
    cpu: float | None
    memory: int | None


@dataclass(frozen=True)
class Result:
    """What came of a run, or of a snippet.

    `status` is "ok"; "error": an uncaught exception or an exit status other than 0; "denied": the
    exception was a refused access; "timeout" (wall or CPU time), "memory", "output", "disk": a
    limit was hit; "cancelled": by the caller; "killed": a signal, as after a crash of the
    interpreter. `detail` says more in one line. `truncated`: output beyond the limit was dropped.
    `mechanisms`: what held the code. `value`: the last expression, as `repr` shows it; None where
    there is none. `exit_status`: where the program ended by itself. `files`: those that it made or
    changed; `left_out`: names of those that were not read, for size or for their modes.
    """

    status: Status
    stdout: str
    stderr: str
    truncated: bool
    usage: Usage
    mechanisms: tuple[str, ...]
    detail: str = ""
    value: str | None = None
    exit_status: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Files as base64."""
        coded = {name: base64.b64encode(data).decode() for name, data in self.files.items()}
        return {**asdict(self), "files": coded}


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate passed its test; `status` and `detail` say why not.

    `status` is "passed"; "failed": the test says no, or the candidate ended during it; "error":
    the candidate could not be imported; otherwise a limit, as in `Result`.
    """

    status: VerdictStatus
    detail: str
    usage: Usage
    mechanisms: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.status == "passed"
