"""Results of a benchmark, one JSON object per line: a header, then one record per item.

    {"task": "gsm8k", "protocol": "...", "model": "...", "fingerprint": "...", "data_sha256": "...",
     "items": 1000, "limit": null, "versions": {...}, "seed": 0}
    {"id": "test/17", "group": "", "prompt_sha256": "...", "answer": "...",
     "metrics": {"strict": true, "flexible": true}}

Files only grow. What a killed run leaves behind, at worst half a line, is cut off on resuming.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.checkpoint import check_identity
from ..errors import EvalError

# True or False, a number, or one of them per instruction (IFEval) or token (KL).
Metric = bool | float | list[bool] | list[float]
Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Header:
    """What a run was. Two files can be compared item by item if all but the model is equal."""

    task: str
    protocol: str  # changes whenever a number could: prompt, decoding, scoring
    model: str  # as the user named it
    fingerprint: str  # sha256, see sources.folder.fingerprint
    data_sha256: str  # of all rows of the data set, whatever file they came from
    items: int  # that a finished file holds
    limit: int | None  # a number makes it a quick look
    versions: dict[str, str]
    seed: int = 0


@dataclass(frozen=True)
class Record:
    """One item. `group` is its cluster, such as a subject or a domain ("": each stands alone)."""

    id: str
    group: str
    prompt_sha256: str  # of the token ids, int32 little-endian
    answer: str
    metrics: Metrics
    note: str = ""  # why a verdict is not the usual one

    def line(self) -> str:
        fields = asdict(self)
        if not self.note:
            del fields["note"]
        return json.dumps(fields, ensure_ascii=False) + "\n"


def read(path: Path) -> tuple[Header, list[Record]]:
    """Header and records of a file, in its order; a torn last line is left out.

    The run is finished if there are `header.items` records. Raises EvalError for a file that is
    not ours or is damaged.
    """
    header, found = _parse(path)
    return header, [record for record, _ in found]


def create(path: Path, header: Header) -> None:
    """Start a file; EvalError if there is one."""
    if path.exists():
        raise EvalError(
            f"{path} holds results already; --resume goes on with them, --restart discards them, "
            "-o OUT puts new ones elsewhere"
        )
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, [json.dumps(asdict(header), ensure_ascii=False) + "\n"])


def check(path: Path, header: Header) -> None:
    """Raise CheckpointError unless the file is a part of the run that `header` describes."""
    _part_of(path, header)


def _part_of(path: Path, header: Header) -> list[tuple[Record, int]]:
    """The records of a file that is a part of the run `header`, with the offsets of their ends."""
    old, found = _parse(path)
    ours, theirs = asdict(header), asdict(old)
    del ours["model"]  # the same model may be named in two ways
    check_identity(path, ours, theirs)
    return found


def resume(path: Path, header: Header, boundaries: Sequence[int]) -> list[Record]:
    """Cut the file to the last of `boundaries` (counts of records) and return what is kept.

    Raises CheckpointError if it is not a part of the run that `header` describes.
    """
    found = _part_of(path, header)
    keep = max((n for n in (0, *boundaries) if n <= len(found)), default=0)
    with _writing(path), path.open("r+b") as file:
        file.truncate(found[keep - 1][1] if keep else _header_end(path))
    return [record for record, _ in found[:keep]]


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records in one write that has reached the disk when this returns."""
    _append(path, [record.line() for record in records])


def _append(path: Path, lines: list[str]) -> None:
    with _writing(path), path.open("ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into an EvalError."""
    try:
        yield
    except OSError as error:
        raise EvalError(
            f"{path} cannot be written ({error.strerror}); give another folder with -o"
        ) from error


def _parse(path: Path) -> tuple[Header, list[tuple[Record, int]]]:
    """The header, and each record with the offset in bytes at which its line ends."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    except OSError as error:
        raise EvalError(f"{path} cannot be read ({error.strerror}); run optiq eval") from error
    if not lines:
        raise EvalError(f"{path} has no header; delete it and run again")
    header, found, end = None, [], 0
    for number, line in enumerate(lines, start=1):
        end += len(line) + 1
        try:
            fields: dict[str, Any] = json.loads(line)
            if header is None:
                header = Header(**fields)
            else:
                found.append((Record(**fields), end))
        except (ValueError, TypeError, RecursionError) as error:
            raise EvalError(
                f"{path} line {number} is not a {'record' if header else 'header'} of an "
                "evaluation; delete the file and run again"
            ) from error
    assert header is not None
    return header, found


def _header_end(path: Path) -> int:
    return path.read_bytes().index(b"\n") + 1
