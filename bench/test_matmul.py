"""Products with quantized and dense weights, against stock MLX on the same inputs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from optiq import ops
from optiq.ops.cases import Product

CASES = [
    Product(rows, width, width, bits, 64, dtype)
    for rows, width, bits, dtype in (
        (1, 2048, 4, "f32"),
        (8, 2048, 4, "f32"),
        (128, 2048, 4, "f32"),
        (1, 4096, 4, "f32"),
        (1, 2048, 3, "f32"),
        (1, 2048, 8, "f32"),
        (1, 2048, 4, "bf16"),
        (1, 2048, 0, "bf16"),
        (128, 2048, 0, "bf16"),
    )
]


@pytest.mark.parametrize("who", ["optiq", "stock"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matmul(benchmark, record, case: Product, who: str) -> None:  # type: ignore[no-untyped-def]
    x = case.activations()
    if case.bits:
        product = ops.quantized_matmul if who == "optiq" else mx.quantized_matmul
        weight = case.quantized()

        def run() -> None:
            mx.eval(product(x, *weight, group_size=case.group_size, bits=case.bits))
    else:
        w = case.weight()

        def run() -> None:
            mx.eval(ops.linear(x, w) if who == "optiq" else x @ w.T)

    rounds = 20 if who == "optiq" else 5
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    record(str(case), who)
