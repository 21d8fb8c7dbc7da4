"""The case table of keys and values in few bits, and of attention over them; see cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import DENSE, Format
from . import reference
from .cases import DTYPES, EPS, f64, part_of
from .reference import Float64

WIDTHS = (3, 4, 5, 6, 8)
DIMS = (64, 80, 96, 128, 256)


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@dataclass(frozen=True)
class Records:
    """Vectors to store as keys or values."""

    bits: int
    group_size: int
    dim: int
    dtype: str = "f32"

    def __str__(self) -> str:
        return f"{self.dim}-{self.format}-{self.dtype}"

    @property
    def format(self) -> Format:
        return Format("affine", self.bits, self.group_size)

    def vectors(self) -> mx.array:
        return (normal(2, 3, 7, self.dim, seed=self.bits) * 4 + 1).astype(DTYPES[self.dtype])

    def part(self, records: mx.array) -> float:
        """Half a step of its group, and what rounding the group's range to float16 moves."""
        x, bound = f64(self.vectors()), np.empty((2, 3, 7, self.dim))
        for i in range(0, self.dim, self.group_size):
            group = x[..., i : i + self.group_size]
            low = group.min(-1, keepdims=True)
            width = group.max(-1, keepdims=True) - low
            step = width / (2**self.bits - 1)
            bound[..., i : i + self.group_size] = step / 2 + 2.0**-11 * (np.abs(low) + 2 * width)
        back = reference.dequantize_kv(np.array(records), self.dim, self.group_size, self.bits)
        return float((np.abs(back - x) / bound).max())


RECORDS = [
    Records(bits, group, dim, list(DTYPES)[(bits + i) % 3])
    for i, (bits, group, dim) in enumerate(product(WIDTHS, (32, 64), (*DIMS, 8)))
]

MASKS = ("none", "causal", "window", "bool", "added", "starts")


def masks(
    kind: str, batch: int, rows: int, keys: int, padding: int = 3
) -> tuple[dict[str, Any], Any]:
    """Arguments of the op, and the mask they mean as an array [B, 1, L, S]."""
    query, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
    causal = np.broadcast_to(key <= query, (batch, 1, rows, keys))
    if kind == "none":
        return {}, None
    if kind == "causal":
        return {"mask": "causal"}, causal
    if kind == "window":
        return {"mask": "causal", "window": 5}, causal & (key > query - 5)
    if kind == "starts":
        starts = np.arange(batch) * padding
        there = key >= starts[:, None, None, None]
        return {"mask": "causal", "starts": mx.array(starts)}, causal & there
    if kind == "bool":
        array = causal & (key != 2)
        return {"mask": mx.array(array)}, array
    added = np.array(normal(1, 1, rows, keys, seed=9))
    return {"mask": mx.array(added)}, added


