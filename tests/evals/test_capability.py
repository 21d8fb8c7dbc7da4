"""The Capability Score against a published card and a published propagation of intervals."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import pytest

from optiq.errors import EvalError
from optiq.evals import capability
from optiq.quality import statistics as st
from optiq.quality.pairs import paired_proportions
from tests.quality.test_statistics import CARD, answers


def test_capability_of_the_card() -> None:
    scores = {task: st.proportion(answers(*row[:2])) for task, row in CARD.items()}
    found = capability.score(scores)
    assert 100 * found.value == pytest.approx(70.6, abs=0.05)
    assert 100 * (found.high - found.low) / 2 == pytest.approx(2.1, abs=0.05)
    del scores["bfcl"], scores["mmlu"]
    with pytest.raises(EvalError, match="no Capability Score without mmlu, bfcl;"):
        capability.score(scores)


def test_propagation_published() -> None:
    """56/70 less 48/80: 0.2 (0.0524 to 0.3339), Newcombe (1998) 873, table II, method 10."""
    a, b = st.proportion(answers(56, 70)), st.proportion(answers(48, 80))
    found = capability.propagate([(a.value, a.low, a.high), (-b.value, -b.high, -b.low)])
    assert [2 * x for x in found] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)


def test_a_perfect_score_still_has_an_error() -> None:
    five = dict.fromkeys(capability.BENCHMARKS, st.proportion([True] * 20))
    found = capability.score(five)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(1 - (1 - st.wilson(20, 20)[0]) / sqrt(5))


def test_paired_capability() -> None:
    one = paired_proportions([False] * 12 + [True] * 88, [True] * 100)
    none = paired_proportions([True, False] * 50, [True, False] * 50)
    pairs = dict.fromkeys(capability.BENCHMARKS, none) | {"mmlu": one}
    found = capability.difference(pairs)
    assert found.difference == pytest.approx(0.12 / 5)
    assert found.low < found.difference < found.high
    assert found.se == pytest.approx(sqrt(one.se**2 + 4 * none.se**2) / 5)
    z = found.difference / found.se
    assert found.p == pytest.approx(2 * NormalDist().cdf(-z))
    with pytest.raises(EvalError, match="without humaneval"):
        capability.difference({k: v for k, v in pairs.items() if k != "humaneval"})
