"""Rows whose errors add up, against the error written out in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import Format
from optiq.quantize.rounding.descent import best
from optiq.quantize.rounding.moments import Moments
from optiq.quantize.rounding.rows import descend_together


def moments(n: int, shared: int, seed: int) -> mx.array:
    """Second moments of what shares a few directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8 * n, shared)) @ rng.normal(size=(shared, n))
    x += 0.3 * rng.normal(size=x.shape)
    return mx.array(x.T @ x / len(x), dtype=mx.float32)


def error(w: mx.array, v: ops.AffineWeight, h: mx.array, g: mx.array) -> float:
    change = np.array(v.dequantized(), np.float64) - np.array(w.astype(mx.float32), np.float64)
    return float(
        np.einsum("po,oi,ij,pj->", *(np.array(a, np.float64) for a in (g, change, h, change)))
    )


def rounded(w: mx.array, fmt: Format, h: mx.array) -> ops.AffineWeight:
    start = ops.AffineWeight(*ops.quantize(w, fmt, mx.diag(h)), fmt.group_size, fmt.bits)
    return ops.descend(w, start, h)


@pytest.mark.parametrize("rows", [1, 7, 96])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_rows_undo_what_the_others_do(rows: int, dtype: mx.Dtype) -> None:
    fmt = Format("affine", 3, 64)
    w = mx.random.normal((rows, 128), key=mx.random.key(3)).astype(dtype)
    h, g = moments(128, 16, 0), moments(rows, 4, 1)
    alone = rounded(w, fmt, h)
    found = descend_together(w, alone, h, g)
    assert (found.scales.dtype, found.codes.shape) == (dtype, alone.codes.shape)
    assert found.check("found") is None
    assert error(w, found, h, g) <= (0.7 if rows > 16 else 1) * error(w, alone, h, g)


def test_rows_that_share_nothing_are_left_to_themselves() -> None:
    fmt = Format("affine", 4, 64)
    w = mx.random.normal((40, 128), key=mx.random.key(3))
    h = moments(128, 16, 0)
    alone = rounded(w, fmt, h)
    found = descend_together(w, alone, h, mx.diag(mx.arange(1, 41).astype(mx.float32)))
    longer = ops.descend(w, ops.descend(w, alone, h, sweeps=1), h, sweeps=1)
    assert mx.array_equal(found.codes, longer.codes)
    assert mx.array_equal(found.scales, longer.scales)


@pytest.mark.parametrize("judged", ["together", "alone"])
def test_together_only_where_that_is_better_on_other_text(judged: str) -> None:
    fmt = Format("affine", 3, 64)
    w = mx.random.normal((64, 128), key=mx.random.key(3))
    h, g = moments(128, 16, 0), moments(64, 4, 1)
    none = mx.array(0.0)
    inputs = Moments(h, h, none)
    outputs = Moments(g, g if judged == "together" else mx.eye(64), none)
    name, _ = best(w, fmt, inputs, outputs)
    assert name == ("together" if judged == "together" else "descent")


def test_an_output_that_never_counts_is_no_reason_to_divide_by_zero() -> None:
    fmt = Format("affine", 4, 64)
    w = mx.random.normal((16, 64), key=mx.random.key(3))
    h, nothing = moments(64, 8, 0), mx.zeros((16, 16))
    none = mx.array(0.0)
    name, found = best(w, fmt, Moments(h, h, none), Moments(nothing, nothing, none))
    assert name != "together"
    assert all(mx.all(mx.isfinite(a)) for a in found[1:])
