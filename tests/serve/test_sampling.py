"""Draws, against distributions that are computed in the plainest way in float64."""

from __future__ import annotations

from math import exp, inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.errors import ServeError
from optiq.serve.engine.request import Sampling, Token
from optiq.serve.engine.sampling import Sampler, choose_one

V = 700  # more than one block of the draw


def distribution(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Word by word: temperature, min_p, top_k, top_p."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / s.temperature)
    p[p < s.min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if s.top_k:
        for i in order[s.top_k :]:
            p[i] = 0
    p /= p.sum()
    total = 0.0
    for i in order:
        if total >= s.top_p:
            p[i] = 0
        total += p[i]
    return p / p.sum()


def chosen(logits: np.ndarray, sampler: Sampler) -> Token | ServeError:
    return choose_one(logits, float(logits.max()), sampler)


def draws(logits: np.ndarray, s: Sampling, count: int) -> np.ndarray:
    """How often each word was drawn."""
    sampler = Sampler(s, [], len(logits))
    seen = np.zeros(len(logits))
    for _ in range(count):
        token = chosen(logits.astype(np.float32), sampler)
        assert isinstance(token, Token)
        seen[token.id] += 1
    return seen


@pytest.mark.parametrize(
    "s",
    [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0.6),
        Sampling(seed=3, temperature=2.0, top_k=7),
        Sampling(seed=4, top_p=0.7),
        Sampling(seed=5, min_p=0.2),
        Sampling(seed=6, temperature=1.5, top_k=40, top_p=0.9, min_p=0.01),
    ],
)
def test_words_are_drawn_as_often_as_they_are_likely(s: Sampling) -> None:
    """Pearson's chi-square; words that are expected fewer than five times count as one."""
    logits = np.random.default_rng(3).normal(size=V) * 3
    p, count = distribution(logits, s), 6000
    seen = draws(logits, s, count)
    assert not seen[p == 0].any()
    rare = p * count < 5
    expected = np.append(p[~rare], p[rare].sum()) * count
    got = np.append(seen[~rare], seen[rare].sum())
    expected, got = expected[expected > 0], got[expected > 0]
    chi = ((got - expected) ** 2 / expected).sum()
    k = len(expected) - 1
    assert chi < k + 4.5 * np.sqrt(2 * k) + 8  # about one failure in 100,000 seeds


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30),
    st.floats(0.05, 5), st.integers(0, 5), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_only_words_of_the_distribution_are_drawn(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = np.array(values, dtype=np.float32)
    s = Sampling(temperature, top_p, top_k, min_p, seed=seed)
    p = distribution(logits, Sampling(temperature, min(1.0, top_p + 1e-5), top_k, min_p * 0.9999))
    token = chosen(logits, Sampler(s, [], len(values)))
    assert isinstance(token, Token)
    near = np.abs(logits[p > 0] - logits[token.id]).min()  # words as likely, in float32
    assert p[token.id] > 0 or near <= 1e-5 * temperature + 1e-6 * abs(logits[token.id])


def test_penalties_and_bias_against_the_formulas() -> None:
    s = Sampling(
        temperature=0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={2: 0.7},
    )  # fmt: skip
    sampler = Sampler(s, [0, 1], 6)
    for token in (1, 3, 3):
        sampler.accept(token)
    logits = np.array([2.0, -1.0, 0.5, 3.0, -0.2, 1.0], dtype=np.float32)
    expected = [
        2.0 / 1.5, -1.0 * 1.5 - 0.4 - 0.3, 0.5 + 0.7, 3.0 / 1.5 - 0.4 - 0.3 * 2, -0.2, 1.0,
    ]  # fmt: skip
    assert sampler.adjusted(logits) == pytest.approx(expected)
    assert logits[0] == 2.0  # the model's own stay as they are


@pytest.mark.parametrize("bad", [np.nan, inf])
def test_logits_that_are_not_numbers_are_an_error(bad: float) -> None:
    logits = np.zeros(V, dtype=np.float32)
    logits[5] = bad
    assert isinstance(chosen(logits, Sampler(Sampling(temperature=0), [], V)), ServeError)


def test_equal_likely_words_of_log_probabilities_come_in_order() -> None:
    sampler = Sampler(Sampling(temperature=0), [], 40, top_logprobs=20)
    token = chosen(np.zeros(40, dtype=np.float32), sampler)
    assert isinstance(token, Token)
    assert len(token.top) == 20
    assert [exp(p) for _, p in token.top] == pytest.approx([1 / 40] * 20)
