"""The knapsack against brute force and against a byte-by-byte dynamic programme."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.errors import BudgetError, SensitivityError
from optiq.formats import DEFAULT_MENU, DENSE, Format
from optiq.planning.allocation import Allocation, Choice, Item, allocate

FORMATS = tuple(f for f in DEFAULT_MENU if f is not DENSE)[:10]


def items_of(table: list[list[tuple[int, float]]]) -> list[Item]:
    return [
        Item(f"m{i}", tuple(Choice(f, w, x) for f, (w, x) in zip(FORMATS, row, strict=False)))
        for i, row in enumerate(table)
    ]


def brute_force(items: list[Item], budget: int) -> tuple[float, int]:
    """Smallest loss within the budget, and the fewest bytes that reach it."""
    plans = [
        (math.fsum(c.loss for c in plan), sum(c.nbytes for c in plan))
        for plan in itertools.product(*(item.choices for item in items))
    ]
    return min(plan for plan in plans if plan[1] <= budget)


def check(items: list[Item], budget: int) -> Allocation:
    """An allocation must be consistent, within the budget, proven, and as good as brute force."""
    got = allocate(items, budget)
    picked = [next(c for c in item.choices if c.format == got.formats[item.name]) for item in items]
    assert got.nbytes == sum(c.nbytes for c in picked) <= budget
    assert got.loss == math.fsum(c.loss for c in picked)
    assert (got.gap, got.bound) == (0.0, got.loss)
    loss, nbytes = brute_force(items, budget)
    scale = sum(max(abs(c.loss) for c in item.choices) for item in items)
    assert got.loss == pytest.approx(loss, rel=0, abs=1e-13 * scale)
    if got.loss == loss:
        assert got.nbytes == nbytes
    return got


@pytest.mark.parametrize("seed", range(100))
def test_equals_brute_force_on_six_modules_and_four_formats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = []
    for _ in range(6):
        nbytes = np.sort(rng.integers(1, 10_000, 4))
        loss = rng.lognormal(0, 2) * 4.0 ** -np.arange(4) * rng.lognormal(0, 0.5, 4)
        if seed % 2:  # noise: not monotone, some below zero
            loss += rng.normal(0, 0.1, 4)
        table.append(list(zip(nbytes.tolist(), loss.tolist(), strict=True)))
    items = items_of(table)
    low = sum(row[0][0] for row in table)
    high = sum(row[-1][0] for row in table)
    check(items, int(rng.integers(low, high + 2)))


rows = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 1.0, 7.0])),
    min_size=1,
    max_size=4,
)


@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 72))
@settings(max_examples=150, deadline=None)
def test_equals_brute_force_on_small_colliding_numbers(
    table: list[list[tuple[int, float]]], budget: int
) -> None:
    items = items_of(table)
    smallest = sum(min(w for w, _ in row) for row in table)
    if smallest > budget:
        with pytest.raises(BudgetError, match=f"{smallest:,} bytes"):
            allocate(items, budget)
    else:
        check(items, budget)


@pytest.mark.parametrize(
    "row",
    [
        [(5, 3.0), (5, 2.0), (5, 2.0), (5, 4.0)],  # equal weights
        [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0)],  # equal losses: take the smallest
        [(10**15, 4.0), (10**15 + 1, 1.0), (2 * 10**15, 0.5), (3 * 10**15, 0.0)],
        [(1, 1.0), (2, 9.0), (3, 0.5), (4, 8.0)],  # not monotone
        [(1, 1e-300), (2, 0.0), (3, -1e-300), (4, 1e300)],
        [(2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)],  # every byte is worth the same
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 1.0])
def test_adversarial_rows(row: list[tuple[int, float]], part: float) -> None:
    low, high = 6 * min(w for w, _ in row), 6 * max(w for w, _ in row)
    check(items_of([row] * 6), low + int(part * (high - low)))


def realistic(modules: int, seed: int = 0) -> list[Item]:
    """Losses fall about 4x per bit, sensitivities spread log-normally, scores are noisy."""
    rng = np.random.default_rng(seed)
    shapes = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
    items = []
    for i in range(modules):
        shape = (49152, 576) if i == 0 else shapes[i % 4]
        spread = rng.lognormal(0, 1.5)
        items.append(
            Item(
                f"m{i}",
                tuple(
                    Choice(f, f.nbytes(shape), spread * 4.0**-f.bits * rng.lognormal(0, 0.3))
                    for f in DEFAULT_MENU
                ),
            )
        )
    return items


def uniform_bytes(items: list[Item]) -> int:
    target = Format("affine", 4, 64)
    return sum(c.nbytes for item in items for c in item.choices if c.format == target)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_dynamic_programme_over_bytes(seed: int) -> None:
    """40 modules: too many to enumerate, but few enough to fill a table in units of 288 bytes."""
    items = realistic(41, seed)[1:]
    budget = uniform_bytes(items)
    unit = math.gcd(*(c.nbytes for item in items for c in item.choices))
    table = np.zeros(budget // unit + 1)
    for item in items:
        best = np.full_like(table, np.inf)
        for c in item.choices:
            w = c.nbytes // unit
            if w < len(table):
                np.minimum(best[w:], table[: len(table) - w] + c.loss, out=best[w:])
        table = best
    got = allocate(items, budget)
    assert got.gap == 0
    assert got.loss == pytest.approx(table[-1], rel=1e-12)


@pytest.mark.parametrize(("modules", "seconds"), [(211, 0.5), (5000, 5.0)])
def test_is_fast_and_proven_and_fills_the_budget(modules: int, seconds: float) -> None:
    items = realistic(modules)
    budget = uniform_bytes(items)
    start = time.perf_counter()
    got = allocate(items, budget)
    assert time.perf_counter() - start < seconds
    assert got.gap == 0
    assert 0.999 * budget < got.nbytes <= budget


def test_work_limit_returns_a_valid_bound() -> None:
    rng = np.random.default_rng(0)
    table = []
    for _ in range(40):
        nbytes = np.sort(rng.integers(1, 10**6, 8))
        loss = 2e6 - nbytes - 1e5 * np.arange(8)
        table.append(list(zip(nbytes.tolist(), loss.tolist(), strict=True)))
    items = items_of(table)
    budget = sum(row[3][0] for row in table)
    full = allocate(items, budget)
    cut = allocate(items, budget, max_states=50)
    assert full.gap == 0 < cut.gap < 0.01
    assert cut.nbytes <= budget
    assert cut.bound <= full.loss <= cut.loss
    assert cut.gap == (cut.loss - cut.bound) / cut.bound


def test_order_of_items_and_choices_does_not_matter() -> None:
    items = realistic(60)
    budget = uniform_bytes(items)
    turned = [Item(i.name, i.choices[::-1]) for i in items[::-1]]
    a, b = allocate(items, budget), allocate(turned, budget)
    assert (a.formats, a.nbytes, a.loss) == (b.formats, b.nbytes, b.loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_the_module(bad: float) -> None:
    items = items_of([[(1, 1.0), (2, 0.5)], [(1, bad), (2, 0.5)]])
    with pytest.raises(SensitivityError, match=r"score of m1 at"):
        allocate(items, 100)


def test_an_item_without_choices_is_named() -> None:
    with pytest.raises(SensitivityError, match="m7 has no allowed format"):
        allocate([Item("m7", ())], 100)


def test_budget_error_names_both_sizes() -> None:
    with pytest.raises(BudgetError, match=r"budget of 1,999 bytes .* takes 2,000 bytes"):
        allocate(items_of([[(1000, 1.0)], [(1000, 1.0)]]), 1999)
