"""Static figures of the Metal kernels, against those that docs/kernels-counted.md has recorded.

Only where `make agx` has built Mesa's compiler: a second for each kernel, the first time.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from bench.agx.compiler import built, lower_bfloat
from bench.agx.figures import (
    BITS,
    ROWS,
    Figures,
    Kernel,
    attention,
    layer,
    measure,
    ours,
    stock,
    stock_attention,
)

needs_compiler = pytest.mark.skipif(not built(), reason="no build/agx; run: make agx")
PAGE = Path(__file__).parents[2] / "docs" / "kernels-counted.md"
GROWTH = 1.1

KERNELS = [
    *(ours([4], rows) for rows in (1, 2, 4, 8, 16)),
    *(ours([bits], 1) for bits in (3, 8)),
    ours([4], 1, "bfloat"),
    ours([4, 6, 8], 1),
    ours([4], 1, experts=4),
    *layer(1),
    *map(attention, (1, 4)),
]


@cache
def recorded() -> dict[str, list[float]]:
    """Job -> its figures, from the table of the page."""
    text = PAGE.read_text().partition("## Static figures")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in text.split("\n") if "|" in line]
    return {cells[0]: list(map(float, cells[1:])) for cells in rows if cells[1][:1].isdigit()}


def test_the_table_has_every_kernel() -> None:
    others = {stock(4, 1).job, stock_attention().job}
    assert {k.job for k in KERNELS} | others <= set(recorded())
    assert {len(row) for row in recorded().values()} == {len(fields(Figures))}


def test_one_weight_has_room_on_a_core_and_is_no_slower_than_stock() -> None:
    """By these figures, which are recorded."""
    slower = []
    for bits, rows in product(BITS, ROWS):
        mine = Figures(*recorded()[ours([bits], rows).job])
        assert mine.spills == 0
        assert mine.loop <= 10 * 1024
        assert mine.threads >= (768 if rows == 1 else 512)
        theirs = Figures(*recorded()[stock(bits, min(rows, 4)).job])  # tiles of 4 rows, for more
        if mine.cycles > theirs.cycles:
            slower.append((bits, rows))
    assert not slower


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.job)
def test_no_kernel_grows_by_a_tenth(kernel: Kernel) -> None:
    before = Figures(*recorded()[kernel.job])
    now = measure(kernel)
    assert now.spills == 0
    for name in ("registers", "code", "loop", "threadgroup", "instructions", "loads", "cycles"):
        assert getattr(now, name) <= GROWTH * getattr(before, name) + 0.005, name
    assert now.threads >= before.threads / GROWTH


@needs_compiler
def test_a_kernel_that_grows_is_noticed(tmp_path: Path) -> None:
    """One more operation for each weight: more than a tenth."""
    kernel = ours([4], 1)
    for file in kernel.source.parent.iterdir():
        text = file.read_text()
        if file.name == "affine.h":
            masked = "float(v & (mask << (i * BITS)))"
            assert masked in text
            text = text.replace(masked, masked.replace("v &", "(v + uint(i)) &"))
        (tmp_path / file.name).write_text(text)
    grown = measure(replace(kernel, source=tmp_path / kernel.source.name))
    assert grown.instructions > GROWTH * measure(kernel).instructions


def test_bfloats_leave_the_ir() -> None:
    text = "%a = fpext bfloat %x to float\n%b = load bfloat, ptr %p\n"
    lowered = lower_bfloat(text)
    assert "bfloat" not in lowered
    assert "%a = call float @agx_bf_ext(i16 %x)" in lowered
    assert lower_bfloat("%a = load half, ptr %p\n") == "%a = load half, ptr %p\n"
