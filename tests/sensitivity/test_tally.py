"""Means and clustered errors against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from optiq.sensitivity.tally import Tally


def test_mean_and_clustered_error() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, 30).tolist()
    totals = rng.gamma(2, 1, 30) * lengths
    tally = Tally()
    for total, tokens in zip(totals, lengths, strict=True):
        tally.add("a", "4g64", float(total), tokens)
    mean = totals.sum() / sum(lengths)
    residuals = totals - mean * np.array(lengths)
    se = np.sqrt(30 / 29 * (residuals**2).sum()) / sum(lengths)
    score = tally.score("a", "4g64", lengths)
    assert score["kl"] == pytest.approx(mean, rel=1e-12)
    assert score["se"] == pytest.approx(se, rel=1e-9)
    # the spread over redrawn sets of sequences is what the error says
    redrawn = [
        totals[pick].sum() / np.array(lengths)[pick].sum()
        for pick in rng.integers(0, 30, (4000, 30))
    ]
    assert np.std(redrawn) == pytest.approx(se, rel=0.1)


def test_one_sequence_has_no_error() -> None:
    tally = Tally()
    tally.add("a", "4g64", 3.0, 6)
    assert tally.score("a", "4g64", [6]) == {"kl": 0.5, "se": None}


def test_equal_sequences_have_no_spread() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add("a", "4g64", 0.1 * 7, 7)
    assert tally.score("a", "4g64", [7, 7, 7])["se"] == pytest.approx(0, abs=1e-9)
