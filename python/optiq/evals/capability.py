"""The Capability Score: the mean of five benchmarks. No MLX, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import TypeVar

from ..errors import EvalError
from ..quality.pairs import Paired
from ..quality.statistics import Estimate
from . import metrics
from .records import Record

BENCHMARKS = ("mmlu", "gsm8k", "ifeval", "bfcl", "humaneval")

Figure = TypeVar("Figure")


def of_records(records: Mapping[str, Sequence[Record]]) -> Estimate | None:
    """The score of the records of all five by task; None where one of the five is missing."""
    if not records.keys() >= set(BENCHMARKS):
        return None
    return score({t: metrics.estimate(metrics.main_of(t), records[t]) for t in BENCHMARKS})


def score(estimates: Mapping[str, Estimate]) -> Estimate:
    """The mean of the five, as a share.

    The benchmarks are independent samples, so on either side the squared distances of the scores
    from their limits add up (Newcombe, Statistics in Medicine 17, 1998, 873; Zou and Donner, ibid.
    27, 2008). Raises EvalError when one of the five is missing.
    """
    five = _all_five(estimates)
    value, low, high = propagate([(e.value, e.low, e.high) for e in five])
    return Estimate(value, low, high, sum(e.n for e in five))


def difference(pairs: Mapping[str, Paired]) -> Paired:
    """The difference of two scores, with its interval as in `score`.

    Its p-value is that of a normal distribution. It sums the five up and is not a sixth member of
    their family of tests.
    """
    five = _all_five(pairs)
    value, low, high = propagate([(p.difference, p.low, p.high) for p in five])
    se = sqrt(sum(p.se**2 for p in five)) / len(five)
    p = 2 * NormalDist().cdf(-abs(value) / se)
    return Paired(value, low, high, se, p, sum(pair.n for pair in five))


def propagate(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent (value, low, high), and its limits."""
    n = len(parts)
    value = sum(v for v, _, _ in parts) / n
    low = value - sqrt(sum((v - low) ** 2 for v, low, _ in parts)) / n
    return value, low, value + sqrt(sum((high - v) ** 2 for v, _, high in parts)) / n


def _all_five(figures: Mapping[str, Figure]) -> list[Figure]:
    missing = [task for task in BENCHMARKS if task not in figures]
    if missing:
        raise EvalError(
            f"no Capability Score without {', '.join(missing)}; it is the mean of all five"
        )
    return [figures[task] for task in BENCHMARKS]
