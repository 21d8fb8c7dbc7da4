"""summary.json: every figure of a folder of records, with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base.files import whole
from ..base.machine import machine
from ..quality import divergence as compare
from ..quality.statistics import CAPABILITY
from . import metrics, runs
from .comparison import capability
from .records import Header, writing
from .runs import Run
from .tasks.kl import table


def summarize(
    out: Path, *, seconds: Mapping[str, float], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Write summary.json from the records in the folder `out`, and return it.

    `seconds` are of the parts that this run did from their beginning; of the others what an earlier
    summary says is kept.
    """
    path, size = out / "summary.json", out / "size.json"
    found = runs.load(out)
    finished = {task: list(run.records) for task, run in found.items() if run.finished}
    seconds = _earlier_seconds(path) | dict(seconds)
    five = all(task in finished for task in CAPABILITY)
    headers = [run.header for run in found.values()]
    summary = {
        "schema": 1,
        "kind": "optiq.evals",
        **_shared(headers),
        "quick_look": any(header.limit is not None for header in headers),
        "capability": capability(finished).to_json() if five else None,
        "tasks": {task: _facts(run, seconds.get(task)) for task, run in found.items()},
        "size": json.loads(size.read_text(encoding="utf-8")) if size.exists() else None,
        "left_out": dict(left_out),
        "machine": machine(),
    }
    write_json(path, summary)
    return summary


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as (partial,):
            partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _facts(run: Run, seconds: float | None) -> dict[str, Any]:
    header, task = run.header, run.header.task
    facts: dict[str, Any] = {key: asdict(header)[key] for key in ("protocol", "items", "limit")}
    facts |= {"data_sha256": header.data_sha256, "done": len(run.records), "seconds": seconds}
    facts["noted"] = sum(bool(record.note) for record in run.records)
    if run.finished:
        facts["metrics"] = {
            metric.name: metrics.estimate(metric, run.records).to_json()
            for metric in metrics.of_task(task)
        }
        if task == "kl":
            facts["divergence"] = compare.summary(table(run.records))
    return facts


def _earlier_seconds(path: Path) -> dict[str, float]:
    """What the summary that lies there says of each part's time."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {task: facts["seconds"] for task, facts in tasks.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _shared(headers: Sequence[Header]) -> dict[str, Any]:
    """What all headers agree on; None for what they do not."""
    keys = ("model", "fingerprint", "versions", "seed")
    rows = [asdict(header) for header in headers]
    return {
        key: rows[0][key] if rows and all(row[key] == rows[0][key] for row in rows) else None
        for key in keys
    }
