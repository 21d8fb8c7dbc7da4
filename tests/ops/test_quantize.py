"""Weighted rounding, against an exhaustive float64 search and stock rounding."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, Format
from optiq.ops import affine, reference, rounding

from .cases import DTYPES


def f64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32), dtype=np.float64)


def tensors(rows: int = 24, cols: int = 256, dtype: str = "f32") -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(rows * cols)
    w = rng.standard_t(4, (rows, cols)).astype(np.float32)
    importance = rng.gamma(0.7, 2.0, cols).astype(np.float32)
    return mx.array(w).astype(DTYPES[dtype]), mx.array(importance)


def decoded(rounded: tuple[mx.array, ...], fmt: Format) -> np.ndarray:
    codes, scales, biases = rounded
    return reference.dequantize(np.array(codes), f64(scales), f64(biases), fmt.group_size, fmt.bits)


def weighted_errors(
    rounded: tuple[mx.array, ...], fmt: Format, w: mx.array, i: mx.array
) -> np.ndarray:
    """Error of each group under the weights that are minimised."""
    c = reference.search_weights(f64(w), f64(i), fmt.group_size)
    error = c * (decoded(rounded, fmt) - f64(w)) ** 2
    return error.reshape(*w.shape[:-1], -1, fmt.group_size).sum(-1)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), list(product(AFFINE_BITS, AFFINE_GROUPS, DTYPES))
)
def test_no_group_is_worse_than_stock(bits: int, group_size: int, dtype: str) -> None:
    fmt = Format("affine", bits, group_size)
    w, importance = tensors(dtype=dtype)
    ours = ops.quantize(w, fmt, importance)
    stock = mx.quantize(w, group_size, bits)
    assert [a.dtype for a in ours] == [a.dtype for a in stock]
    assert [a.shape for a in ours] == [a.shape for a in stock]
    mine = weighted_errors(ours, fmt, w, importance)
    theirs = weighted_errors(stock, fmt, w, importance)
    assert (mine <= theirs * (1 + 1e-4)).all()
    assert mine.sum() < (0.95 if bits > 2 or group_size < 128 else 1.0) * theirs.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_optimum_of_a_fine_grid(bits: int) -> None:
    """Against 200 x 200 pairs of end points, each with its best codes, in float64."""
    fmt = Format("affine", bits, 32)
    w, importance = tensors(4, 32)
    found = weighted_errors(ops.quantize(w, fmt, importance), fmt, w, importance)[:, 0]
    c = reference.search_weights(f64(w), f64(importance), 32)
    for row, weights, error in zip(f64(w), c, found, strict=True):
        low, high = row.min(), row.max()
        span = high - low
        best = np.inf
        for start in np.linspace(low - 0.1 * span, low + 0.5 * span, 200):
            scale = (np.linspace(high - 0.5 * span, high + 0.1 * span, 200) - start) / (2**bits - 1)
            scale = scale[scale > 0][:, None]
            codes = np.clip(np.round((row - start) / scale), 0, 2**bits - 1)
            errors = (weights * (codes * scale + start - row) ** 2).sum(-1)
            best = min(best, float(errors.min()))
        assert error <= 1.35 * best


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(3, 32, "bf16"), (4, 64, "f32"), (5, 64, "f16"), (8, 128, "bf16")],
)
def test_fallback_is_as_good(bits: int, group_size: int, dtype: str) -> None:
    fmt = Format("affine", bits, group_size)
    w, importance = tensors(dtype=dtype)
    native = weighted_errors(ops.quantize(w, fmt, importance), fmt, w, importance)
    fallback = weighted_errors(rounding._search(w, fmt, importance), fmt, w, importance)
    assert native.sum() == pytest.approx(fallback.sum(), rel=0.01)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_packing_round_trips(bits: int) -> None:
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 2**bits, (3, 64))
    words = np.array(affine.pack(mx.array(q), bits))
    assert (reference.unpack(words, bits) == q).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_groups(bits: int) -> None:
    fmt = Format("affine", bits, 32)
    w = mx.array(np.stack([np.zeros(64), np.full(64, 0.37), np.full(64, -5.0), np.eye(1, 64)[0]]))
    w = w.astype(mx.float32)
    for importance in (mx.ones(64), mx.zeros(64)):
        for rounded in (ops.quantize(w, fmt, importance), rounding._search(w, fmt, importance)):
            back = decoded(rounded, fmt)
            assert np.isfinite(back).all()
            np.testing.assert_allclose(back[:3], f64(w)[:3], rtol=1e-6)


def test_experts_have_their_own_importance() -> None:
    fmt = Format("affine", 3, 64)
    w = mx.random.normal((3, 8, 128), key=mx.random.key(0))
    importance = mx.random.uniform(0, 5, (3, 128), key=mx.random.key(1))
    together = ops.quantize(w, fmt, importance)
    for e in range(3):
        alone = ops.quantize(w[e], fmt, importance[e])
        for a, b in zip(together, alone, strict=True):
            assert mx.array_equal(a[e], b)
    shared = ops.quantize(w, fmt, importance[0])
    assert mx.array_equal(shared[0][0], together[0][0])


def test_wrong_input_names_the_argument() -> None:
    w, importance = tensors()
    fmt = Format("affine", 4, 64)
    with pytest.raises(ValueError, match="importance"):
        mx.eval(ops.quantize(w, fmt, importance[:-1]))
    with pytest.raises(ValueError, match="multiple of 64"):
        mx.eval(ops.quantize(w[:, :96], fmt, importance[:96]))
    with pytest.raises(ValueError, match="w is"):
        mx.eval(ops.quantize(mx.zeros((2, 64), dtype=mx.int32), fmt, importance[:64]))


def test_empty_weights() -> None:
    fmt = Format("affine", 4, 64)
    for shape in ((4, 0), (0, 64)):
        codes, scales, _ = ops.quantize(mx.zeros(shape), fmt, mx.ones(shape[-1]))
        mx.eval(codes, scales)
        assert codes.size == scales.size == 0
