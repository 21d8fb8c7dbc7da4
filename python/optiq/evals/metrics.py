"""The figures that records of a benchmark stand for, of one model and of a pair. No MLX, no files.

One row per metric in `METRICS`: shares of right answers, and means over tokens. How a metric's
items depend on one another is decided here once, for summaries, comparisons and cards alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptiqError
from ..quality import statistics
from ..quality.pairs import Paired, paired_means, paired_proportions
from ..quality.statistics import Estimate
from .records import Record


@dataclass(frozen=True)
class Metric:
    """A figure of a benchmark. The `main` one of each is what verdicts and cards go by."""

    task: str
    name: str
    label: str
    main: bool = False
    clustered: bool = False  # groups (subjects) are clusters; else every item stands alone
    listed: bool = False  # a value per instruction or token of an item; else one
    divergence: bool = False  # in nats per token and better when lower; else a share

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown."""
        return 1 if self.divergence else 100

    @property
    def unit(self) -> str:
        return "nats" if self.divergence else "points"


METRICS = (
    Metric("mmlu", "accuracy", "MMLU, 5-shot", main=True, clustered=True),
    Metric("gsm8k", "flexible", "GSM8K, 3-shot", main=True),
    Metric("gsm8k", "strict", "GSM8K, 3-shot, strict"),
    Metric("ifeval", "prompt_strict", "IFEval, strict", main=True),
    Metric("ifeval", "prompt_loose", "IFEval, loose"),
    Metric("ifeval", "instructions_strict", "IFEval by instruction, strict", listed=True),
    Metric("ifeval", "instructions_loose", "IFEval by instruction, loose", listed=True),
    Metric("bfcl", "ast", "BFCL-V3 simple", main=True),
    Metric("humaneval", "pass", "HumanEval pass@1", main=True),
    Metric("kl", "kl", "KL, nats per token", main=True, listed=True, divergence=True),
    Metric("kl", "top1", "Same top token", listed=True),
)
TASKS = tuple(dict.fromkeys(metric.task for metric in METRICS))


def of_task(task: str) -> list[Metric]:
    """The metrics of a benchmark, the main one first."""
    return [metric for metric in METRICS if metric.task == task]


def main_of(task: str) -> Metric:
    """The metric that stands for the benchmark."""
    return of_task(task)[0]


def estimate(metric: Metric, records: Sequence[Record]) -> Estimate:
    """The metric over all `records`, at least one, with its interval."""
    if metric.divergence:
        return statistics.mean(*_totals(metric, records), _clusters(metric, records))
    if metric.listed:  # an item's instructions or tokens are a cluster
        each = [values(metric, record) for record in records]
        items = [i for i, one in enumerate(each) for _ in one]
        return statistics.proportion([value for one in each for value in one], items)
    return statistics.proportion(
        [r.metrics[metric.name] for r in records], _clusters(metric, records)
    )


def paired(metric: Metric, first: Sequence[Record], second: Sequence[Record]) -> Paired:
    """Second less first, over the same items in the same order."""
    if not metric.listed:
        a, b = ([r.metrics[metric.name] for r in records] for records in (first, second))
        return paired_proportions(a, b, _clusters(metric, first))
    sums, counts = _totals(metric, first)
    other_sums, other_counts = _totals(metric, second)
    if counts != other_counts:
        raise OptiqError(
            f"{metric.task}: the models were scored on different {metric.name} of the same item; "
            "evaluate both with one version"
        )
    return paired_means(sums, other_sums, counts, _clusters(metric, first))


def values(metric: Metric, record: Record) -> list[float]:
    """The values of a `listed` metric."""
    found = record.metrics[metric.name]
    if not isinstance(found, list):
        raise OptiqError(
            f"{metric.task}: {metric.name} of {record.id} is not a list; evaluate again"
        )
    return [float(value) for value in found]


def _totals(metric: Metric, records: Sequence[Record]) -> tuple[list[float], list[int]]:
    """Sum and number of the values of each item."""
    found = [values(metric, record) for record in records]
    return [sum(one) for one in found], [len(one) for one in found]


def _clusters(metric: Metric, records: Sequence[Record]) -> list[str] | None:
    return [record.group for record in records] if metric.clustered else None
