"""Rounding against a float64 definition and against stock MLX."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.errors import SourceError, UsageError
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, DENSE, UNIFORM4, Format
from optiq.quantize.rounding.weights import Rounding, round_weight

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def unpack(codes: mx.array, bits: int) -> np.ndarray:
    """Codes lie one after another, lowest bits first, in the little-endian bytes of a row."""
    rows = np.ascontiguousarray(np.array(codes)).view(np.uint8)
    stream = np.unpackbits(rows, axis=-1, bitorder="little")
    stream = stream.reshape(*codes.shape[:-1], -1, bits)
    return (stream * (1 << np.arange(bits))).sum(axis=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_error_is_at_most_half_a_step(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    fmt = Format("affine", bits, group_size)
    w = mx.random.normal((24, 256), key=mx.random.key(bits)).astype(dtype)
    codes, scales, biases = round_weight(w, fmt)
    assert (codes.dtype, codes.shape) == (mx.uint32, (24, 256 * bits // 32))
    assert scales.dtype == biases.dtype == dtype
    assert scales.shape == biases.shape == (24, 256 // group_size)
    assert codes.nbytes + scales.nbytes + biases.nbytes == fmt.nbytes(w.shape, w.itemsize)

    as64 = [np.array(a.astype(mx.float32), dtype=np.float64) for a in (w, scales, biases)]
    exact, scale, bias = as64[0], as64[1][..., None], as64[2][..., None]
    grid = unpack(codes, bits).reshape(24, -1, group_size)
    error = np.abs(grid * scale + bias - exact.reshape(24, -1, group_size))
    # Outside the grid a weight is clipped: MLX moves a group's grid so that zero is a code.
    ends = np.stack([bias, bias + scale * (2**bits - 1)])
    w64 = exact.reshape(24, -1, group_size)
    outside = np.maximum(w64 - ends.max(axis=0), ends.min(axis=0) - w64)
    # Scale and bias are rounded to `dtype` after the codes are chosen.
    unit = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    stored = unit * (2**bits * np.abs(scale) + np.abs(bias)) + 1e-7
    assert (error <= np.maximum(np.abs(scale) / 2, outside) + stored).all()
    assert (outside <= np.abs(scale) + stored).all()


@pytest.mark.parametrize("shape", [(8, 64), (3, 8, 128)])
def test_minmax_is_stock_mlx_to_the_bit(shape: tuple[int, ...]) -> None:
    w = mx.random.normal(shape, key=mx.random.key(0))
    for got, stock in zip(round_weight(w, UNIFORM4), mx.quantize(w, 64, 4), strict=True):
        assert mx.array_equal(got, stock)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    w = mx.zeros((4, 64))
    w[2, 7] = bad
    with pytest.raises(SourceError, match=r"model\.x\.weight holds NaN or infinite") as error:
        round_weight(w, UNIFORM4, path="model.x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("w", "fmt", "message"),
    [
        (mx.zeros((4, 96)), UNIFORM4, r"shape \(4, 96\) .* groups of 64"),
        (mx.zeros(64), UNIFORM4, r"shape \(64,\)"),
        (mx.zeros((4, 64)), DENSE, "not rounded"),
        (mx.zeros((4, 64), mx.int32), UNIFORM4, "int32"),
    ],
)
def test_what_cannot_be_rounded_is_refused(w: mx.array, fmt: Format, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        round_weight(w, fmt, path="w")


def test_search_uses_the_importance_of_its_module_only() -> None:
    w = mx.random.normal((8, 64), key=mx.random.key(1))
    importance = mx.random.uniform(0, 9, (64,), key=mx.random.key(2))
    rounding = Rounding("search", {"a": importance})
    searched = round_weight(w, UNIFORM4, rounding, "a")
    other = round_weight(w, UNIFORM4, rounding, "b")
    assert all(map(mx.array_equal, searched, ops.quantize(w, UNIFORM4, importance)))
    assert all(map(mx.array_equal, other, mx.quantize(w, 64, 4)))
    assert not mx.array_equal(searched[0], other[0])