def any_records(shape: tuple[int, ...], dim: int, fmt: Format, seed: int) -> mx.array:
    """Records of no vectors in particular: any codes, values up to about 2."""
    rng = np.random.default_rng([seed, dim, fmt.bits])
    groups, code_bits = -(-dim // fmt.group_size), dim * fmt.bits
    header = np.empty((*shape, groups, 2), np.float16)
    header[..., 0] = rng.uniform(2, 4, header.shape[:-1]) / (2**fmt.bits - 1)
    header[..., 1] = rng.uniform(-2, -1, header.shape[:-1])
    codes = rng.integers(0, 2**32, (*shape, -(-code_bits // 32)), dtype=np.uint32)
    codes[..., -1] &= np.uint32(2 ** ((code_bits - 1) % 32 + 1) - 1)  # zeros fill the last word
    return mx.array(np.concatenate([header.view(np.uint32)[..., 0], codes], axis=-1))


@dataclass(frozen=True)
class Attention:
    """Two sequences with two key heads each; `group` query heads share one.

    `mask` is one of MASKS; with "starts", `padding` keys of the second sequence are left out.
    """

    rows: int
    keys: int
    dim: int
    k: Format
    v: Format
    group: int = 1
    mask: str = "causal"
    padding: int = 3
    sinks: bool = False
    softcap: float = 0.0
    dtype: str = "f32"
    value_dim: int = 0  # `dim` unless given
    exact: int = 0  # of the last keys and values, that are there in full precision as well

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.keys}x{self.dim}-{self.k}_{self.v}-{self.group}-{self.mask}"
            f"-{self.dtype}{'-exact' * (self.exact > 0)}"
        )

    def queries(self) -> mx.array:
        shape = (2, 2 * self.group, self.rows, self.dim)
        return normal(*shape, seed=self.dim).astype(DTYPES[self.dtype])

    def stored(self) -> tuple[mx.array, mx.array]:
        """Keys and values: records, or plain vectors."""
        shape, dtype = (2, 2, self.keys), DTYPES[self.dtype]
        k, v = (
            normal(*shape, dim, seed=seed).astype(dtype)
            if fmt == DENSE
            else any_records(shape, dim, fmt, seed)
            for seed, fmt, dim in ((1, self.k, self.dim), (2, self.v, self.value_dim or self.dim))
        )
        return k, v

    def arguments(self) -> dict[str, Any]:
        """Of `ops.quantized_attention`, besides queries, keys and values."""
        given, _ = masks(self.mask, 2, self.rows, self.keys, self.padding)
        return given | {
            "k_format": self.k,
            "v_format": self.v,
            "scale": self.dim**-0.5,
            "sinks": self._sinks(),
            "softcap": self.softcap,
        }

    def recent(self) -> tuple[mx.array, mx.array] | None:
        if not self.exact:
            return None
        shape, dtype = (2, 2, self.exact), DTYPES[self.dtype]
        dims = self.dim, self.value_dim or self.dim
        k, v = (normal(*shape, dim, seed=seed).astype(dtype) for seed, dim in enumerate(dims, 3))
        return k, v

    def truth(self) -> Float64:
        k, v = (
            f64(x)
            if fmt == DENSE
            else reference.dequantize_kv(np.array(x), dim, fmt.group_size, fmt.bits)
            for x, fmt, dim in zip(
                self.stored(),
                (self.k, self.v),
                (self.dim, self.value_dim or self.dim),
                strict=True,
            )
        )
        for x, exact in zip((k, v), self.recent() or (), strict=False):
            x[..., -self.exact :, :] = f64(exact)
        _, mask = masks(self.mask, 2, self.rows, self.keys, self.padding)
        sinks = self._sinks()
        return reference.attention(
            f64(self.queries()),
            k,
            v,
            self.dim**-0.5,
            mask,
            None if sinks is None else f64(sinks),
            self.softcap,
        )

    def part(self, got: mx.array) -> float:
        """One rounding of the result, and float32 sums of values near one."""
        truth = self.truth()
        return part_of(EPS[self.dtype] / 2 * np.abs(truth) + 1e-5, got, truth)

    def _sinks(self) -> mx.array | None:
        return normal(2 * self.group, seed=7) if self.sinks else None


# Every width of keys and of values with every head_dim, a short last group among them, and plain
# vectors; the other side's width goes round, since the two are decoded by the same function.
ATTENTION_FORMATS = [
    *((dim, WIDTHS[(i + j) % 5], WIDTHS[(2 * i + j) % 5]) for i, dim in enumerate(DIMS)
      for j in (0, 2)),
    (64, 16, 4), (96, 8, 16), (80, 3, 6),
]  # fmt: skip


def attention(i: int, mask: str, group: int = 1, dtype: str = "f32") -> Attention:
    """The kernels that the formats `i` need; shapes go round."""
    dim, *widths = ATTENTION_FORMATS[i]
    k, v = (
        DENSE if bits == 16 else Format("affine", bits, (32, 64)[n % 2])
        for bits, n in zip(widths, (i, i // 2), strict=True)
    )
    rows, keys = [(1, 40), (4, 150), (33, 40)][(i + group) % 3]
    return Attention(
        rows, keys, dim, k, v, group, mask,
        sinks=group % 2 == 0, softcap=3.0 if group % 4 == 3 else 0.0, dtype=dtype,
    )  # fmt: skip


# Every mask with every format, each format with two group sizes: kernels take time to compile.
ATTENTION = [
    attention(i, mask, (1, 3, 4, 8)[(i + j % 2) % 4])
    for (i, _), (j, mask) in product(enumerate(ATTENTION_FORMATS), enumerate(MASKS))
]
# A padded batch whose keys are split; dimensions and dtypes go round.
LONG_ATTENTION = [
    Attention(
        rows, 1100, (64, 80, 128, 256)[i % 4],
        Format("affine", k, 64), Format("affine", v, 32),
        group=3, mask="starts", padding=90, dtype=list(DTYPES)[i % 3],
    )
    for i, ((k, v), rows) in enumerate(
        product(((8, 8), (8, 4), (4, 4), (6, 3), (5, 5)), (1, 6, 40))
    )
]  # fmt: skip
