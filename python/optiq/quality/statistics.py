"""How sure a score is, and whether two models differ. NumPy only: no MLX, no files.

Scores are shares between 0 and 1 or means in their own unit. Items are a sample of all that could
have been asked (Miller, Adding Error Bars to Evals, arXiv:2411.00640), and items of one cluster (a
subject, a document, a prompt with several instructions) are not independent. The models of a pair
answered the same items, in the same order. Intervals are of 95 %.

Clusters never narrow an interval of shares: few of them can look more alike than they are
(Bowyer et al., arXiv:2503.01747), and a score of 0 or 1 would have no error at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import fsum, inf, isfinite, sqrt
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import OptiqError

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
BLOCK = 1_000  # of them at a time, for the memory
# The benchmarks that the Capability Score is the mean of.
CAPABILITY = ("mmlu", "gsm8k", "ifeval", "bfcl", "humaneval")

Score = TypeVar("Score")

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(1 - ALPHA / 2)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Groups = Sequence[Hashable] | None


@dataclass(frozen=True)
class Estimate:
    """A score, its interval, and the number of items (or of tokens, of a mean per token).

    Limits that are not known, for want of a second cluster, are infinite.
    """

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | None]:
        """The fields; what is infinite as None."""
        return _json(self)


@dataclass(frozen=True)
class Paired:
    """Second model minus first: the difference, its interval, standard error and p-value.

    The p-value is two-sided. `only_first` and `only_second` count the items that one model alone
    got right; None where items are not right or wrong. What is not known is infinite.
    """

    difference: float
    low: float
    high: float
    se: float
    p: float
    n: int
    only_first: int | None = None
    only_second: int | None = None

    def to_json(self) -> dict[str, float | None]:
        """The fields; what is infinite as None."""
        return _json(self)


def wilson(right: float, n: float) -> tuple[float, float]:
    """The interval of a share (Wilson, JASA 22, 1927): where |p - right / n| = z sqrt(p q / n)."""
    if not 0 <= right <= n or n <= 0:
        raise OptiqError(f"{right} right of {n} is no share; give 0 <= right <= n and n > 0")
    share, z2 = right / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the two terms cancel, but for their rounding.
    return (0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)


def proportion(right: ArrayLike, groups: Groups = None) -> Estimate:
    """The share of `right` (bool [items]) with Wilson's interval.

    With `groups` (the cluster of each item) the interval is that of n / deff items, the effective
    size of Korn and Graubard (Survey Methodology 24, 1998); deff, the design effect (Kish, Survey
    Sampling, 1965), is the clustered variance over the binomial one, at least 1.
    """
    values = _right(right)
    n, share = len(values), float(values.mean())
    effective = float(n)
    if groups is not None and 0 < share < 1:
        clustered, binomial = _variance(values, _clusters(groups, n)), share * (1 - share) / n
        effective = max(1.0, n / max(1.0, clustered / binomial))
    return Estimate(share, *wilson(share * effective, effective), n)


def mean(sums: ArrayLike, counts: ArrayLike | None = None, groups: Groups = None) -> Estimate:
    """sum(sums) / sum(counts) over items (float [items]; a count of 1 each by default).

    The interval is the bootstrap's over clusters (`_bootstrap`).
    """
    numerator, denominator = _per_cluster(_finite(sums), counts, groups)
    value = float(numerator.sum() / denominator.sum())
    return Estimate(value, *_bootstrap(numerator, denominator), int(denominator.sum()))


def capability(scores: Mapping[str, Estimate]) -> Estimate:
    """The Capability Score: the mean of the five benchmarks of `CAPABILITY`, as a share.

    The benchmarks are independent samples, so on either side the squared distances of the scores
    from their limits add up (Newcombe, Statistics in Medicine 17, 1998, 873; Zou and Donner, ibid.
    27, 2008). Raises OptiqError when one of the five is missing.
    """
    parts = _all_five(scores)
    value, low, high = _propagate([(s.value, s.low, s.high) for s in parts])
    return Estimate(value, low, high, sum(s.n for s in parts))


def paired_proportions(first: ArrayLike, second: ArrayLike, groups: Groups = None) -> Paired:
    """Two models' right answers (bool [items] each) to the same items.

    The test is McNemar's, exact: among the items that one model alone got right, each is as likely
    the one's as the other's. With `groups` whole clusters change sides instead (`_sign_flip`).
    Interval and error are Bonett and Price's (J. Educ. Behav. Stat. 37, 2012): with
    b = (only first + 1) / (n + 2) and c = (only second + 1) / (n + 2),
    c - b -+ z sqrt((b + c - (c - b)^2) / (n + 2)), the variance times the clusters' design effect.
    """
    change = _right(second) - _same_length(_right(first), second)
    n, lost, gained = len(change), int((change < 0).sum()), int((change > 0).sum())
    b, c = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    variance = (b + c - (c - b) ** 2) / (n + 2)
    if groups is None:
        p = mcnemar(lost, gained)
    else:
        cluster = _clusters(groups, n)
        p = _sign_flip(_sums(change, cluster))
        if (independent := float(change.var()) / n) > 0:
            variance *= max(1.0, _variance(change, cluster) / independent)
    se = sqrt(variance)
    low, high = max(-1.0, c - b - _Z * se), min(1.0, c - b + _Z * se)
    return Paired((gained - lost) / n, low, high, se, p, n, lost, gained)


def paired_means(
    first: ArrayLike,
    second: ArrayLike,
    counts: ArrayLike | None = None,
    groups: Groups = None,
) -> Paired:
    """Two models' sums (float [items] each) over the same `counts`, such as KL summed over tokens.

    The interval is the paired bootstrap's over clusters (`_bootstrap`), the test flips the signs of
    clusters (`_sign_flip`).
    """
    change = _finite(second) - _same_length(_finite(first), second)
    numerator, denominator = _per_cluster(change, counts, groups)
    k, total = len(numerator), float(denominator.sum())
    value = float(numerator.sum()) / total
    squares = float(((numerator - value * denominator) ** 2).sum())
    se = sqrt(k / (k - 1) * squares) / total if k > 1 else inf
    low, high = _bootstrap(numerator, denominator)
    return Paired(value, low, high, se, _sign_flip(numerator), int(total))


def paired_capability(pairs: Mapping[str, Paired]) -> Paired:
    """The difference of two Capability Scores, with its interval as in `capability`.

    Its p-value is that of a normal distribution. It sums the five up and is no sixth member of
    their family of tests.
    """
    parts = _all_five(pairs)
    value, low, high = _propagate([(p.difference, p.low, p.high) for p in parts])
    se = sqrt(sum(p.se**2 for p in parts)) / len(parts)
    p = 2 * _NORMAL.cdf(-abs(value) / se)
    return Paired(value, low, high, se, p, sum(part.n for part in parts))


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's two-sided p-value (Psychometrika 12, 1947), exact: twice the smaller tail."""
    n = lost + gained
    tail = ways = 1  # to get k of n, from k = 0
    for k in range(min(lost, gained)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of tests (Holm, Scand. J. Statistics 6, 1979).

    The k-th smallest of m is multiplied by m - k + 1, and not below the one before it. Below
    `ALPHA` a difference is detected: the chance of any false detection in the family stays below.
    """
    adjusted, least = dict(p_values), 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = adjusted[name] = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
    return adjusted


def detectable(se: float, tests: int = 1) -> float:
    """The true difference that a two-sided test finds in 80 % of cases: (z_(1-a/2) + z_0.8) se.

    Miller, on power analysis. `se` is that of the paired difference; for shares it is about
    sqrt(d / n), where the models differ on a share d of the items. In a family of `tests` a is
    `ALPHA` / `tests`, what Holm asks of the smallest p-value.
    """
    return (_NORMAL.inv_cdf(1 - ALPHA / (2 * tests)) + _NORMAL.inv_cdf(POWER)) * se


def verdict(
    pair: Paired,
    adjusted: float,
    *,
    tests: int = 1,
    scale: float = 100,
    unit: str = "points",
    lower_is_better: bool = False,
) -> str:
    """What the test says of the second model: "better", "worse", or that nothing was detected.

    `adjusted` is Holm's p-value in a family of `tests`. Nothing detected is not the same as equal,
    so the text then names the difference that would have been found, times `scale` in `unit`.
    """
    if adjusted < ALPHA:
        return "better" if (pair.difference < 0) == lower_is_better else "worse"
    found = detectable(pair.se, tests)
    power = f" (80 % power at {scale * found:.2g} {unit})" if 0 < found < inf else ""
    return f"no detectable difference{power}"


def _json(record: Estimate | Paired) -> dict[str, float | None]:
    fields = asdict(record).items()
    return {name: x if x is not None and isfinite(x) else None for name, x in fields}


def _all_five(scores: Mapping[str, Score]) -> list[Score]:
    missing = [task for task in CAPABILITY if task not in scores]
    if missing:
        raise OptiqError(
            f"no Capability Score without {', '.join(missing)}; it is the mean of all five"
        )
    return [scores[task] for task in CAPABILITY]


def _propagate(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent (value, low, high), and its limits."""
    n = len(parts)
    value = sum(v for v, _, _ in parts) / n
    low = value - sqrt(sum((v - low) ** 2 for v, low, _ in parts)) / n
    return value, low, value + sqrt(sum((high - v) ** 2 for v, _, high in parts)) / n


def _variance(values: Floats, cluster: Ints) -> float:
    """Of the mean of `values`, over independent clusters; infinite when there is only one.

    G / (G - 1) sum_g (sum of deviations in g)^2 / n^2 (Cochran, Sampling Techniques, 6.4).
    """
    sums = _sums(values - values.mean(), cluster)
    g = len(sums)
    return g / (g - 1) * float((sums**2).sum()) / len(values) ** 2 if g > 1 else inf


def _bootstrap(numerator: Floats, denominator: Floats) -> tuple[float, float]:
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


def _sign_flip(changes: Floats) -> float:
    """Two-sided p-value of sum(changes), [clusters], when each could as well have the other sign.

    Fisher's randomisation test. Exact for whole numbers (for changes of 1 it is McNemar's test) and
    for up to 13 clusters, else from `RESAMPLES` draws, the observed one counted in (Phipson and
    Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010).
    """
    changes = changes[changes != 0]
    least = abs(changes.sum()) * (1 - 1e-12)
    if np.array_equal(changes, np.rint(changes)):
        steps = np.abs(changes).astype(int)
        total = int(steps.sum())
        chance = np.zeros(2 * total + 1)  # of each sum from -total to total
        chance[total] = 1
        for step in steps:
            chance = (np.roll(chance, step) + np.roll(chance, -step)) / 2
        return min(1.0, float(chance[np.abs(np.arange(-total, total + 1)) >= least].sum()))
    if len(changes) <= 13:
        signs = np.array(list(product((1, -1), repeat=len(changes))))
        return float((np.abs(signs @ changes) >= least).mean())
    rng, extreme = np.random.default_rng(0), 0
    for _ in range(RESAMPLES // BLOCK):
        signs = 2.0 * rng.integers(2, size=(BLOCK, len(changes))) - 1
        extreme += int((np.abs(signs @ changes) >= least).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def _per_cluster(sums: Floats, counts: ArrayLike | None, groups: Groups) -> tuple[Floats, Floats]:
    """Sums and counts of each cluster."""
    n = len(sums)
    number = np.ones(n) if counts is None else _same_length(_finite(counts), sums)
    if (number <= 0).any():
        raise OptiqError("an item with a count of 0 has no mean; leave it out")
    if groups is None:
        return sums, number
    cluster = _clusters(groups, n)
    return _sums(sums, cluster), _sums(number, cluster)


def _sums(values: Floats, cluster: Ints) -> Floats:
    return np.bincount(cluster, values).astype(np.float64)


def _clusters(groups: Sequence[Hashable], n: int) -> Ints:
    """The number of each item's cluster, from 0."""
    if len(groups) != n:
        raise OptiqError(f"{n} items have {len(groups)} groups; give each item one")
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def _finite(values: ArrayLike) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise OptiqError("a score needs a list of at least one finite number")
    return array


def _right(values: ArrayLike) -> Floats:
    array = _finite(values)
    if not np.isin(array, (0, 1)).all():
        raise OptiqError("an answer is right or wrong; score other numbers by their mean")
    return array


def _same_length(values: Floats, other: ArrayLike) -> Floats:
    if len(values) != np.size(other):
        raise OptiqError(f"{len(values)} and {np.size(other)} items cannot be paired")
    return values


def mean_per_token(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, float | None]:
    """Mean per token over sequences of these `lengths`, and its standard error.

    The error is that of a ratio of sums over independent sequences (Cochran, Sampling
    Techniques, 6.4): sqrt(S/(S-1) sum_s (K_s - mean n_s)^2) / sum_s n_s; tokens of one
    sequence are not independent. With a single sequence it is unknown: None.
    """
    count, tokens = len(lengths), sum(lengths)
    mean = fsum(totals) / tokens
    if count < 2:
        return mean, None
    squares = fsum((k - mean * n) ** 2 for k, n in zip(totals, lengths, strict=True))
    return mean, sqrt(count / (count - 1) * squares) / tokens


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
