"""Rows whose errors add up, against the error written out in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import Format
from optiq.ops import coordinate_descent, native
from optiq.quantize.rounding.descent import best
from optiq.quantize.rounding.moments import Moments


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


def together(w: mx.array, start: ops.AffineWeight, h: mx.array, g: mx.array) -> ops.AffineWeight:
    return ops.descend(w, start, h, outputs=g, sweeps=2)


@pytest.mark.parametrize("rows", [1, 7, 31, 100])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_rows_undo_what_the_others_do(rows: int, dtype: mx.Dtype) -> None:
    fmt = Format("affine", 3, 64)
    w = mx.random.normal((rows, 128), key=mx.random.key(3)).astype(dtype)
    h, g = moments(128, 16, 0), moments(rows, 4, 1)
    alone = rounded(w, fmt, h)
    found = together(w, alone, h, g)
    assert (found.scales.dtype, found.codes.shape) == (dtype, alone.codes.shape)
    assert found.check("found") is None
    assert error(w, found, h, g) <= (0.7 if rows > 31 else 1) * error(w, alone, h, g)


def test_numpy_takes_the_same_steps() -> None:
    if native.extension is None:
        pytest.skip("needs the native part to compare with")
    fmt = Format("affine", 4, 64)
    w = mx.random.normal((75, 192), key=mx.random.key(3))
    h, g = moments(192, 16, 0), moments(75, 4, 1)
    alone = rounded(w, fmt, h)
    ours = together(w, alone, h, g)
    theirs = coordinate_descent._descend_together(w, alone, h, g, 2)
    # Another order of float32 sums may turn a tie.
    assert mx.mean(ours.codes == theirs.codes).item() > 0.9
    assert error(w, ours, h, g) == pytest.approx(error(w, theirs, h, g), rel=0.01)


def test_a_wide_layer_takes_the_steps_of_its_parts() -> None:
    """Columns that nothing couples are rounded as if each part were a layer."""
    fmt, parts, width = Format("affine", 4, 64), 5, 512
    w = mx.random.normal((37, parts * width), key=mx.random.key(3))
    each, g = [moments(width, 16, seed) for seed in range(parts)], moments(37, 4, 9)
    g = g + 8 * mx.diag(mx.diag(g))  # rows share too little for a turn to be taken back
    zeros = mx.zeros((width, width))
    h = mx.concatenate(
        [
            mx.concatenate([of if i == j else zeros for j in range(parts)], axis=1)
            for i, of in enumerate(each)
        ]
    )
    found = together(w, rounded(w, fmt, h), h, g)
    for i, (part, of) in enumerate(zip(mx.split(w, parts, axis=1), each, strict=True)):
        alone = together(part, rounded(part, fmt, of), of, g)
        for whole, own in zip(found[:3], alone[:3], strict=True):
            assert mx.array_equal(mx.split(whole, parts, axis=1)[i], own)


@pytest.mark.parametrize("implementation", ["native", "numpy"])
def test_outputs_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    if implementation == "numpy":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip("needs the native part")
    w, h = mx.random.normal((8, 64)), mx.eye(64)
    start = ops.AffineWeight(*ops.quantize(w, Format("affine", 4, 64)), 64, 4)
    with pytest.raises(ValueError, match="square"):
        ops.descend(w, start, h, outputs=mx.eye(9))


def test_rows_that_share_nothing_are_left_to_themselves() -> None:
    fmt = Format("affine", 4, 64)
    w = mx.random.normal((40, 128), key=mx.random.key(3))
    h = moments(128, 16, 0)
    alone = rounded(w, fmt, h)
    found = together(w, alone, h, mx.diag(mx.arange(1, 41).astype(mx.float32)))
    longer = ops.descend(w, ops.descend(w, alone, h, sweeps=1), h, sweeps=1)
    assert mx.array_equal(found.codes, longer.codes)
    assert mx.allclose(found.scales, longer.scales, rtol=1e-5)


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
