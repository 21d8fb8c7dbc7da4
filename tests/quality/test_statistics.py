"""Intervals and tests against published examples, full enumeration and exact coverage."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from math import comb, inf, nan, sqrt

import numpy as np
import pytest

from optiq.errors import OptiqError
from optiq.quality import statistics as st
from optiq.quality.statistics import mean_per_token

# Scores of a published card: right answers of how many, Wilson's interval, detectable difference.
CARD = {
    "mmlu": (588, 1000, 55.7, 61.8, 2.8),
    "gsm8k": (778, 1000, 75.1, 80.3, 2.8),
    "ifeval": (382, 541, 66.6, 74.3, 3.8),
    "bfcl": (138, 200, 62.3, 75.0, 6.3),
    "humaneval": (126, 164, 69.8, 82.6, 6.9),
}


def answers(right: int, n: int) -> list[bool]:
    return [True] * right + [False] * (n - right)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(right: int, n: int, low: float, high: float) -> None:
    assert st.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = st.wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_covers() -> None:
    """Exactly, over the binomial: 95 % on average over many shares, and never far below."""
    n = 50
    limits = [st.wilson(k, n) for k in range(n + 1)]
    covered = [
        sum(
            comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, (low, high) in enumerate(limits)
            if low <= p <= high
        )
        for p in np.linspace(0.05, 0.95, 181)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.006)
    assert min(covered) > 0.90


@pytest.mark.parametrize("task", CARD)
def test_the_card(task: str) -> None:
    right, n, low, high, found = CARD[task]
    estimate = st.proportion(answers(right, n))
    assert (100 * estimate.low, 100 * estimate.high) == pytest.approx((low, high), abs=0.051)
    assert 100 * st.detectable(sqrt(0.1 / n)) == pytest.approx(found, abs=0.05)
    assert estimate.n == n


def test_capability_of_the_card() -> None:
    scores = {task: st.proportion(answers(*row[:2])) for task, row in CARD.items()}
    found = st.capability(scores)
    assert 100 * found.value == pytest.approx(70.6, abs=0.05)
    assert 100 * (found.high - found.low) / 2 == pytest.approx(2.1, abs=0.05)
    del scores["bfcl"], scores["mmlu"]
    with pytest.raises(OptiqError, match="no Capability Score without mmlu, bfcl;"):
        st.capability(scores)


def test_propagation_published() -> None:
    """56/70 less 48/80: 0.2 (0.0524 to 0.3339), Newcombe (1998) 873, table II, method 10."""
    a, b = st.proportion(answers(56, 70)), st.proportion(answers(48, 80))
    found = st._propagate([(a.value, a.low, a.high), (-b.value, -b.high, -b.low)])
    assert [2 * x for x in found] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)


def test_a_perfect_score_still_has_an_error() -> None:
    five = dict.fromkeys(st.CAPABILITY, st.proportion([True] * 20))
    found = st.capability(five)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(1 - (1 - st.wilson(20, 20)[0]) / sqrt(5))


def test_clusters_that_answer_as_one_count_as_one() -> None:
    """30 clusters of 8 equal answers: the clustered variance is p q / 29 whatever their size."""
    right = np.repeat([True] * 20 + [False] * 10, 8)
    groups = np.repeat(np.arange(30), 8).tolist()
    found = st.proportion(right, groups)
    assert (found.low, found.high) == pytest.approx(st.wilson(2 / 3 * 29, 29))
    assert found.low < st.proportion(right).low


def test_clusters_never_narrow() -> None:
    right, groups = [True, False] * 50, [i // 2 for i in range(100)]
    assert st.proportion(right, groups) == st.proportion(right)
    first = [False] * 100
    assert st.paired_proportions(first, right, groups).se == pytest.approx(
        st.paired_proportions(first, right).se
    )


def test_one_cluster_tells_nothing() -> None:
    found = st.proportion([True, False, True, True], ["a"] * 4)
    assert (found.low, found.high) == st.wilson(0.75, 1)
    alone = st.mean([1.0, 3.0], groups=["a", "a"])
    assert (alone.value, alone.low, alone.high) == (2, -inf, inf)
    assert alone.to_json() == {"value": 2, "low": None, "high": None, "n": 2}
    pair = st.paired_means([1.0, 3.0], [2.0, 5.0], groups=["a", "a"])
    assert (pair.difference, pair.p, pair.se) == (1.5, 1, inf)
    assert st.verdict(pair, pair.p) == "no detectable difference"
    json.dumps(pair.to_json(), allow_nan=False)
    pair = st.paired_proportions([True, False, False], [True, True, False], ["a"] * 3)
    assert (pair.low, pair.high, pair.p) == (-1, 1, 1)


def test_clustered_error_is_that_of_kl_scores() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 60, 12)
    sums, none = rng.normal(1, 0.3, 12) * counts, np.zeros(12)
    value, se = mean_per_token(sums.tolist(), counts.tolist())
    pair = st.paired_means(none, sums, counts)
    assert (pair.difference, pair.se) == pytest.approx((value, se))
    assert pair.n == counts.sum()
    split = np.repeat(sums / counts, counts)  # the same tokens one by one
    groups = np.repeat(np.arange(12), counts).tolist()
    assert st.paired_means(0 * split, split, groups=groups).se == pytest.approx(se)
    assert st.mean(split, groups=groups).value == pytest.approx(value)


def enumerated(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ratio of every way to draw as many clusters with replacement."""
    draws = [list(d) for d in product(range(len(sums)), repeat=len(sums))]
    return np.array([sums[d].sum() / counts[d].sum() for d in draws])


