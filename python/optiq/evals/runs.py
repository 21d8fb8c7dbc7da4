"""The evaluation of one model: the record files of a folder, read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import EvalError
from . import records
from .metrics import TASKS, of_task
from .records import Header, Record

FOLDER = Path("optiq") / "evals"  # within the model's


@dataclass(frozen=True)
class Run:
    """One record file: every item has all metrics of its task, and an id of its own."""

    path: Path
    header: Header
    records: Sequence[Record]

    @property
    def finished(self) -> bool:
        return len(self.records) == self.header.items

    @cached_property
    def by_id(self) -> dict[str, Record]:
        return {record.id: record for record in self.records}

    def sha256(self) -> str:
        """Of the file as it is."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def locate(name: str | Path) -> Path:
    """The folder of records that `name` stands for: a model's `optiq/evals`, or the folder itself.

    Raises EvalError when neither holds any.
    """
    path = Path(name).expanduser()
    for folder in (path / FOLDER, path):
        if any((folder / f"{task}.jsonl").is_file() for task in TASKS):
            return folder
    if quick := sorted((path / FOLDER).glob("limit-*")):
        raise EvalError(
            f"{name} has only quick looks; name one, such as {quick[0]}, or ask all questions with "
            f"optiq eval {name}"
        )
    raise EvalError(f"{name} has no evaluation records; make them with optiq eval {name}")


def load(folder: Path) -> dict[str, Run]:
    """The runs in `folder` by task, in the order of `TASKS`, unfinished ones too.

    Raises EvalError for a file that is damaged or that is not what its name says.
    """
    files = {task: folder / f"{task}.jsonl" for task in TASKS}
    return {task: _run(task, path) for task, path in files.items() if path.is_file()}


def _run(task: str, path: Path) -> Run:
    header, found = records.read(path)
    if header.task != task:
        raise EvalError(f"{path} holds records of {header.task}; give the file that name")
    run = Run(path, header, found)
    if len(run.by_id) < len(found) or len(found) > header.items:
        raise EvalError(
            f"{path} holds {len(found)} records of {len(run.by_id)} items, of {header.items} to be "
            "asked; delete it and run again"
        )
    for record in found:
        absent = [m.name for m in of_task(task) if m.name not in record.metrics]
        if absent:
            raise EvalError(
                f"{path}: the item {record.id} has no {absent[0]}; delete the file and run again"
            )
    return run
