"""Proposals: the optimum by brute force, floors, budgets."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from optiq.errors import BudgetError, UsageError
from optiq.formats import DENSE, Format
from optiq.kv.config import Entry, KVConfig
from optiq.kv.report import SlotScore, SlotScores
from optiq.quantize.kv.choose import (
    check_budget,
    frontier,
    pairs,
    predicted,
    propose,
    safe_ends,
    size,
    solve,
    uniform,
)
from optiq.quantize.kv.options import CacheSize
from optiq.quantize.kv.slots import configured, parse_menu, slots_of

MENU = parse_menu("3,4,6,8,bf16")
CONTEXT = 100
ENTRIES = (
    Entry((0,), "full", kv_heads=2, k_dim=64, v_dim=64),
    Entry((1,), "sliding", kv_heads=1, k_dim=96, v_dim=96, window=32),
    Entry((2,), "recurrent"),
    Entry((3,), "full", kv_heads=2, k_dim=64, v_dim=64),
)
SLOTS = slots_of(ENTRIES, CONTEXT)


def noisy(seed: int) -> SlotScores:
    """Scores that fall with the width, of slots that differ."""
    rng = np.random.default_rng(seed)
    scores: SlotScores = {}
    for slot in SLOTS:
        level = float(rng.lognormal())
        scores[slot.name] = {
            f: SlotScore(0.0, 0.0, True)
            if f == DENSE
            else SlotScore(level * 4.0**-f.bits * float(rng.uniform(0.5, 1)), None, True)
            for f in slot.offered(MENU)
        }
    return scores


def test_slots_know_their_bytes() -> None:
    assert [s.name for s in SLOTS] == ["0.k", "0.v", "1.k", "1.v", "3.k", "3.v"]
    assert [s.end for s in SLOTS] == [True, True, False, False, True, True]
    assert [s.held for s in SLOTS] == [100, 100, 32, 32, 100, 100]
    config = KVConfig.uniform(ENTRIES, "8/4")
    formats = {
        f"{i}.{side}": getattr(e, side)
        for i, e in enumerate(config.entries)
        for side in ("k", "v")
        if e.kind != "recurrent"
    }
    assert size(SLOTS, formats) == config.nbytes(CONTEXT)
    assert configured(KVConfig(ENTRIES), formats) == config
    # 64 values in 8 bits: 16 words and one of scale and bias; 96 in groups of 32: 24 and three.
    assert SLOTS[0].nbytes(Format("affine", 8, 64)) == 100 * 2 * 4 * 17
    assert SLOTS[2].nbytes(Format("affine", 8, 32)) == 32 * 1 * 4 * 27
    assert SLOTS[0].nbytes(DENSE) == 100 * 2 * 64 * 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [30, 45, 60])
def test_the_least_sum_is_that_of_brute_force(seed: int, share: int) -> None:
    scores = noisy(seed)
    budget = CacheSize.parse(f"{share}%").budget(KVConfig(ENTRIES), CONTEXT)
    assert budget == int(share / 100 * KVConfig(ENTRIES).nbytes(CONTEXT))
    names = list(scores)
    best = min(
        (predicted(scores, dict(zip(names, choice, strict=True))), choice)
        for choice in product(*(scores[name] for name in names))
        if size(SLOTS, dict(zip(names, choice, strict=True))) <= budget
    )
    found = solve(SLOTS, scores, budget, ends=False)
    assert size(SLOTS, found) <= budget
    assert predicted(scores, found) == pytest.approx(best[0], rel=1e-12)


def test_floors_hold_unless_measured_safe() -> None:
    scores = noisy(0)
    narrow = size(SLOTS, {s.name: s.offered(MENU)[0] for s in SLOTS})
    assert all(f.bits >= 4 for s in SLOTS if s.side == "k" for f in s.offered(MENU))
    wide = solve(SLOTS, scores, 4 * narrow)
    assert all(wide[s.name].bits >= 8 for s in SLOTS if s.end)
    with pytest.raises(BudgetError):  # the ends must be wider
        solve(SLOTS, scores, narrow)
    assert solve(SLOTS, scores, narrow, ends=False)
    # The first cache's values are next to nothing, far below the middle ones'.
    safe = {f: SlotScore(s.kl / 1e6, s.kl / 1e7, True) for f, s in scores["0.v"].items()}
    kept = safe_ends(SLOTS, scores | {"0.v": safe})
    assert kept["0.v"] == SLOTS[1].offered(MENU)
    assert [f.bits for f in kept["0.k"]] == [8, 16]
    # As good by its mean, but not within two standard errors.
    unsure = {f: SlotScore(s.kl, 1.0, True) for f, s in safe.items()}
    assert [f.bits for f in safe_ends(SLOTS, scores | {"0.v": unsure})["0.v"]] == [8, 16]


def test_proposals_fit_and_are_different_and_uniform_is_among_them() -> None:
    scores = noisy(1)
    budget = CacheSize.parse("8/4").budget(KVConfig(ENTRIES), CONTEXT)
    found = propose(SLOTS, scores, budget, "8/4")
    assert {"free", "8/4"} <= set(found)
    assert all(size(SLOTS, formats) <= budget for formats in found.values())
    assert len({tuple(f.values()) for f in found.values()}) == len(found)
    least = min(predicted(scores, formats) for formats in found.values())
    assert predicted(scores, found["free"]) == pytest.approx(least, rel=1e-12)
    even = uniform(SLOTS, scores, budget)
    assert even is not None
    within = [f for f in pairs(SLOTS, scores).values() if size(SLOTS, f) <= budget]
    assert predicted(scores, even) == min(predicted(scores, f) for f in within)
    assert pairs(SLOTS, scores)["8/4"] == found["8/4"]
    with pytest.raises(BudgetError):
        propose(SLOTS, scores, 1000)
    with pytest.raises(BudgetError, match=r"the cache needs .* raise --size"):
        check_budget(SLOTS, MENU, 1000)
    check_budget(SLOTS, MENU, budget)


def test_the_frontier_falls() -> None:
    points = frontier(SLOTS, noisy(2))
    assert points == sorted(points)
    assert [kl for _, kl in points] == sorted((kl for _, kl in points), reverse=True)
    assert points[-1][1] == 0.0


@pytest.mark.parametrize("text", ["7", "2", "3g128", "nvfp4", "wide", "", "bf16"])
def test_a_menu_that_keys_and_values_do_not_have(text: str) -> None:
    with pytest.raises(UsageError):
        parse_menu(text)


def test_keys_need_four_bits() -> None:
    with pytest.raises(UsageError, match="keys need 4 bits"):
        SLOTS[0].offered(parse_menu("3,bf16"))


@pytest.mark.parametrize("text", ["0%", "140%", "x%", "-3%"])
def test_a_share_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="not a share of the 16-bit cache"):
        CacheSize.parse(text)
