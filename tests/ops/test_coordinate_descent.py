"""Coordinate descent on a layer's output error, against float64 and brute force."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, Format
from optiq.ops import coordinate_descent, native, reference
from optiq.ops.cases import DTYPES, f64


def layer(
    rows: int, cols: int, dtype: str = "f32", seed: int = 0
) -> tuple[mx.array, mx.array, np.ndarray]:
    """A weight, and the second moments of correlated inputs in float32 and float64."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (rows, cols)).astype(np.float32)
    x = rng.normal(size=(2 * cols, cols)) * np.exp(rng.normal(size=cols))
    x = x @ (np.eye(cols) + 0.5 * rng.normal(size=(cols, cols)) / cols**0.5)
    h = (x.T @ x / len(x)).astype(np.float32)
    return mx.array(w).astype(DTYPES[dtype]), mx.array(h), h.astype(np.float64)


def searched(w: mx.array, h: mx.array, bits: int, group_size: int) -> ops.AffineWeight:
    fmt = Format("affine", bits, group_size)
    return ops.AffineWeight(*ops.quantize(w, fmt, mx.diag(h)), group_size, bits)


def errors(v: ops.AffineWeight, w: mx.array, h: np.ndarray) -> np.ndarray:
    stored = reference.dequantize(
        np.array(v.codes), f64(v.scales), f64(v.biases), v.group_size, v.bits
    )
    d = stored - f64(w)
    return np.asarray(np.einsum("...i,ij,...j->...", d, h, d))


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), list(product(AFFINE_BITS, AFFINE_GROUPS, DTYPES))
)
def test_no_row_is_worse_and_together_they_are_much_better(
    bits: int, group_size: int, dtype: str
) -> None:
    w, h, exact = layer(37, 256, dtype)
    start = searched(w, h, bits, group_size)
    found = ops.descend(w, start, h)
    assert [a.dtype for a in found[:3]] == [a.dtype for a in start[:3]]
    assert [a.shape for a in found[:3]] == [a.shape for a in start[:3]]
    before, after = errors(start, w, exact), errors(found, w, exact)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.6 * before.sum()


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(2, 32, "f32"), (3, 64, "bf16"), (8, 128, "f16")]
)
def test_numpy_takes_the_same_steps(bits: int, group_size: int, dtype: str) -> None:
    if native.extension is None:
        pytest.skip("needs the native part to compare with")
    w, h, exact = layer(9, 256, dtype)
    start = searched(w, h, bits, group_size)
    ours, theirs = ops.descend(w, start, h), coordinate_descent._descend(w, start, h, 4)
    # Another order of float32 sums may turn a tie.
    assert np.mean(np.array(ours.codes) == np.array(theirs.codes)) > 0.98
    assert errors(ours, w, exact).sum() == pytest.approx(errors(theirs, w, exact).sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "cols", "samples", "group_size"), [(37, 256, 50, 64), (8, 128, 1, 32)]
)
def test_few_samples_are_as_good_as_the_hessian_that_they_make(
    rows: int, cols: int, samples: int, group_size: int
) -> None:
    w, h, _ = layer(rows, cols)
    x = mx.random.normal((samples, cols), key=mx.random.key(0)) * mx.sqrt(mx.diag(h))
    few = ops.Sampled(x, 0.1 * mx.diag(h))
    exact = f64(x).T @ f64(x) + np.diag(f64(few.diagonal))
    start = searched(w, few.whole, 4, group_size)
    for sweeps in (0, 1, 4):
        found, whole = (ops.descend(w, start, each, sweeps=sweeps) for each in (few, few.whole))
        assert np.mean(np.array(found.codes) == np.array(whole.codes)) > 0.95  # ties
        least, most = sorted(errors(v, w, exact).sum() for v in (found, whole))
        assert most == pytest.approx(least, rel=2e-3)
        assert (errors(found, w, exact) <= errors(start, w, exact) * (1 + 1e-5)).all()


