"""Gathered low-rank products, launched as planned and run on the emulator, against float64."""

from __future__ import annotations

import mlx.core as mx
import pytest

from optiq.ops import native
from optiq.ops.cases import DTYPES, TERMS, Terms
from tests.msl.emulator import needs_emulator

from .launcher import NAMES, Plan, run

pytestmark = needs_emulator


def plan(rows: int, inner: int, out: int, rank: int, slots: int, dtype: str = "float16") -> Plan:
    assert native.extension is not None, native.reason
    found: Plan = native.extension.plan_low_rank(rows, inner, out, rank, slots, dtype)
    return found


def multiplied(x: mx.array, a: mx.array, b: mx.array, slots: mx.array) -> mx.array:
    """By the kernels."""
    dtype = NAMES[next(n for n, d in DTYPES.items() if d == a.dtype)]
    (rows, inner), (count, rank, out) = x.shape, b.shape
    the_plan = plan(rows, inner, out, rank, count, dtype)
    return run(the_plan, [x, a, b, slots], [((rows, out), mx.float32)])[0][0]


@pytest.mark.parametrize("case", TERMS, ids=str)
def test_it_is_that_of_float64(case: Terms) -> None:
    x, a, b, slots = case.inputs()
    got = multiplied(x, a, b, slots)
    assert case.part(got) <= 1
    for i in range(case.rows if case.inner < 200 else 0):  # whatever the others are
        one = multiplied(x[i : i + 1], a, b, slots[i : i + 1])
        assert mx.array_equal(one[0], got[i])


def test_a_slot_that_is_not_there_is_visible() -> None:
    x, a, b, slots = Terms(5, 130, 300, 24).inputs()
    got = multiplied(x, a, b, mx.where(slots == 2, 4, slots).astype(mx.uint32))
    assert mx.array_equal(mx.isnan(got).all(axis=1), slots == 2)
    assert mx.array_equal(mx.isnan(got).any(axis=1), slots == 2)


def test_plans() -> None:
    assert plan(0, 64, 64, 8, 2)["launches"] == plan(3, 64, 0, 8, 2)["launches"] == []
    down, up = plan(3, 64, 300, 24, 2)["launches"]
    assert (down["threadgroups"], up["threadgroups"]) == ((3, 3, 1), (2, 3, 1))
    for rank in (0, 12):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            plan(1, 64, 64, rank, 2)
