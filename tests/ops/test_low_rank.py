"""Low-rank terms by slot, against float64: every kernel, and the same maths on mx.*."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.ops import native, reference
from optiq.ops.cases import TERMS, Terms
from optiq.ops.low_rank import RANKS, Pair, halves

HALF = 2.0**-11  # relative error of a number in float16
SHAPES = [(48, 40), (37, 11), (576, 1536)]
RANKS_OF_SLOTS = (0, 3, 8, 16, 24, 0)  # 0: none


def drawn(width: int, out: int, seed: int = 0) -> list[tuple[mx.array, mx.array] | None]:
    rng = np.random.default_rng(seed)
    return [
        (
            mx.array(rng.normal(0, width**-0.5, size=(width, rank)).astype(np.float32)),
            mx.array(rng.normal(size=(rank, out)).astype(np.float32)),
        )
        if rank
        else None
        for rank in RANKS_OF_SLOTS
    ]


def half(a: mx.array, b: mx.array, scale: float) -> Pair:
    return halves({"a": (np.asarray(a), np.asarray(b))}, scale)["a"]


@pytest.mark.parametrize(("shape", "rows"), [*product(SHAPES, (1, 7, 24))])
def test_it_is_that_of_float64(kernels: str, shape: tuple[int, int], rows: int) -> None:
    width, out = shape
    terms = ops.LowRankTerms(len(RANKS_OF_SLOTS), width, out)
    truth: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(RANKS_OF_SLOTS)
    for slot, pair in enumerate(drawn(width, out)):
        if pair is not None:
            terms.put(slot, half(*pair, 2.0))
            a, b = (np.asarray(m, np.float64) for m in pair)
            truth[slot] = a, 2 * b
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    slots = [int(s) for s in rng.integers(0, len(RANKS_OF_SLOTS), rows)]
    if rows == 24:  # runs of one slot
        slots = sorted(slots)
    got = np.asarray(ops.gathered_low_rank(mx.array(x), terms, slots))
    expected = reference.gathered_low_rank(x, truth, slots)
    magnitudes = [None if t is None else (np.abs(t[0]), np.abs(t[1])) for t in truth]
    bound = 3 * HALF * reference.gathered_low_rank(np.abs(x), magnitudes, slots)
    assert (np.abs(got - expected) <= bound).all()
    assert not got[[truth[s] is None for s in slots]].any()
    if kernels == "native":  # whatever the others are
        for i in range(rows):
            one = ops.gathered_low_rank(mx.array(x[i : i + 1]), terms, slots[i : i + 1])
            assert (np.asarray(one)[0] == got[i]).all()


def test_runs_of_rows_share_a_slot(kernels: str) -> None:
    terms = ops.LowRankTerms(3, 48, 40)
    for slot, pair in enumerate(drawn(48, 40)[1:3], start=1):
        assert pair is not None
        terms.put(slot, half(*pair, 1.0))
    x = mx.random.normal((9, 48), key=mx.random.key(2))
    got = ops.gathered_low_rank(x, terms, [2, 0, 1])
    one_each = ops.gathered_low_rank(x, terms, [2, 2, 2, 0, 0, 0, 1, 1, 1])
    assert mx.array_equal(got, one_each)
    terms.put(2, None)
    assert not ops.gathered_low_rank(x, terms, [2]).any().item()
    assert terms
    terms.put(1, None)
    assert not terms
    assert not ops.gathered_low_rank(x, terms, [1]).any().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_gains_are_of_the_product_and_not_of_the_bias(dtype: mx.Dtype) -> None:
    pair, terms = drawn(48, 40)[1], ops.LowRankTerms(3, 48, 40)
    assert pair is not None
    gain = mx.random.uniform(0.5, 2, (40,), key=mx.random.key(4))
    mx.eval(gain)
    terms.put(1, half(*pair, 1.0), gain)
    terms.put(2, half(*pair, 1.0))
    y = mx.random.normal((4, 3, 40), key=mx.random.key(6)).astype(dtype)
    bias = mx.random.normal((40,), key=mx.random.key(5)).astype(dtype)
    for given, off in ((None, mx.zeros(40)), (bias, bias)):
        got = terms.scaled(y, [0, 1, 2, 1], given)
        assert got.dtype == dtype
        assert mx.array_equal(got[::2], y[::2])
        own, off, found = (a.astype(mx.float32) for a in (y[1::2], off, got[1::2]))
        expected = gain * (own - off) + off
        close = 2.0**-7 if dtype == mx.bfloat16 else 2.0**-10
        assert mx.abs(found - expected).max() <= close * mx.abs(expected).max()
        assert terms.scaled(y, [2, 0, 0, 2], given) is y


@pytest.mark.parametrize(("of_a", "of_b"), [(1e-9, 1e7), (1e9, 1e-12), (1e-30, 1.0), (0.0, 1.0)])
def test_what_float16_holds_badly_is_shifted(of_a: float, of_b: float) -> None:
    pair = drawn(48, 40)[2]
    assert pair is not None
    given = of_a * pair[0], of_b * pair[1]
    a, b = half(*given, 0.7)
    assert a.dtype == b.dtype == (mx.float32 if of_a == 1e-30 else mx.float16)
    assert a.shape[1] == b.shape[0] == RANKS
    exact = 0.7 * np.asarray(given[0], np.float64) @ np.asarray(given[1], np.float64)
    got = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert np.abs(got - exact).max() <= 4 * HALF * np.abs(exact).max()


@pytest.mark.parametrize("stride", [1500, 1504])
@pytest.mark.parametrize("factor", [1.0, 0.7, 2.0**-9, 2.0**20])
def test_halves_are_rounded_as_numpy_rounds_them(stride: int, factor: float) -> None:
    """To nearest even, with subnormals, infinity and NaN."""
    if not native.extension:
        pytest.skip("no native kernels here")
    rng = np.random.default_rng(3)
    matrix = (rng.normal(size=(3, 1500)) * 2.0 ** rng.integers(-26, 17, (3, 1500))).astype("f4")
    matrix[0, :6] = 0.0, -0.0, 65520.0, np.inf, -np.inf, np.nan
    matrix[1] = 1 + np.arange(1500, dtype="f4") / 4096  # between two halves every other time
    with np.errstate(over="ignore"):
        expected = (matrix * np.float32(factor)).astype(np.float16)
    got = np.zeros((3, stride), np.float16)
    native.extension.to_half(matrix, factor, got[:, :1500].view(np.uint16))
    assert np.array_equal(got[:, :1500], expected, equal_nan=True)
    assert not got[:, 1500:].any()
    for wrong in (got[:2, :1500], got[:, :1499], np.zeros((1500, 3), np.float16).T):
        with pytest.raises(ValueError, match="one shape, and contiguous rows"):
            native.extension.to_half(matrix, factor, wrong.view(np.uint16))


def test_what_does_not_fit_is_refused() -> None:
    if not native.active():
        pytest.skip("no native kernels here")
    terms = ops.LowRankTerms(2, 48, 40)
    a, b = mx.zeros((48, 8)), mx.zeros((8, 40))
    mx.eval(a, b)
    wrong = mx.zeros((40, 8))
    strided = mx.zeros((8, 48)).T
    mx.eval(wrong, strided)
    for slot, left, right, reason in (
        (0, a, b, "slot 0 is not one of 1 to 1"),
        (2, a, b, "slot 2"),
        (1, wrong, b, "they must be"),
        (1, a[:, :4] + 0, b, "evaluated"),
        (1, strided, b, "contiguous"),
        (1, a.astype(mx.bfloat16), b, "float32 or float16"),
    ):
        with pytest.raises(ValueError, match=reason):
            terms.put(slot, (left, right))
    for gain in (mx.zeros(39), mx.zeros(40, mx.float16), mx.zeros((1, 40))):
        mx.eval(gain)
        with pytest.raises(ValueError, match=r"must be \[40\] in float32"):
            terms.put(1, (a, b), gain)
    x = mx.zeros((3, 48))
    for slots in ([5, 0, 0], [-1], [0, 0], []):
        with pytest.raises(ValueError, match="slot"):
            ops.gathered_low_rank(x, terms, slots)
    with pytest.raises(ValueError, match=r"it must be \[rows, 48\]"):
        ops.gathered_low_rank(mx.zeros((3, 40)), terms, [0])


@pytest.mark.parametrize("case", TERMS, ids=str)
def test_stacked_terms_are_those_of_float64(case: Terms) -> None:
    """As a GPU takes them, by the kernel of the CPU."""
    if not native.active():
        pytest.skip("no native kernels here")
    assert native.extension is not None
    x, a, b, slots = case.inputs()
    got = native.extension.gathered_low_rank(x, a, b, slots)
    assert case.part(got) <= 1
    away = native.extension.gathered_low_rank(x, a, b, slots + 4)
    assert mx.isnan(away).all().item()
    for wrong, reason in (((x, a, b[:3], slots), "they must be"), ((x, a, b, slots[1:]), "rows")):
        with pytest.raises(ValueError, match=reason):
            native.extension.gathered_low_rank(*wrong)
