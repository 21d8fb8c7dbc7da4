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
from optiq.quality.pairs import detectable, paired_means, paired_proportions, verdict
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
    assert 100 * detectable(sqrt(0.1 / n)) == pytest.approx(found, abs=0.05)
    assert estimate.n == n


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
    assert paired_proportions(first, right, groups).se == pytest.approx(
        paired_proportions(first, right).se
    )


def test_one_cluster_tells_nothing() -> None:
    found = st.proportion([True, False, True, True], ["a"] * 4)
    assert (found.low, found.high) == st.wilson(0.75, 1)
    alone = st.mean([1.0, 3.0], groups=["a", "a"])
    assert (alone.value, alone.low, alone.high) == (2, -inf, inf)
    assert alone.to_json() == {"value": 2, "low": None, "high": None, "n": 2}
    pair = paired_means([1.0, 3.0], [2.0, 5.0], groups=["a", "a"])
    assert (pair.difference, pair.p, pair.se) == (1.5, 1, inf)
    assert verdict(pair, pair.p) == "no detectable difference"
    json.dumps(pair.to_json(), allow_nan=False)
    pair = paired_proportions([True, False, False], [True, True, False], ["a"] * 3)
    assert (pair.low, pair.high, pair.p) == (-1, 1, 1)


def test_clustered_error_is_that_of_kl_scores() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 60, 12)
    sums, none = rng.normal(1, 0.3, 12) * counts, np.zeros(12)
    value, se = mean_per_token(sums.tolist(), counts.tolist())
    pair = paired_means(none, sums, counts)
    assert (pair.difference, pair.se) == pytest.approx((value, se))
    assert pair.n == counts.sum()
    split = np.repeat(sums / counts, counts)  # the same tokens one by one
    groups = np.repeat(np.arange(12), counts).tolist()
    assert paired_means(0 * split, split, groups=groups).se == pytest.approx(se)
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
    pair = paired_means(sums, 3 * sums, counts)
    assert (pair.low, pair.high) == pytest.approx((2 * found.low, 2 * found.high))


def test_bootstrap_covers() -> None:
    """About 95 % of 150 samples of 12 skewed clusters, within three standard errors."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        found = st.mean(rng.gamma(4, 0.25, 12))
        hits += found.low <= 1 <= found.high
    assert hits / 150 == pytest.approx(0.94, abs=3 * sqrt(0.95 * 0.05 / 150))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.wilson(3, 2), "is not a share"),
        (lambda: st.wilson(0, 0), "is not a share"),
        (lambda: st.proportion([]), "at least one finite number"),
        (lambda: st.mean([1.0, nan]), "at least one finite number"),
        (lambda: st.proportion([0.5, 1]), "right or wrong"),
        (lambda: st.proportion([True, False], ["a"]), "2 items have 1 groups"),
        (lambda: st.mean([1.0, 2.0], [1.0, 0.0]), "count of 0"),
        (lambda: st.mean([1.0, 2.0], [1.0]), "2 and 1 items cannot be paired"),
        (lambda: paired_means([1.0], [1.0, 2.0]), "1 and 2 items cannot be paired"),
    ],
)
def test_refuses(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(OptiqError, match=message):
        call()


def test_needs_no_mlx() -> None:
    code = "import sys, optiq.evals.capability; print('mlx.core' in sys.modules)"
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
