"""summary.json: every figure of a folder of records, with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.files import write_json
from ..base.machine import machine
from ..base.text import cause
from ..errors import EvalError
from ..quality.divergence import summary as divergence_of
from ..quality.results import Divergence
from ..quality.statistics import Estimate
from . import capability, metrics, runs
from .records import Header
from .runs import Run
from .tasks.kl import table

FILE = "summary.json"
SIZE_FILE = "size.json"


@dataclass(frozen=True)
class Sizes:
    """size.json: bytes of tensors and bits per logical parameter, and bytes of files.

    `folder_bytes` are all that a download of the folder brings.
    """

    model: str
    fingerprint: str
    nbytes: int
    bpw: float
    weight_file_bytes: int
    folder_bytes: int

    def save(self, out: Path) -> None:
        write_json(out / SIZE_FILE, asdict(self))

    @classmethod
    def load(cls, out: Path) -> Sizes | None:
        """That of the folder; None where it has none."""
        path = out / SIZE_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise EvalError(
                f"{path} cannot be read ({cause(error)}); delete it and run again"
            ) from error


@dataclass(frozen=True)
class TaskSummary:
    """One benchmark: what its records are, and its figures by metric once it is finished."""

    header: Header
    done: int  # items
    seconds: float | None  # of a run from beginning to end
    noted: int  # records with a note
    metrics: Mapping[str, Estimate]
    divergence: Divergence | None  # of the benchmark "kl"

    @classmethod
    def of(cls, run: Run, seconds: float | None) -> TaskSummary:
        of_task = metrics.of_task(run.header.task) if run.finished else []
        is_kl = run.finished and run.header.task == "kl"
        return cls(
            header=run.header,
            done=len(run.records),
            seconds=seconds,
            noted=sum(bool(record.note) for record in run.records),
            metrics={metric.name: metrics.estimate(metric, run.records) for metric in of_task},
            divergence=divergence_of(table(run.records)) if is_kl else None,
        )

    def to_json(self) -> dict[str, Any]:
        header = self.header
        data: dict[str, Any] = {
            "protocol": header.protocol,
            "items": header.items,
            "limit": header.limit,
            "data_sha256": header.data_sha256,
            "done": self.done,
            "seconds": self.seconds,
            "noted": self.noted,
        }
        if self.metrics:
            data["metrics"] = {name: found.to_json() for name, found in self.metrics.items()}
        if self.divergence:
            data["divergence"] = self.divergence.to_json()
            del data["divergence"]["text_sha256"]  # data_sha256 is the same
        return data


@dataclass(frozen=True)
class Summary:
    """The evaluation of one model, whose records are in `folder`.

    `left_out` has what could not be measured, and why.
    """

    folder: Path
    capability: Estimate | None  # None unless all five benchmarks are finished
    tasks: Mapping[str, TaskSummary]  # by benchmark
    size: Sizes | None
    left_out: Mapping[str, str]
    machine: Mapping[str, Any]

    @property
    def quick_look(self) -> bool:
        return any(task.header.limit is not None for task in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """The contents of summary.json; of what the benchmarks do not agree on it has None."""
        headers = [task.header for task in self.tasks.values()]
        shared = {}
        for key in ("model", "fingerprint", "versions", "seed"):
            first, *others = [getattr(header, key) for header in headers] or [None]
            shared[key] = first if all(other == first for other in others) else None
        return {
            "schema": 1,
            "kind": "optiq.evals",
            **shared,
            "quick_look": self.quick_look,
            "capability": self.capability and self.capability.to_json(),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "size": self.size and asdict(self.size),
            "left_out": dict(self.left_out),
            "machine": dict(self.machine),
        }


def summarize(out: Path, *, seconds: Mapping[str, float], left_out: Mapping[str, str]) -> Summary:
    """Write summary.json from the records in the folder `out`, and return it.

    `seconds` are of the benchmarks that this run did from their beginning; of the others what an
    earlier summary says is kept.
    """
    found = runs.load(out)
    seconds = _earlier_seconds(out / FILE) | dict(seconds)
    summary = Summary(
        folder=out,
        capability=capability.of_records({t: r.records for t, r in found.items() if r.finished}),
        tasks={task: TaskSummary.of(run, seconds.get(task)) for task, run in found.items()},
        size=Sizes.load(out),
        left_out=left_out,
        machine=machine(),
    )
    write_json(out / FILE, summary.to_json())
    return summary


def _earlier_seconds(path: Path) -> dict[str, float]:
    """What the summary that lies there says of each benchmark's time."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {task: facts["seconds"] for task, facts in tasks.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
