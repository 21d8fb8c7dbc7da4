"""Two models on the same items: what differs, and by how much more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import EvalError
from ..quality.pairs import Paired, holm, verdict
from ..quality.statistics import Estimate
from . import capability, metrics
from .capability import BENCHMARKS
from .metrics import Metric
from .records import Record
from .runs import Run

Pair = tuple[list[Record], list[Record]]

# What must be equal for two answers to be to the same question, and why it may not be.
_SAME = {
    "protocol": "evaluate both with the same version and settings",
    "data_sha256": "evaluate both on the same questions",
    "seed": "evaluate both with the same --seed",
}


@dataclass(frozen=True)
class Compared:
    """A figure of two models. The verdict is None where a figure gets none."""

    first: Estimate
    second: Estimate
    paired: Paired  # second less first
    verdict: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "paired": self.paired.to_json(),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class ComparedMetric(Compared):
    """A metric of two models; `p` is that of the test after Holm's correction, of a main one."""

    metric: Metric
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """A row of `optiq compare --evals --json`."""
        metric, compared = self.metric, super().to_json()
        return {
            "task": metric.task,
            "metric": metric.name,
            "label": metric.label,
            "main": metric.main,
            "unit": metric.unit,
            "scale": metric.scale,
            **{key: compared[key] for key in ("first", "second", "paired")},
            "p_holm": self.p,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """Two models' records, compared; `tests` is the number of benchmarks that have a verdict."""

    metrics: tuple[ComparedMetric, ...]
    capability: Compared | None  # None unless both have all five benchmarks
    tests: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": [row.to_json() for row in self.metrics],
            "capability": self.capability and self.capability.to_json(),
            "tests": self.tests,
            "notes": list(self.notes),
        }


def compare(first: Mapping[str, Run], second: Mapping[str, Run]) -> Comparison:
    """Every metric of the benchmarks that both have, over the items that both have.

    Verdicts are after Holm's correction over the main metric of each benchmark. Raises EvalError
    when nothing can be paired: records of several models on one side, no benchmark in common, an
    unfinished run, other questions, another protocol, other prompts.
    """
    models = [_model(first), _model(second)]
    tasks = [task for task in first if task in second]
    if not tasks:
        raise EvalError(
            f"the first has records of {', '.join(first)}, the second of {', '.join(second)}: "
            "nothing in common; run the same optiq eval on both"
        )
    pairs = {task: pair(first[task], second[task]) for task in tasks}
    found = {m: metrics.paired(m, *pairs[m.task]) for m in metrics.METRICS if m.task in pairs}
    adjusted = holm({m.task: p.p for m, p in found.items() if m.main})
    return Comparison(
        metrics=tuple(_row(m, p, pairs[m.task], adjusted) for m, p in found.items()),
        capability=_capability(pairs, found),
        tests=len(adjusted),
        notes=(
            *(["both are records of the same model"] if models[0] == models[1] else []),
            *_alone(first, second),
            *_remarks(first, second, pairs),
        ),
    )


def pair(first: Run, second: Run) -> Pair:
    """The records of the items that both have, in the order of the first; see `compare`."""
    task = first.header.task
    for run in (first, second):
        if not run.finished:
            raise EvalError(
                f"{run.path} is unfinished ({len(run.records)} of {run.header.items} items); "
                "finish it with optiq eval --resume"
            )
    for key, fix in _SAME.items():
        a, b = getattr(first.header, key), getattr(second.header, key)
        if a != b:
            raise EvalError(f"{task}: the runs differ in {key} ({_short(a)}, {_short(b)}); {fix}")
    shared = [(r, second.by_id[r.id]) for r in first.records if r.id in second.by_id]
    if not shared:
        raise EvalError(f"{task}: the runs share no item; evaluate both with the same --limit")
    other = [a.id for a, b in shared if a.prompt_sha256 != b.prompt_sha256]
    if other:
        raise EvalError(
            f"{task}: the models were asked differently in {len(other)} of {len(shared)} items "
            f"(such as {other[0]}); compare models with one tokenizer and chat template"
        )
    return [a for a, _ in shared], [b for _, b in shared]


def _model(runs: Mapping[str, Run]) -> str | None:
    """The fingerprint that all runs share."""
    marks = {run.header.fingerprint: run.path for run in runs.values()}
    if len(marks) > 1:
        a, b = list(marks.values())[:2]
        raise EvalError(f"{a} and {b} are records of different models; give each its own folder")
    return next(iter(marks), None)


def _row(
    metric: Metric, paired: Paired, pair: Pair, adjusted: Mapping[str, float]
) -> ComparedMetric:
    p, said = None, None
    if metric.main:
        p = adjusted[metric.task]
        said = verdict(
            paired,
            p,
            tests=len(adjusted),
            scale=metric.scale,
            unit=metric.unit,
            lower_is_better=metric.divergence,
        )
    first, second = (metrics.estimate(metric, records) for records in pair)
    return ComparedMetric(first, second, paired, said, metric, p)


def _capability(pairs: Mapping[str, Pair], found: Mapping[Metric, Paired]) -> Compared | None:
    first = capability.of_records({task: a for task, (a, _) in pairs.items()})
    second = capability.of_records({task: b for task, (_, b) in pairs.items()})
    if first is None or second is None:
        return None
    whole = capability.difference(
        {m.task: p for m, p in found.items() if m.main and m.task in BENCHMARKS}
    )
    return Compared(first, second, whole, verdict(whole, whole.p))


def _alone(first: Mapping[str, Run], second: Mapping[str, Run]) -> list[str]:
    """Benchmarks that only one of the two has."""
    notes = []
    for one, other, name in ((first, second, "first"), (second, first, "second")):
        if tasks := [task for task in one if task not in other]:
            notes.append(f"only the {name} model has {', '.join(tasks)}")
    return notes


def _remarks(
    first: Mapping[str, Run], second: Mapping[str, Run], pairs: Mapping[str, Pair]
) -> list[str]:
    """What weakens a comparison: quick looks, and other versions on the two sides."""
    notes = []
    for task, (records, _) in pairs.items():
        a, b = first[task].header, second[task].header
        if a.limit is not None or b.limit is not None:
            notes.append(f"{task}: a quick look, {len(records)} items")
        if changed := [k for k, v in a.versions.items() if b.versions.get(k) != v]:
            notes.append(f"{task}: the runs were made with different versions of {changed[0]}")
    return notes


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
