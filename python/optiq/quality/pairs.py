"""Whether two models differ, and by how much more than chance. NumPy only: no MLX, no files.

Both answered the same items, in the same order. Differences are second model minus first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from math import inf, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from .samples import Floats, Groups, change, finite, per_cluster, right
from .statistics import ALPHA, BLOCK, RESAMPLES, Z, bootstrap, known, mean_per_token, variance

POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """A difference, its interval, standard error and two-sided p-value; infinite is unknown.

    `only_first` and `only_second` count the items that one model alone got right; None where items
    are not right or wrong.
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
        return known(asdict(self))


def paired_proportions(first: ArrayLike, second: ArrayLike, groups: Groups = None) -> Paired:
    """Two models' right answers (bool [items] each) to the same items.

    The test is McNemar's, exact: among the items that one model alone got right, each is as likely
    the one's as the other's. With `groups` whole clusters change sides instead (`sign_flip`).
    Interval and error are Bonett and Price's (J. Educ. Behav. Stat. 37, 2012): with
    b = (only first + 1) / (n + 2) and c = (only second + 1) / (n + 2),
    c - b -+ z sqrt((b + c - (c - b)^2) / (n + 2)), the variance times the clusters' design effect.
    """
    changes = change(right(first), right(second))
    n, lost, gained = len(changes), int((changes < 0).sum()), int((changes > 0).sum())
    b, c = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    squared = (b + c - (c - b) ** 2) / (n + 2)
    if groups is None:
        p = mcnemar(lost, gained)
    else:
        p = sign_flip(per_cluster(changes, groups=groups)[0])
        if (independent := float(changes.var()) / n) > 0:
            squared *= max(1.0, variance(changes, groups) / independent)
    se = sqrt(squared)
    low, high = max(-1.0, c - b - Z * se), min(1.0, c - b + Z * se)
    return Paired((gained - lost) / n, low, high, se, p, n, lost, gained)


def paired_means(
    first: ArrayLike,
    second: ArrayLike,
    counts: ArrayLike | None = None,
    groups: Groups = None,
) -> Paired:
    """Two models' sums (float [items] each) over the same `counts`, such as KL summed over tokens.

    The interval is the paired `bootstrap`'s over clusters, the test flips the signs of clusters
    (`sign_flip`).
    """
    changes = change(finite(first), finite(second))
    numerator, denominator = per_cluster(changes, counts, groups)
    value, se = mean_per_token(numerator, denominator)
    low, high = bootstrap(numerator, denominator)
    n = int(denominator.sum())
    return Paired(value, low, high, inf if se is None else se, sign_flip(numerator), n)


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's two-sided p-value (Psychometrika 12, 1947), exact: twice the smaller tail."""
    n = lost + gained
    tail = ways = 1  # to get k of n, from k = 0
    for k in range(min(lost, gained)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def sign_flip(changes: Floats) -> float:
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
    normal = NormalDist()
    return (normal.inv_cdf(1 - ALPHA / (2 * tests)) + normal.inv_cdf(POWER)) * se


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
