"""The case table of the ops, and the errors that their formats allow; attention_cases.py goes on.

Tests, trials, `optiq doctor --selftest` and benchmarks take their cases from here. A case makes its
inputs; `part` is how far a result is from float64, as a part of what is allowed: 1 at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import AFFINE_BITS, AFFINE_GROUPS, Format
from . import reference
from .affine import AffineWeight
from .reference import Float64

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
# Relative spacing of each dtype: a product accumulated in float32 is off by at most one rounding.
EPS = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


def f64(a: mx.array | AffineWeight) -> Float64:
    """What an array or a quantized weight stands for."""
    if isinstance(a, AffineWeight):
        codes, scales, biases = np.array(a.codes), f64(a.scales), f64(a.biases)
        return reference.dequantize(codes, scales, biases, a.group_size, a.bits)
    return np.array(a.astype(mx.float32), dtype=np.float64)


def part_of(bound: Float64, got: mx.array, truth: Float64) -> float:
    """The largest error as a part of its bound; NaN where `got` is."""
    if got.shape != truth.shape:
        raise ValueError(f"the result is {got.shape}, not {truth.shape}")
    return float((np.abs(f64(got) - truth) / bound).max(initial=0))


def product_part(got: mx.array, x: Float64, w: Float64, dtype: str, group_size: int = 0) -> float:
    """Of eps |x w.T| + K eps32 |x| |w|.T: one rounding of the output, K roundings in float32.

    With a `group_size`, x is also rounded to 16-bit fixed point: by half of 1/32767 of the largest
    |x| of its group (csrc/cpu/fixed.h).
    """
    truth = x @ w.T
    x, w = np.abs(x), np.abs(w)
    bound = EPS[dtype] * np.abs(truth) + x.shape[-1] * EPS["f32"] * (x @ w.T) + 1e-30
    if group_size:
        largest = x.reshape(len(x), -1, group_size).max(-1)
        bound += 0.5 / 32767 * (largest @ w.reshape(len(w), -1, group_size).sum(-1).T)
    return part_of(bound, got, truth)


@dataclass(frozen=True)
class Product:
    """x [rows, in] @ W[out, in].T; bits 0 is a dense weight.

    `weights` is the dtype of the weight, or of its scales, where it is not that of x.
    """

    rows: int
    out: int
    inner: int
    bits: int
    group_size: int = 64
    dtype: str = "f32"
    weights: str = ""

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
        return mx.array(w).astype(DTYPES[self.weights or self.dtype])

    def quantized(self) -> tuple[mx.array, mx.array, mx.array]:
        codes, scales, biases = mx.quantize(self.weight(), self.group_size, self.bits)
        return codes, scales, biases

    def affine(self) -> AffineWeight:
        return AffineWeight(*self.quantized(), self.group_size, self.bits)

    def part(self, got: mx.array, transpose: bool = True, fixed: bool = False) -> float:
        """Of `x @ W.T`, or `x @ W`; `fixed` where x is rounded to fixed point."""
        x = f64(self.activations(None if transpose else self.out))
        w = f64(self.affine() if self.bits else self.weight())
        return product_part(
            got, x, w if transpose else w.T, self._result(), self.group_size if fixed else 0
        )

    def _result(self) -> str:
        """The dtype of the product: the wider one, or float32, which holds both 16-bit types."""
        return self.dtype if self.weights in ("", self.dtype) else "f32"


# Row counts around the switch from dot products to tiles; widths that leave tails everywhere.
QUANTIZED = [
    Product(rows, out, inner, bits, group, dtype)
    for (bits, group), (rows, out, inner), dtype in product(
        product(AFFINE_BITS, AFFINE_GROUPS),
        ((1, 37, 256), (2, 64, 384), (16, 19, 128), (17, 100, 384), (130, 203, 640)),
        DTYPES,
    )
]
DENSE = [
    Product(rows, out, inner, 0, dtype=dtype)
    for (rows, out, inner), dtype in product(
        ((1, 7, 100), (3, 192, 576), (16, 300, 5), (33, 33, 33), (130, 203, 1030), (1, 1, 1)),
        DTYPES,
    )
]


@dataclass(frozen=True)
class Rounding:
    """A weight and the importance of its columns."""

    bits: int
    group_size: int
    dtype: str = "f32"
    rows: int = 24
    columns: int = 256

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-{self.format}-{self.dtype}"

    @property
    def format(self) -> Format:
        return Format("affine", self.bits, self.group_size)

    def inputs(self) -> tuple[mx.array, mx.array]:
        rng = np.random.default_rng(self.rows * self.columns)
        w = rng.standard_t(4, (self.rows, self.columns)).astype(np.float32)
        importance = rng.gamma(0.7, 2.0, self.columns).astype(np.float32)
        return mx.array(w).astype(DTYPES[self.dtype]), mx.array(importance)

    def errors(self, rounded: Sequence[mx.array]) -> Float64:
        """Of each group, as the search weighs them."""
        w, importance = map(f64, self.inputs())
        c = reference.search_weights(w, importance, self.group_size)
        codes, scales, biases = rounded
        stored = f64(AffineWeight(codes, scales, biases, self.group_size, self.bits))
        error = np.asarray(c * (stored - w) ** 2)
        return np.asarray(error.reshape(self.rows, -1, self.group_size).sum(-1))

    def part(self, found: Sequence[mx.array]) -> float:
        """Of a search: no group is worse than min/max makes it, but for float32 sums."""
        stock = mx.quantize(self.inputs()[0], self.group_size, self.bits)
        return float((self.errors(found) / ((1 + 1e-4) * self.errors(stock))).max())


ROUNDINGS = [Rounding(*case) for case in product(AFFINE_BITS, AFFINE_GROUPS, DTYPES)]


@dataclass(frozen=True)
class Pair:
    """Teacher and student over one vocabulary; `spread` is the deviation of the logits, `noise`
    how far the student's hidden states are from the teacher's, bits 0 a dense head. `group_q` and
    `dtype_q` are those of the student where they are not the teacher's."""

    tokens: int
    vocabulary: int
    d_p: int
    d_q: int
    spread: float = 4.0
    noise: float = 0.1
    bits_p: int = 0
    bits_q: int = 0
    group_size: int = 32
    dtype: str = "f32"
    soft_cap: float | None = None
    group_q: int = 0
    dtype_q: str = ""

    def __str__(self) -> str:
        cap = f"-cap{self.soft_cap:g}" if self.soft_cap else ""
        return (
            f"{self.tokens}x{self.vocabulary}x{self.d_p}_{self.d_q}-{self.bits_p}_{self.bits_q}"
            f"g{self.group_size}-{self.dtype}-s{self.spread:g}n{self.noise:g}{cap}"
        )

    def sides(self) -> tuple[mx.array, mx.array | AffineWeight, mx.array, mx.array | AffineWeight]:
        rng = np.random.default_rng([self.tokens, self.vocabulary, self.d_p, self.d_q])
        d = max(self.d_p, self.d_q)
        h = rng.standard_normal((self.tokens, d), dtype=np.float32)
        noise = self.noise * rng.standard_normal((self.tokens, d), dtype=np.float32)
        w = rng.standard_normal((self.vocabulary, d), dtype=np.float32) * self.spread / d**0.5

        def side(h: Any, cols: int, bits: int, group: int, dtype: str) -> Any:
            states, head = (mx.array(a[:, :cols]).astype(DTYPES[dtype]) for a in (h, w))
            if not bits:
                return states, head
            return states, AffineWeight(*mx.quantize(head, group, bits), group, bits)

        p = side(h, self.d_p, self.bits_p, self.group_size, self.dtype)
        group_q, dtype_q = self.group_q or self.group_size, self.dtype_q or self.dtype
        q = side(h + noise, self.d_q, self.bits_q, group_q, dtype_q)
        return (*p, *q)

    def part(self, got: Sequence[mx.array], exact: bool = False) -> float:
        """Of a Comparison: 1e-6 where logits are `exact` (the CPU's kernels), else several errors
        of a float32 logit; and the rounding of the float32 that is returned."""
        h_p, w_p, h_q, w_q = map(f64, self.sides())
        kl, agree, *lse = reference.kl_divergence(h_p, w_p, h_q, w_q, self.soft_cap)
        if (np.array(got[1]) != agree).any():
            return math.inf
        logit = 1e-6 if exact else max(1.0, self.spread) * 64 * EPS["f32"]
        found, truth = mx.stack([got[0], *got[2:]]), np.stack([kl, *lse])
        return part_of(logit + EPS["f32"] / 2 * np.abs(truth), found, truth)