def test_bootstrap_is_the_enumeration() -> None:
    sums, counts = np.array([3.0, 1.0, 7.5, 2.0, 4.4]), np.array([2.0, 3.0, 4.0, 2.0, 5.0])
    every = enumerated(sums, counts)
    value = sums.sum() / counts.sum()
    limits = value + (np.quantile(every, [0.025, 0.975]) - value) * sqrt(5 / 4)
    found = st.mean(sums, counts)
    assert (found.low, found.high) == pytest.approx(tuple(limits), abs=0.03)
    assert found.value == pytest.approx(value)
    pair = st.paired_means(sums, 3 * sums, counts)
    assert (pair.low, pair.high) == pytest.approx((2 * found.low, 2 * found.high))


def test_bootstrap_covers() -> None:
    """About 95 % of 150 samples of 12 skewed clusters, within three standard errors."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        found = st.mean(rng.gamma(4, 0.25, 12))
        hits += found.low <= 1 <= found.high
    assert hits / 150 == pytest.approx(0.94, abs=3 * sqrt(0.95 * 0.05 / 150))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 3), (1, 8), (2, 9), (7, 4)])
def test_mcnemar_is_the_enumeration(lost: int, gained: int) -> None:
    signs = list(product((1, -1), repeat=lost + gained))
    p = sum(abs(sum(s)) >= abs(gained - lost) for s in signs) / len(signs)
    assert st.mcnemar(lost, gained) == pytest.approx(p)
    first = [True] * lost + [False] * gained + [True, False] * 5
    second = [False] * lost + [True] * gained + [True, False] * 5
    pair = st.paired_proportions(first, second)
    assert pair.p == pytest.approx(p)
    assert (pair.only_first, pair.only_second, pair.n) == (lost, gained, len(first))
    assert pair.difference == pytest.approx(np.mean(second) - np.mean(first))
    alone = st.paired_proportions(first, second, list(range(len(first))))
    assert alone.p == pytest.approx(p)


def test_mcnemar_of_a_whole_benchmark() -> None:
    """Near the normal approximation with continuity correction where that holds."""
    lost, gained = 700, 790
    z = (abs(gained - lost) - 1) / sqrt(lost + gained)
    assert st.mcnemar(lost, gained) == pytest.approx(2 * st._NORMAL.cdf(-z), rel=0.01)
    assert st.mcnemar(0, 3000) < 1e-300


@pytest.mark.parametrize("scale", [1, 0.37])
@pytest.mark.parametrize("changes", [[3, -1, 2, 2, 0, 1], [5], [-2, -2, 1, -4, -3, 1, -1]])
def test_whole_clusters_change_sides(changes: list[int], scale: float) -> None:
    signs = list(product((1, -1), repeat=len(changes)))
    sums = [abs(sum(a * b for a, b in zip(s, changes, strict=True))) for s in signs]
    p = sum(x >= abs(sum(changes)) for x in sums) / len(signs)
    first = np.zeros(len(changes))
    assert st.paired_means(first, scale * np.array(changes)).p == pytest.approx(p)
    if scale == 1:
        gained = [max(c, 0) for c in changes]
        lost = [max(-c, 0) for c in changes]
        groups = [g for g, c in enumerate(changes) for _ in range(abs(c))]
        a = [x for x, y in zip(lost, gained, strict=True) for x in [True] * x + [False] * y]
        assert st.paired_proportions(a, [not x for x in a], groups).p == pytest.approx(p)


def test_drawn_signs_are_near_all_signs() -> None:
    """15 clusters: 32,768 patterns, more than are enumerated."""
    changes = np.random.default_rng(3).normal(0.35, 1, 15)
    signs = np.array(list(product((1, -1), repeat=15)))
    p = (np.abs(signs @ changes) >= abs(changes.sum()) * (1 - 1e-12)).mean()
    assert st.paired_means(np.zeros(15), changes).p == pytest.approx(p, abs=0.015)


def test_bonett_price_worked() -> None:
    """Airway reactivity before and after a transplantation, 21 children, 1 and 7 discordant."""
    first = [False] + [True] * 7 + [True] * 13
    second = [True] + [False] * 7 + [True] * 13
    pair = st.paired_proportions(first, second)
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
            pair = st.paired_proportions(
                [True] * lost + [False] * gained + rest, [False] * lost + [True] * gained + rest
            )
            covered += chance * (pair.low <= c - b <= pair.high)
    assert 0.935 < covered < most


def test_detectable_is_detected() -> None:
    """A true difference of that size is found by McNemar's test in about 80 % of samples."""
    n, share = 1000, 0.1
    difference = st.detectable(sqrt(share / n))
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        lost, gained, _ = rng.multinomial(
            n, [(share - difference) / 2, (share + difference) / 2, 1 - share]
        )
        found += st.mcnemar(int(lost), int(gained)) < st.ALPHA
    assert found / 2000 == pytest.approx(0.8, abs=0.04)
    assert st.detectable(1, tests=5) > st.detectable(1)


