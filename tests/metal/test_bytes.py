"""Never more device bytes than stock MLX for the same job, and weights read once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import attention_counters
from bench.metal_counters import (
    MIXES,
    Figures,
    experts,
    ours,
    sorted_experts,
    stock,
    stock_not_transposed,
)
from optiq.ops.cases import Product
from tests.msl.emulator import needs_emulator

pytestmark = needs_emulator

WIDTHS = [(4, m) for m in (1, 2, 8, 14, 16, 40)] + [(3, 1), (6, 9), (8, 1)]


def times_read(rows: int) -> int:
    """Where 16 lanes share a row of the weight, x of 15 rows or more is two tiles of 8 rows."""
    return 1 if rows <= 14 else 2


def assert_no_more(a: Figures, b: Figures) -> None:
    assert a.read <= b.read
    assert a.lines <= b.lines
    assert a.written <= b.written
    assert a.dispatches <= b.dispatches


@pytest.mark.parametrize(("bits", "rows"), WIDTHS)
def test_one_weight(bits: int, rows: int) -> None:
    case = Product(rows, 128, 1024, bits, 64, "f16")
    figures = ours([case])
    assert_no_more(figures, stock(case))
    if rows <= 16:
        assert figures.codes == times_read(rows) * case.quantized()[0].nbytes


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_attention_and_mlp_take_two_dispatches_not_five(rows: int) -> None:
    dispatches = []
    for parts in MIXES.values():
        cases = [Product(rows, out // 8, 1024, bits, 64, "f16") for out, bits in parts]
        figures, total = ours(cases), Figures()
        for case in cases:
            total = total + stock(case)
        assert_no_more(figures, total)
        once = sum(c.quantized()[0].nbytes for c in cases)
        assert figures.codes == times_read(rows) * once
        dispatches.append((figures.dispatches, len(cases)))
    assert dispatches == [(1, 3), (1, 2)]


@pytest.mark.parametrize("rows", [1, 40])
def test_not_transposed(rows: int) -> None:
    """In lines: at one row our lanes ask for a scale every 16 codes, stock's every 32."""
    case = Product(rows, 256, 128, 4, 64, "f16")
    a, b = ours([case], False), stock_not_transposed(case)
    assert a.lines <= b.lines
    assert a.written <= b.written
    assert a.codes <= b.codes


def test_experts() -> None:
    assert_no_more(*experts(4, 3, 512, 4))


@pytest.mark.parametrize("each", [6, 40])
def test_sorted_experts_read_their_weights_once(each: int) -> None:
    a, b = sorted_experts(each, 3, 128, 4)
    assert_no_more(a, b)
    assert a.codes == 3 * 128 * 128 // 2


@pytest.mark.parametrize("widths", attention_counters.WIDTHS, ids=str)
@pytest.mark.parametrize("of", attention_counters.SHAPES, ids=lambda s: s.name)
def test_a_decode_step_moves_the_quantized_cache_and_little_else(
    of: attention_counters.Shape, widths: tuple[int, int]
) -> None:
    """In whole lines within 6 % of its size; one key head is as good as all of them."""
    shape = replace(of, heads=of.heads // of.kv_heads, kv_heads=1, keys=2304)
    figures = attention_counters.ours(shape, *widths)
    total = figures.read + figures.written
    assert figures.cache == sum(shape.cache(bits) for bits in widths)
    assert figures.cache <= total <= 1.06 * figures.cache
    assert 4 * figures.of_a_load <= 32  # lines, of which a lane to a record would touch 32
    assert total <= attention_counters.stock(shape)
    assert total <= attention_counters.two_products(shape, *widths)
