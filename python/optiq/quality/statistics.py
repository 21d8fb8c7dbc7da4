"""How sure a score is. NumPy only: no MLX, no files.

Scores are shares between 0 and 1 or means in their own unit. Items are a sample of all that could
have been asked (Miller, Adding Error Bars to Evals, arXiv:2411.00640), and items of one cluster (a
subject, a document, a prompt with several instructions) are not independent. Intervals are of 95 %.

Clusters never narrow an interval of shares: few of them can look more alike than they are
(Bowyer et al., arXiv:2503.01747), and a score of 0 or 1 would have no error at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum, inf, isfinite, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import OptiqError
from .samples import Floats, Groups, finite, per_cluster, right

ALPHA = 0.05
Z = NormalDist().inv_cdf(1 - ALPHA / 2)
RESAMPLES = 10_000
BLOCK = 1_000  # of them at a time, for the memory


@dataclass(frozen=True)
class Estimate:
    """A score, its interval, and the number of items (or of tokens, of a mean per token).

    With a single cluster the limits are unknown, which is infinite.
    """

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | None]:
        """The fields; what is infinite as None."""
        return known(asdict(self))


class Quantiles(NamedTuple):
    """The tail of a distribution."""

    median: float
    p95: float
    p99: float
    p999: float
    max: float


def known(fields: Mapping[str, float | None]) -> dict[str, float | None]:
    """The fields, with None for what is infinite."""
    return {name: x if x is not None and isfinite(x) else None for name, x in fields.items()}


def mean_per_token(
    totals: Sequence[float] | Floats, lengths: Sequence[float] | Floats
) -> tuple[float, float | None]:
    """The mean per token of sequences with these totals and lengths, and its standard error.

    Sequences stand for any clusters, tokens for any items. The error is that of a ratio of sums
    over independent clusters (Cochran, Sampling Techniques, 6.4):
    sqrt(S/(S-1) sum_s (K_s - mean n_s)^2) / sum_s n_s. With a single cluster it is None, unknown.
    """
    count, tokens = len(lengths), fsum(lengths)
    mean = fsum(totals) / tokens
    if count < 2:
        return mean, None
    squares = fsum((k - mean * n) ** 2 for k, n in zip(totals, lengths, strict=True))
    return mean, sqrt(count / (count - 1) * squares) / tokens


def wilson(right: float, n: float) -> tuple[float, float]:
    """The interval of a share (Wilson, JASA 22, 1927): where |p - right / n| = z sqrt(p q / n)."""
    if not 0 <= right <= n or n <= 0:
        raise OptiqError(f"{right} right of {n} is not a share; give 0 <= right <= n and n > 0")
    share, z2 = right / n, Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the two terms cancel, but for their rounding.
    return (0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)


def proportion(answers: ArrayLike, groups: Groups = None) -> Estimate:
    """The share of right answers (bool [items]) with Wilson's interval.

    With `groups` (the cluster of each item) the interval is that of n / deff items, the effective
    size of Korn and Graubard (Survey Methodology 24, 1998); deff, the design effect (Kish, Survey
    Sampling, 1965), is the clustered variance over the binomial one, at least 1.
    """
    values = right(answers)
    n, share = len(values), float(values.mean())
    effective = float(n)
    if groups is not None and 0 < share < 1:
        clustered, binomial = variance(values, groups), share * (1 - share) / n
        effective = max(1.0, n / max(1.0, clustered / binomial))
    return Estimate(share, *wilson(share * effective, effective), n)


def variance(values: Floats, groups: Groups) -> float:
    """Of the mean of `values` over independent clusters; infinite when there is only one."""
    _, se = mean_per_token(*per_cluster(values, groups=groups))
    return inf if se is None else se**2


def mean(sums: ArrayLike, counts: ArrayLike | None = None, groups: Groups = None) -> Estimate:
    """sum(sums) / sum(counts) over items (float [items]; a count of 1 each by default).

    The interval is the `bootstrap`'s over clusters.
    """
    numerator, denominator = per_cluster(finite(sums), counts, groups)
    value = float(numerator.sum() / denominator.sum())
    return Estimate(value, *bootstrap(numerator, denominator), int(denominator.sum()))


def bootstrap(numerator: Floats, denominator: Floats) -> tuple[float, float]:
    """Percentile interval of a ratio of sums over clusters drawn with replacement.

    Deviations are widened by sqrt(k / (k - 1)): k draws from k clusters vary less than the
    clusters themselves (Hesterberg, The American Statistician 69, 2015).
    """
    k = len(numerator)
    if k < 2:
        return -inf, inf
    value = numerator.sum() / denominator.sum()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES // BLOCK):
        chosen = rng.integers(k, size=(BLOCK, k))
        drawn.append(numerator[chosen].sum(axis=1) / denominator[chosen].sum(axis=1))
    spread = (np.concatenate(drawn) - value) * sqrt(k / (k - 1))
    low, high = np.quantile(spread, [ALPHA / 2, 1 - ALPHA / 2])
    return float(value + low), float(value + high)


def quantiles(samples: Sequence[float] | Floats) -> Quantiles:
    """Median, tail quantiles and maximum of single values."""
    return Quantiles(*map(float, np.quantile(samples, [0.5, 0.95, 0.99, 0.999, 1])))


def rank_correlation(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Spearman's coefficient; None for fewer than three pairs or where all ranks are equal."""
    columns = [_ranks(column) for column in zip(*pairs, strict=True)]
    if not columns or len(columns[0]) < 3:
        return None
    n = len(columns[0])
    centred = [[r - (n - 1) / 2 for r in column] for column in columns]
    (xx, xy), (_, yy) = (
        [sum(a * b for a, b in zip(one, other, strict=True)) for other in centred]
        for one in centred
    )
    return xy / (xx * yy) ** 0.5 if xx and yy else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from 0 on; equal values share their mean place."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
