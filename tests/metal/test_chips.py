"""The kernels on several chips: right on each, and with the promised bits on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from optiq.formats import DENSE, Format
from optiq.ops.attention_cases import Attention
from optiq.ops.cases import SMALL_PAIRS, Product
from optiq.ops.layer_cases import LAYERS, LayerCase
from tests.msl.emulator import APPLE, Chip, needs_emulator

from .launcher import compile_together, native_layer, run, run_layer
from .test_attention import launched
from .test_kl_divergence import compared
from .test_quantized_matmul import SORTED, multiply, plan

pytestmark = needs_emulator

CHIPS = [Chip(1), Chip(2)]
# What no promise may depend on.
OTHERWISE = [Chip(contracts=False), Chip(flushes=False), Chip(contracts=False, flushes=False)]
SCHEDULES = [
    1,
    *(pytest.param(seed, marks=pytest.mark.schedules) for seed in range(2, 17)),
]

PRODUCTS = [
    Product(16, 37, 320, bits, 64, dtype)
    for bits, dtype in ((2, "f16"), (3, "bf16"), (4, "f16"), (8, "f32"))
]
ROWS = (1, 2, 5, 8, 16)
# The sums of the second are split.
WIDE = [Product(40, 70, 320, 4, 64, "f16"), Product(70, 100, 640, 3, 64, "bf16")]
K8, V4 = Format("affine", 8, 64), Format("affine", 4, 32)
ATTENTION = [
    Attention(1, 300, 64, K8, V4, group=3),
    Attention(5, 300, 64, K8, V4, group=4, mask="starts", padding=20, dtype="f16"),
    Attention(40, 90, 64, DENSE, DENSE, group=2, mask="causal"),
]
PAIRS = [SMALL_PAIRS[i] for i in (4, 5, 9)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    for case in PRODUCTS:  # each by itself: one of them is also compiled without contraction
        compile_together([plan(replace(case, rows=rows)) for rows in ROWS])
    compile_together([plan(case) for case in WIDE])


def rows_of(case: Product, rows: int, **how: Any) -> mx.array:
    """The first rows of the same x, by themselves."""
    x = case.activations()[:rows]
    inputs = [x, *case.quantized()]
    (y,), _ = run(plan(replace(case, rows=rows)), inputs, [((rows, case.out), x.dtype)], **how)
    return y


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_a_row_has_one_result_on_a_chip(case: Product) -> None:
    """Whatever the rows beside it, the schedule, contraction and denormals: to the bit."""
    for chip in (APPLE, Chip(1)):
        whole = rows_of(case, 16, chip=chip)
        for seed, rows in enumerate(ROWS):
            got = rows_of(case, rows, chip=chip, shuffle=seed)
            assert mx.array_equal(got, whole[:rows]), (chip, rows)


@pytest.mark.parametrize("chip", OTHERWISE, ids=str)
@pytest.mark.parametrize("case", [PRODUCTS[1]], ids=str)
def test_products_depend_on_no_compiler(case: Product, chip: Chip) -> None:
    for rows in (1, 8, 16):
        assert mx.array_equal(rows_of(case, rows, chip=chip), rows_of(case, rows))


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_many_rows_are_right_on_each_chip(case: Product, chip: Chip) -> None:
    assert case.part(multiply(case, plan(case), chip=chip)) <= 1


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_is_right_on_each_chip(case: Attention, chip: Chip) -> None:
    assert case.part(launched(case, chip=chip)) <= 1


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_the_kl_is_right_on_each_chip(case: object, chip: Chip) -> None:
    assert case.part(compared(case.sides(), case.soft_cap, chip=chip)) <= 1  # type: ignore[attr-defined]


LAYER_KINDS = ("llama", "qwen2, records", "phi3, 2 rows", "gemma4")
WORK: dict[str, Callable[..., object]] = {
    **{str(c): lambda c=c, **how: [multiply(c, plan(c), **how)] for c in (*PRODUCTS[:2], *WIDE)},
    **{str(c): lambda c=c, **how: [launched(c, **how)] for c in ATTENTION},
    **{str(c): lambda c=c, **how: compared(c.sides(), c.soft_cap, **how) for c in PAIRS},
}
# In one order these are run where they are tested.
LONG: dict[str, Callable[..., object]] = {
    **{str(c): lambda c=c, **how: [c.multiply(**how)] for c in SORTED},
    **{str(c): lambda c=c, **how: layer(c, **how) for c in LAYERS if c.name in LAYER_KINDS},
}


def layer(case: LayerCase, **how: Any) -> list[mx.array]:
    return run_layer(native_layer(case), case.h, *case.caches, case.place, **how)[0]


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    "work", [*WORK, *(pytest.param(work, marks=pytest.mark.schedules) for work in LONG)]
)
def test_any_schedule_gives_the_same_bits(work: str, seed: int) -> None:
    chip, run_it = Chip(seed), (WORK | LONG)[work]
    first, other = run_it(chip=chip), run_it(chip=chip, shuffle=seed)
    assert all(mx.array_equal(a, b, equal_nan=True) for a, b in zip(first, other, strict=True))  # type: ignore[call-overload]
