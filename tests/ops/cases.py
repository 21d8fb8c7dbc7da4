"""One table of cases for truth (tests/ops) and speed (bench)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
# Relative spacing of each dtype: a product accumulated in float32 is off by at most one rounding.
EPS = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


@dataclass(frozen=True)
class Case:
    """x [rows, in] @ W[out, in].T; bits 0 is a dense weight."""

    rows: int
    out: int
    inner: int
    bits: int
    group_size: int = 64
    dtype: str = "f32"

    def __str__(self) -> str:
        weight = f"{self.bits}g{self.group_size}" if self.bits else "dense"
        return f"{self.rows}x{self.out}x{self.inner}-{weight}-{self.dtype}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.out * self.inner

    def activations(self, width: int | None = None, seed: int = 0) -> mx.array:
        rng = np.random.default_rng([seed, self.rows, self.inner])
        x = rng.standard_normal((self.rows, width or self.inner), dtype=np.float32)
        return mx.array(x).astype(DTYPES[self.dtype])

    def weight(self) -> mx.array:
        rng = np.random.default_rng([1, self.out, self.inner])
        w = rng.standard_normal((self.out, self.inner), dtype=np.float32)
        return mx.array(w).astype(DTYPES[self.dtype])

    def quantized(self) -> tuple[mx.array, mx.array, mx.array]:
        codes, scales, biases = mx.quantize(self.weight(), self.group_size, self.bits)
        return codes, scales, biases


# Row counts around the switch from dot products to tiles; widths that leave tails everywhere.
QUANTIZED = [
    Case(rows, out, inner, bits, group, dtype)
    for (bits, group), (rows, out, inner), dtype in product(
        product((2, 3, 4, 5, 6, 8), (32, 64, 128)),
        ((1, 37, 256), (2, 64, 384), (16, 19, 128), (17, 100, 384), (130, 203, 640)),
        DTYPES,
    )
]
DENSE = [
    Case(rows, out, inner, 0, dtype=dtype)
    for (rows, out, inner), dtype in product(
        ((1, 7, 100), (3, 192, 576), (16, 300, 5), (33, 33, 33), (130, 203, 1030), (1, 1, 1)),
        DTYPES,
    )
]