@dataclass(frozen=True)
class Terms:
    """x [rows, in] and low-rank terms of `dtype` in four slots, the first of which is none."""

    rows: int
    inner: int
    out: int
    rank: int
    dtype: str = "f16"

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.rank}x{self.out}-{self.dtype}"

    def inputs(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        rng = np.random.default_rng([self.rows, self.inner, self.rank])
        x, a, b = (
            rng.standard_normal(shape, dtype=np.float32)
            for shape in (
                (self.rows, self.inner), (4, self.inner, self.rank), (4, self.rank, self.out)
            )
        )  # fmt: skip
        dtype, slots = DTYPES[self.dtype], (3 * np.arange(self.rows) + 1) % 4
        return (
            mx.array(x),
            mx.array(a).astype(dtype),
            mx.array(b).astype(dtype),
            mx.array(slots.astype(np.uint32)),
        )

    def part(self, got: mx.array) -> float:
        """Of the roundings of both sums in float32."""
        x, a, b = map(f64, self.inputs()[:3])
        slots = np.array(self.inputs()[3])
        terms = [None, *zip(a[1:], b[1:], strict=True)]
        sizes = [None, *zip(np.abs(a[1:]), np.abs(b[1:]), strict=True)]
        bound = reference.gathered_low_rank(np.abs(x), sizes, slots)
        bound *= (self.inner + self.rank) * EPS["f32"]
        return part_of(bound + 1e-30, got, reference.gathered_low_rank(x, terms, slots))


# Widths around the 32 groups of a threadgroup, outputs around its 256 threads.
TERMS = [
    Terms(rows, inner, out, rank, dtype)
    for (rows, inner, out, rank), dtype in product(
        ((1, 31, 7, 8), (2, 64, 256, 16), (5, 130, 300, 24), (8, 576, 1536, 64)), ("f16", "f32")
    )
]

# Small, for the emulator.
SMALL_PAIRS = [
    Pair(1, 1, 1, 1),
    Pair(3, 40, 5, 36),
    Pair(33, 300, 64, 40, noise=1.0),
    Pair(2, 700, 32, 32, noise=0.0),
    Pair(40, 129, 64, 96, dtype="bf16"),
    Pair(5, 600, 64, 64, dtype="f16", bits_q=4),
    Pair(4, 100, 128, 64, bits_p=2, bits_q=5),
    Pair(4, 100, 64, 128, bits_p=3, bits_q=6, group_size=64, dtype="bf16"),
    Pair(4, 100, 128, 128, bits_q=8, group_size=128),
    Pair(6, 200, 64, 64, soft_cap=10.0, spread=20.0, bits_q=8),
]
PAIRS = [
    *SMALL_PAIRS,
    Pair(3, 7, 5, 5),
    Pair(2, 129, 100, 36),
    Pair(13, 1000, 64, 64, noise=0.0),
    Pair(5, 1000, 64, 96, dtype="bf16"),
    Pair(17, 333, 96, 64, dtype="f16"),
    Pair(6, 500, 64, 64, soft_cap=30.0, spread=20.0),
    Pair(6, 500, 64, 64, soft_cap=5.0, bits_q=4, dtype="bf16"),
    *(Pair(4, 300, 128, 64, bits_p=b, bits_q=c) for b, c in ((2, 0), (3, 8), (0, 4), (5, 6))),
    *(Pair(5, 200, 128, 128, bits_q=4, group_size=g, dtype=d) for g in (64, 128) for d in DTYPES),
    *(
        Pair(33, 500, 128, 128, noise=0.3, bits_q=bits, group_size=64, dtype=dtype, soft_cap=cap)
        for bits, dtype, cap in product((0, *AFFINE_BITS), DTYPES, (None, 30.0))
    ),
]
LARGE_PAIRS = [
    Pair(530, 300, 20, 20, noise=1e-3),
    Pair(8, 20_000, 64, 64, spread=8, noise=1.0),
    Pair(4, 20_011, 260, 640, spread=1.0),
]
