"""Tests of pairs against full enumeration, published examples and exact coverage."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from optiq.quality import pairs


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 3), (1, 8), (2, 9), (7, 4)])
def test_mcnemar_is_the_enumeration(lost: int, gained: int) -> None:
    signs = list(product((1, -1), repeat=lost + gained))
    p = sum(abs(sum(s)) >= abs(gained - lost) for s in signs) / len(signs)
    assert pairs.mcnemar(lost, gained) == pytest.approx(p)
    first = [True] * lost + [False] * gained + [True, False] * 5
    second = [False] * lost + [True] * gained + [True, False] * 5
    pair = pairs.paired_proportions(first, second)
    assert pair.p == pytest.approx(p)
    assert (pair.only_first, pair.only_second, pair.n) == (lost, gained, len(first))
    assert pair.difference == pytest.approx(np.mean(second) - np.mean(first))
    alone = pairs.paired_proportions(first, second, list(range(len(first))))
    assert alone.p == pytest.approx(p)


def test_mcnemar_of_a_whole_benchmark() -> None:
    """Near the normal approximation with continuity correction where that holds."""
    lost, gained = 700, 790
    z = (abs(gained - lost) - 1) / sqrt(lost + gained)
    assert pairs.mcnemar(lost, gained) == pytest.approx(2 * NormalDist().cdf(-z), rel=0.01)
    assert pairs.mcnemar(0, 3000) < 1e-300


@pytest.mark.parametrize("scale", [1, 0.37])
@pytest.mark.parametrize("changes", [[3, -1, 2, 2, 0, 1], [5], [-2, -2, 1, -4, -3, 1, -1]])
def test_whole_clusters_change_sides(changes: list[int], scale: float) -> None:
    signs = list(product((1, -1), repeat=len(changes)))
    sums = [abs(sum(a * b for a, b in zip(s, changes, strict=True))) for s in signs]
    p = sum(x >= abs(sum(changes)) for x in sums) / len(signs)
    first = np.zeros(len(changes))
    assert pairs.paired_means(first, scale * np.array(changes)).p == pytest.approx(p)
    if scale == 1:
        gained = [max(c, 0) for c in changes]
        lost = [max(-c, 0) for c in changes]
        groups = [g for g, c in enumerate(changes) for _ in range(abs(c))]
        a = [x for x, y in zip(lost, gained, strict=True) for x in [True] * x + [False] * y]
        assert pairs.paired_proportions(a, [not x for x in a], groups).p == pytest.approx(p)


def test_drawn_signs_are_near_all_signs() -> None:
    """15 clusters: 32,768 patterns, more than are enumerated."""
    changes = np.random.default_rng(3).normal(0.35, 1, 15)
    signs = np.array(list(product((1, -1), repeat=15)))
    p = (np.abs(signs @ changes) >= abs(changes.sum()) * (1 - 1e-12)).mean()
    assert pairs.paired_means(np.zeros(15), changes).p == pytest.approx(p, abs=0.015)


def test_bonett_price_worked() -> None:
    """Airway reactivity before and after a transplantation, 21 children, 1 and 7 discordant."""
    first = [False] + [True] * 7 + [True] * 13
    second = [True] + [False] * 7 + [True] * 13
    pair = pairs.paired_proportions(first, second)
    half = 1.959964 * sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert (pair.low, pair.high) == pytest.approx((-6 / 23 - half, -6 / 23 + half))
    assert pair.difference == pytest.approx(-6 / 21)


@pytest.mark.parametrize(
    ("b", "c", "most"), [(0.2, 0.3, 0.96), (0.05, 0.1, 0.98), (0.02, 0.02, 1.0)]
)
def test_paired_interval_covers(b: float, c: float, most: float) -> None:
    """Exactly, over the trinomial of 40 items; too wide only where hardly any differ."""
    n, covered = 40, 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            chance = comb(n, lost) * comb(n - lost, gained)
            chance *= b**lost * c**gained * (1 - b - c) ** (n - lost - gained)
            if chance < 1e-7:
                continue
            rest = [True] * (n - lost - gained)
            pair = pairs.paired_proportions(
                [True] * lost + [False] * gained + rest, [False] * lost + [True] * gained + rest
            )
            covered += chance * (pair.low <= c - b <= pair.high)
    assert 0.935 < covered < most


def test_detectable_is_detected() -> None:
    """A true difference of that size is found by McNemar's test in about 80 % of samples."""
    n, share = 1000, 0.1
    difference = pairs.detectable(sqrt(share / n))
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        lost, gained, _ = rng.multinomial(
            n, [(share - difference) / 2, (share + difference) / 2, 1 - share]
        )
        found += pairs.mcnemar(int(lost), int(gained)) < pairs.ALPHA
    assert found / 2000 == pytest.approx(0.8, abs=0.04)
    assert pairs.detectable(1, tests=5) > pairs.detectable(1)


def test_holm_published() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    found = pairs.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert pairs.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_verdict() -> None:
    same = pairs.paired_proportions([True] * 60 + [False] * 40, [True] * 58 + [False] * 42)
    points = 100 * pairs.detectable(same.se, tests=5)
    assert pairs.verdict(same, 0.5, tests=5) == (
        f"no detectable difference (80 % power at {points:.2g} points)"
    )
    up = pairs.paired_proportions([False] * 30 + [True] * 70, [True] * 100)
    assert pairs.verdict(up, up.p) == "better"
    assert pairs.verdict(up, up.p, lower_is_better=True) == "worse"
    assert pairs.verdict(up, 0.05).startswith("no detectable difference")
    kl = pairs.paired_means([0.2] * 9, [0.1] * 9)
    assert pairs.verdict(kl, kl.p, lower_is_better=True) == "better"
    equal = pairs.paired_means([0.2] * 9, [0.2] * 9)
    assert pairs.verdict(equal, equal.p) == "no detectable difference"
