"""Weighted rounding, against an exhaustive float64 search and stock rounding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import AFFINE_BITS, Format
from optiq.ops import AffineWeight, affine, reference, rounding
from optiq.ops.cases import ROUNDINGS, Rounding, f64


@pytest.mark.parametrize("case", ROUNDINGS, ids=str)
def test_no_group_is_worse_than_stock(case: Rounding) -> None:
    w, importance = case.inputs()
    ours = ops.quantize(w, case.format, importance)
    stock = mx.quantize(w, case.group_size, case.bits)
    assert [a.dtype for a in ours] == [a.dtype for a in stock]
    assert [a.shape for a in ours] == [a.shape for a in stock]
    assert case.part(ours) <= 1
    least = 0.95 if case.bits > 2 or case.group_size < 128 else 1.0
    assert case.errors(ours).sum() < least * case.errors(stock).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_optimum_of_a_fine_grid(bits: int) -> None:
    """Against 200 x 200 pairs of end points, each with its best codes, in float64."""
    case = Rounding(bits, 32, rows=4, columns=32)
    w, importance = case.inputs()
    found = case.errors(ops.quantize(w, case.format, importance))[:, 0]
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
    "case",
    [Rounding(3, 32, "bf16"), Rounding(4, 64), Rounding(5, 64, "f16"), Rounding(8, 128, "bf16")],
    ids=str,
)
def test_fallback_is_as_good(case: Rounding) -> None:
    w, importance = case.inputs()
    native = case.errors(ops.quantize(w, case.format, importance))
    fallback = case.errors(rounding._search(w, case.format, importance))
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
            back = f64(AffineWeight(*rounded, 32, bits))
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
    case = Rounding(4, 64)
    fmt, (w, importance) = case.format, case.inputs()
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
