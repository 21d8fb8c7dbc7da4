"""Rounding a weight, against mx.quantize. The search has no counterpart in stock MLX; its row
says what it costs beside stock min/max."""

from __future__ import annotations

import mlx.core as mx
import pytest

from optiq import ops
from optiq.formats import Format
from optiq.ops.cases import DTYPES

WIDTH = 2048
CASES = [
    *((f"{bits}g64", dtype, False) for bits in (3, 4, 8) for dtype in ("bf16", "f32")),
    ("4g128", "f16", False),
    ("4g64", "bf16", True),
]


@pytest.mark.parametrize("who", ["optiq", "stock"])
@pytest.mark.parametrize(("name", "dtype", "search"), CASES)
def test_quantize(benchmark, record, name, dtype, search, who) -> None:  # type: ignore[no-untyped-def]
    fmt = Format.parse(name)
    w = mx.random.normal((WIDTH, WIDTH), key=mx.random.key(0)).astype(DTYPES[dtype])
    importance = mx.random.uniform(0, 4, (WIDTH,), key=mx.random.key(1)) if search else None
    mx.eval(w, importance)

    def run() -> None:
        if who == "optiq":
            mx.eval(ops.quantize(w, fmt, importance))
        else:
            mx.eval(mx.quantize(w, fmt.group_size, fmt.bits))

    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    record(f"quantize-{WIDTH}x{WIDTH}-{name}-{dtype}" + ("-search" if search else ""), who)
