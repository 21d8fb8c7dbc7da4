"""Rounding without importance is mx.quantize, bit for bit."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, Format
from optiq.ops.cases import DTYPES


def bits_of(a: mx.array) -> np.ndarray:
    """NaN has many patterns, all the same to its users; everything else must be equal in bits."""
    whole = {4: mx.uint32, 2: mx.uint16}[a.itemsize]
    if a.dtype != mx.uint32:
        a = mx.where(mx.isnan(a), mx.array(mx.nan, dtype=a.dtype), a)
    return np.array(a.view(whole))


def assert_stock(w: mx.array, fmt: Format) -> None:
    ours = ops.quantize(w, fmt)
    stock = mx.quantize(w, fmt.group_size, fmt.bits)
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert (bits_of(mine) == bits_of(theirs)).all()


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), list(product(AFFINE_BITS, AFFINE_GROUPS, DTYPES))
)
def test_random_weights(bits: int, group_size: int, dtype: str) -> None:
    rng = np.random.default_rng(bits * group_size)
    w = rng.standard_t(3, (61, 384)).astype(np.float32)
    w[7:20] = np.abs(w[7:20])
    w[20:40] = -np.abs(w[20:40]) - 0.5
    assert_stock(mx.array(w).astype(DTYPES[dtype]), Format("affine", bits, group_size))


# Groups that a model may hold by accident, and what no model should.
ODD = {
    "zeros": np.zeros(128),
    "negative zeros": np.full(128, -0.0),
    "constant": np.full(128, 0.37),
    "negative constant": np.full(128, -5.0),
    "one weight": np.eye(1, 128)[0],
    "two values": np.where(np.arange(128) % 2, 0.25, -0.25),
    "negative only": -1 - np.arange(128) / 128,
    "nearly constant": 1 + np.arange(128) * 2.0**-23,
    "tiny": np.arange(-64, 64) * 1e-9,
    "subnormal": np.arange(-64, 64) * 1e-41,
    "near the least step": np.arange(-64, 64) * 1e-7,
    "large": np.arange(-64, 64) * 1000.0,
    "huge": np.arange(-64, 64) * 1e36,
    "huge constant": np.full(128, 3e38),
    "a NaN": np.where(np.arange(128) == 5, np.nan, np.arange(128) / 64),
    "NaN": np.full(128, np.nan),
    "infinity": np.where(np.arange(128) == 5, np.inf, np.arange(128) / 64),
    "negative infinity": np.where(np.arange(128) == 5, -np.inf, np.arange(128) / 64),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_groups(name: str, dtype: str) -> None:
    w = mx.array(np.stack([ODD[name]] * 3).astype(np.float32)).astype(DTYPES[dtype])
    for bits, group_size in product(AFFINE_BITS, AFFINE_GROUPS):
        assert_stock(w, Format("affine", bits, group_size))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(AFFINE_BITS),
    st.sampled_from(AFFINE_GROUPS),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**32 - 1),
    st.floats(-38, 37),
    st.floats(0, 6),
    st.floats(-3, 3),
)
def test_any_scale_spread_and_offset(
    bits: int, group_size: int, dtype: str, seed: int, size: float, spread: float, offset: float
) -> None:
    """Weights of magnitude 10^size over `spread` decades, moved off zero."""
    rng = np.random.default_rng(seed)
    magnitude = 10 ** (size - spread * rng.random((3, 2 * group_size)))
    w = (rng.choice([-1, 1], magnitude.shape) + offset) * magnitude
    w = np.clip(w, -3e38, 3e38).astype(np.float32)
    assert_stock(mx.array(w).astype(DTYPES[dtype]), Format("affine", bits, group_size))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(AFFINE_BITS),
    st.lists(st.floats(width=32, allow_nan=True), min_size=32, max_size=32),
)
def test_any_floats(bits: int, values: list[float]) -> None:
    assert_stock(mx.array([values], dtype=mx.float32), Format("affine", bits, 32))


def test_views_experts_and_empty() -> None:
    fmt = Format("affine", 5, 32)
    w = mx.random.normal((6, 4, 128), key=mx.random.key(3))
    for view in (w, w[::2], w[:, 1:3], w[..., 32:96], w.swapaxes(0, 1), w[:0]):
        assert_stock(view, fmt)
    assert_stock(mx.zeros((4, 0)), fmt)


def test_wrong_input_names_the_argument() -> None:
    fmt = Format("affine", 4, 64)
    with pytest.raises(ValueError, match=r"w is .*int32"):
        ops.quantize(mx.zeros((2, 64), dtype=mx.int32), fmt)
    with pytest.raises(ValueError, match="multiple of 64"):
        ops.quantize(mx.zeros((2, 96)), fmt)
    with pytest.raises(ValueError, match="two or more axes"):
        ops.quantize(mx.zeros(64), fmt)
    with pytest.raises(ValueError, match="must be affine"):
        ops.quantize(mx.zeros((2, 64)), Format("dense", 16))
