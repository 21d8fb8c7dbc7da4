"""Means and clustered errors against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from optiq.quality.tally import score


def test_mean_and_clustered_error() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, 30).tolist()
    totals = rng.gamma(2, 1, 30) * lengths
    mean = totals.sum() / sum(lengths)
    residuals = totals - mean * np.array(lengths)
    se = np.sqrt(30 / 29 * (residuals**2).sum()) / sum(lengths)
    found, error = score(totals.tolist(), lengths)
    assert found == pytest.approx(mean, rel=1e-12)
    assert error == pytest.approx(se, rel=1e-9)
    # the spread over redrawn sets of sequences is what the error says
    redrawn = [
        totals[pick].sum() / np.array(lengths)[pick].sum()
        for pick in rng.integers(0, 30, (4000, 30))
    ]
    assert np.std(redrawn) == pytest.approx(se, rel=0.1)


def test_one_sequence_has_no_error() -> None:
    assert score([3.0], [6]) == (0.5, None)


def test_equal_sequences_have_no_spread() -> None:
    assert score([0.1 * 7] * 3, [7, 7, 7])[1] == pytest.approx(0, abs=1e-9)