def test_no_single_code_can_be_improved() -> None:
    """Every neighbour of the result, one code up or down, has a larger error."""
    w, h, exact = layer(4, 64)
    v = ops.descend(w, searched(w, h, 3, 32), h, sweeps=30)
    codes = reference.unpack(np.array(v.codes), 3)
    least = errors(v, w, exact)
    for column, step in product(range(64), (-1, 1)):
        moved = codes.copy()
        moved[:, column] += step
        valid = (moved[:, column] >= 0) & (moved[:, column] <= 7)
        packed = coordinate_descent.pack(mx.array(np.clip(moved, 0, 7)), 3)
        assert (errors(v._replace(codes=packed), w, exact) >= least * (1 - 1e-5))[valid].all()


def test_near_the_best_of_all_codes() -> None:
    """Four free columns of 2 bits, the scale fixed by no sweep over it: all 256 rows of codes."""
    w, h, exact = layer(8, 32, seed=3)
    free = np.zeros(32)
    free[:4] = 1
    exact = exact * np.outer(free, free) + np.diag(1 - free) * 1e-9
    v = ops.descend(w, searched(w, h, 2, 32), mx.array(exact.astype(np.float32)), sweeps=20)
    codes = reference.unpack(np.array(v.codes), 2)
    best = np.full(8, np.inf)
    for choice in product(range(4), repeat=4):
        tried = codes.copy()
        tried[:, :4] = choice
        best = np.minimum(
            best, errors(v._replace(codes=coordinate_descent.pack(mx.array(tried), 2)), w, exact)
        )
    found = errors(v, w, exact)
    assert (found >= best - 1e-9).all()
    assert np.median(found / np.maximum(best, 1e-12)) < 1.5


def test_a_diagonal_hessian_leaves_nearest_codes_alone() -> None:
    w, _, _ = layer(5, 64)
    h = mx.diag(mx.array(np.linspace(0.1, 3, 64, dtype=np.float32)))
    fmt = Format("affine", 4, 32)
    v = ops.descend(w, ops.AffineWeight(*ops.quantize(w, fmt), 32, 4), h, sweeps=50)
    q = (f64(w).reshape(5, 2, 32) - f64(v.biases)[..., None]) / f64(v.scales)[..., None]
    nearest = np.clip(np.rint(q), 0, 15).reshape(5, 64)
    assert (reference.unpack(np.array(v.codes), 4) == nearest).mean() > 0.99


@pytest.mark.parametrize("sweeps", [0, 3])
def test_exact_weights_stay(sweeps: int) -> None:
    w, h, _ = layer(3, 64)
    start = searched(w, h, 4, 64)
    w = mx.dequantize(*start[:3], group_size=64, bits=4)
    found = ops.descend(w, start, h, sweeps=sweeps)
    for a, b in zip(found[:3], start[:3], strict=True):
        assert np.array_equal(np.array(a), np.array(b))


def test_constant_rows_and_silent_columns() -> None:
    w = mx.concatenate([mx.zeros((2, 64)), mx.full((2, 64), 0.25)])
    h = mx.zeros((64, 64))
    start = ops.AffineWeight(*ops.quantize(w, Format("affine", 4, 64)), 64, 4)
    found = ops.descend(w, start, h)
    assert np.array_equal(np.array(found.codes), np.array(start.codes))
    assert np.isfinite(errors(ops.descend(w, start, mx.eye(64)), w, np.eye(64))).all()


@pytest.mark.parametrize("implementation", ["native", "numpy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": mx.eye(32)}, "hessian"),
        ({"hessian": ops.Sampled(mx.zeros((4, 32)), mx.zeros(32))}, "samples|hessian"),
        ({"w": mx.zeros((4, 128))}, "must be"),
        ({"scales": mx.zeros((4, 2))}, "scales"),
        ({"codes": mx.zeros((4, 8), dtype=mx.int32)}, "codes"),
        ({"bits": 7}, "bits is 7"),
    ],
)
def test_what_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, implementation: str, change: dict[str, object], message: str
) -> None:
    if implementation == "numpy":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip("needs the native part")
    w, h, _ = layer(4, 64)
    start = searched(w, h, 4, 64)
    arguments = {"w": w, "hessian": h, **start._asdict(), **change}
    with pytest.raises(ValueError, match=message):
        ops.descend(
            arguments["w"],
            ops.AffineWeight(*(arguments[field] for field in ops.AffineWeight._fields)),
            arguments["hessian"],
        )