def test_holm_published() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    found = st.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert st.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_verdict() -> None:
    same = st.paired_proportions([True] * 60 + [False] * 40, [True] * 58 + [False] * 42)
    points = 100 * st.detectable(same.se, tests=5)
    assert st.verdict(same, 0.5, tests=5) == (
        f"no detectable difference (80 % power at {points:.2g} points)"
    )
    up = st.paired_proportions([False] * 30 + [True] * 70, [True] * 100)
    assert st.verdict(up, up.p) == "better"
    assert st.verdict(up, up.p, lower_is_better=True) == "worse"
    assert st.verdict(up, 0.05).startswith("no detectable difference")
    kl = st.paired_means([0.2] * 9, [0.1] * 9)
    assert st.verdict(kl, kl.p, lower_is_better=True) == "better"
    equal = st.paired_means([0.2] * 9, [0.2] * 9)
    assert st.verdict(equal, equal.p) == "no detectable difference"


def test_paired_capability() -> None:
    one = st.paired_proportions([False] * 12 + [True] * 88, [True] * 100)
    none = st.paired_proportions([True, False] * 50, [True, False] * 50)
    pairs = dict.fromkeys(st.CAPABILITY, none) | {"mmlu": one}
    found = st.paired_capability(pairs)
    assert found.difference == pytest.approx(0.12 / 5)
    assert found.low < found.difference < found.high
    assert found.se == pytest.approx(sqrt(one.se**2 + 4 * none.se**2) / 5)
    z = found.difference / found.se
    assert found.p == pytest.approx(2 * st._NORMAL.cdf(-z))
    with pytest.raises(OptiqError, match="without humaneval"):
        st.paired_capability({k: v for k, v in pairs.items() if k != "humaneval"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.wilson(3, 2), "is no share"),
        (lambda: st.wilson(0, 0), "is no share"),
        (lambda: st.proportion([]), "at least one finite number"),
        (lambda: st.mean([1.0, nan]), "at least one finite number"),
        (lambda: st.proportion([0.5, 1]), "right or wrong"),
        (lambda: st.proportion([True, False], ["a"]), "2 items have 1 groups"),
        (lambda: st.mean([1.0, 2.0], [1.0, 0.0]), "count of 0"),
        (lambda: st.mean([1.0, 2.0], [1.0]), "1 and 2 items cannot be paired"),
        (lambda: st.paired_means([1.0], [1.0, 2.0]), "1 and 2 items cannot be paired"),
    ],
)
def test_refuses(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(OptiqError, match=message):
        call()


def test_needs_no_mlx() -> None:
    code = "import sys, optiq.quality.statistics; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_mean_and_clustered_error() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, 30).tolist()
    totals = rng.gamma(2, 1, 30) * lengths
    mean = totals.sum() / sum(lengths)
    residuals = totals - mean * np.array(lengths)
    se = np.sqrt(30 / 29 * (residuals**2).sum()) / sum(lengths)
    found, error = mean_per_token(totals.tolist(), lengths)
    assert found == pytest.approx(mean, rel=1e-12)
    assert error == pytest.approx(se, rel=1e-9)
    # the spread over redrawn sets of sequences is what the error says
    redrawn = [
        totals[pick].sum() / np.array(lengths)[pick].sum()
        for pick in rng.integers(0, 30, (4000, 30))
    ]
    assert np.std(redrawn) == pytest.approx(se, rel=0.1)


def test_one_sequence_has_no_error() -> None:
    assert mean_per_token([3.0], [6]) == (0.5, None)


def test_equal_sequences_have_no_spread() -> None:
    assert mean_per_token([0.1 * 7] * 3, [7, 7, 7])[1] == pytest.approx(0, abs=1e-9)
