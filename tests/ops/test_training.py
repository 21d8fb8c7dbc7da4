"""Ops of a training step and their gradients, against float64: natively, and on mx.*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from numpy.typing import NDArray

from optiq import ops
from optiq.ops import reference

Array = NDArray[np.float32]
TINY = 1e-3

pytestmark = pytest.mark.usefixtures("kernels")


def drawn(*shape: int, seed: int = 0, by: float = 1.0) -> Array:
    return (by * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(np.float32)


def check(
    op: Callable[..., mx.array], truth: Callable[..., Any], *inputs: Array, error: float
) -> None:
    """Values, and gradients of a random sum of them along random directions, against the slope of
    the float64 truth there."""
    expected = np.asarray(truth(*inputs))
    weights = drawn(*expected.shape, seed=1)
    (got,), slopes = mx.vjp(lambda *a: [op(*a)], [mx.array(a) for a in inputs], [mx.array(weights)])
    np.testing.assert_allclose(np.array(got), expected, rtol=error, atol=error * scale(expected))
    for i, slope in enumerate(slopes):
        assert slope.shape == inputs[i].shape
        for seed in range(3):
            along = drawn(*inputs[i].shape, seed=seed).astype(np.float64)
            step = 1e-5
            ends = []
            for sign in (1, -1):
                at: list[Any] = list(inputs)
                at[i] = at[i] + sign * step * along
                ends.append(float(np.sum(weights * truth(*at))))
            found = float(np.sum(np.array(slope, np.float64) * along))
            size = np.sqrt(np.sum(np.array(slope, np.float64) ** 2)) + TINY
            assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=10 * error * size)


def scale(a: Any) -> float:
    return float(np.abs(a).max()) + TINY


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 1536)])
def test_gated(activation: str, shape: tuple[int, ...]) -> None:
    gate, up = drawn(*shape, seed=2, by=4), drawn(*shape, seed=3)
    gate.flat[0] = -100
    check(
        lambda g, u: ops.gated(g, u, activation),
        lambda g, u: reference.gated(g, u, activation),
        gate, up, error=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 7), (5, 1000), (2, 49_152)])
def test_cross_entropy(rows: int, vocabulary: int) -> None:
    labels = np.random.default_rng(0).integers(0, vocabulary, rows)
    check(
        lambda x: ops.cross_entropy(x, mx.array(labels)),
        lambda x: reference.cross_entropy(x, labels),
        drawn(rows, vocabulary, by=4), error=2e-5,
    )  # fmt: skip


def test_cross_entropy_of_leading_axes_and_sixteen_bits() -> None:
    logits = mx.array(drawn(2, 3, 50)).astype(mx.bfloat16)
    labels = np.arange(6).reshape(2, 3)
    got = ops.cross_entropy(logits, mx.array(labels))
    assert got.dtype == mx.float32
    truth = reference.cross_entropy(np.array(logits.astype(mx.float32)), labels)
    np.testing.assert_allclose(np.array(got), truth, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 17, 40])
def test_a_logit_that_is_not_finite_is_seen(bad: float, place: int) -> None:
    logits = drawn(2, 41)
    logits[0, place] = bad
    value, slope = mx.value_and_grad(lambda x: ops.cross_entropy(x, mx.array([3, 4])).sum())(
        mx.array(logits)
    )
    assert not np.isfinite(value.item())
    assert not np.isfinite(np.array(slope[0])).all()
    assert np.isfinite(np.array(slope[1])).all()


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 3, 1000), (2, 49_152)])
def test_softmax(shape: tuple[int, ...]) -> None:
    logits = mx.array(drawn(*shape, by=4)).astype(mx.float16)
    got = ops.softmax(logits)
    assert got.dtype == mx.float32
    exact = np.exp(np.array(logits, dtype=np.float64))
    np.testing.assert_allclose(
        np.array(got), exact / exact.sum(axis=-1, keepdims=True), rtol=1e-4
    )  # MLX adds in single precision, one after the other


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    p, draws = np.array([0.5, 1e-12, 0.25, 0.125, 0.1, 0.02, 0.005]), 20_000
    logits = mx.broadcast_to(mx.log(mx.array(p)), (draws, 7))
    labels = ops.categorical(logits, mx.random.key(1))
    assert labels.dtype == mx.uint32
    assert labels.shape == (draws,)
    counts = np.bincount(np.array(labels), minlength=7)
    assert counts[1] == 0
    # Chi squared of 5 degrees of freedom exceeds 25 once in 7,000 times.
    often = p > 1e-3
    expected = draws * p[often]
    assert ((counts[often] - expected) ** 2 / expected).sum() < 25


def test_a_label_of_many_words_is_drawn_from_all_of_them() -> None:
    words, draws = 100_000, 400
    labels = np.array(ops.categorical(mx.zeros((draws, words)), mx.random.key(2)))
    assert labels.max() < words
    np.testing.assert_allclose(labels.mean() / words, 0.5, atol=4 / np.sqrt(12 * draws))
    sure = mx.where(mx.arange(words) == words - 1, 40.0, 0.0)
    assert ops.categorical(sure[None], mx.random.key(3)).tolist() == [words - 1]


@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize(
    ("rows", "width", "out"), [((1,), 48, 40), ((2, 3), 37, 11), ((70,), 64, 200)]
)
def test_add_low_rank(rows: tuple[int, ...], width: int, out: int, rank: int) -> None:
    check(
        lambda y, x, a, b: ops.add_low_rank(y, x, a, b, 2.0),
        lambda y, x, a, b: y + 2.0 * (x @ a @ b),
        drawn(*rows, out), drawn(*rows, width), drawn(width, rank), drawn(rank, out), error=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 100), (2, 576), (70, 33)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    check(
        lambda x, w: ops.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        drawn(*shape, by=3), drawn(shape[-1]), error=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    ("heads", "rows", "dim", "pairs"),
    [(1, 1, 2, 1), (3, 7, 64, 32), (2, 300, 40, 11), (4, 5, 16, 8)],
)
def test_rotary(heads: int, rows: int, dim: int, pairs: int, traditional: bool) -> None:
    frequencies = [10000.0 ** (-i / pairs) for i in range(pairs)]
    x = drawn(2, rows, heads, dim)  # token by token, as a layer writes it

    def truth(x: Any) -> Any:
        at = 5 + np.arange(rows)
        return reference.rotate(x.swapaxes(1, 2), at, frequencies, traditional, 1.5)

    def turned(x: mx.array) -> mx.array:
        options: Any = {"traditional": traditional, "magnitude": 1.5, "offset": 5}
        return ops.rotary(x.swapaxes(1, 2), frequencies, **options)

    check(turned, truth, x, error=1e-4)


def test_steps_of_adamw_are_those_of_mlx() -> None:
    stock = optimizers.AdamW(0.0, weight_decay=0.1, bias_correction=True)
    ours, n = ops.AdamW(decay=0.1), 10_000
    theirs = {"x": mx.array(drawn(n, by=3))}
    stock.init(theirs)
    mine, means = theirs["x"], (mx.zeros(n), mx.zeros(n))
    for step in range(1, 6):
        gradient, rate = mx.array(drawn(n, seed=step)), 0.1 / step
        stock.learning_rate = rate
        theirs = stock.apply_gradients({"x": 0.5 * gradient}, theirs)
        mine, means = ours.step(mine, gradient, means, step=step, rate=rate, by=0.5)
        np.testing.assert_allclose(np.array(mine), np.array(theirs["x"]), atol=3e-6)
    for name, mean in zip("mv", means, strict=True):
        np.testing.assert_allclose(
            np.array(mean), np.array(stock.state["x"][name]), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 1), (9, 6, 2), (33, 3, 3)])
def test_causal_attention(length: int, heads: int, kv_heads: int, window: int | None) -> None:
    at = np.arange(length)
    mask = (at <= at[:, None]) & (at > at[:, None] - (window or length))
    q, k, v = (drawn(2, n, length, 16, seed=n) for n in (heads, kv_heads, kv_heads))
    check(
        lambda q, k, v: ops.causal_attention(q, k, v, scale=0.3, window=window),
        lambda q, k, v: reference.attention(q, k, v, 0.3, mask),
        q, k, v, error=2e-5,
    )  # fmt: skip


def test_causal_attention_with_sinks() -> None:
    q, k, v, sinks = drawn(1, 4, 5, 8), drawn(1, 2, 5, 8), drawn(1, 2, 5, 8, seed=1), drawn(4)
    got = ops.causal_attention(*map(mx.array, (q, k, v)), scale=1.0, sinks=mx.array(sinks))
    truth = reference.attention(q, k, v, 1.0, "causal", sinks)
    np.testing.assert_allclose(np.array(got), truth, atol=1e-5)


def test_wrong_input(kernels: str) -> None:
    if kernels == "pure":
        pytest.skip("MLX's own messages")
    x = mx.zeros((2, 3))
    with pytest.raises(ValueError, match=r"gate is \(2,3\) and up \(2,4\)"):
        ops.gated(x, mx.zeros((2, 4)), "silu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        ops.gated(x, x, "relu")
    with pytest.raises(ValueError, match="labels"):
        ops.cross_entropy(x, mx.zeros((3,), mx.int32))
    with pytest.raises(ValueError, match="integers"):
        ops.cross_entropy(x, mx.zeros((2,)))
    with pytest.raises(ValueError, match="add_low_rank"):
        ops.add_low_rank(x, x, mx.zeros((4, 1)), mx.zeros((1, 3)), 1.0)
    with pytest.raises(ValueError, match="add_low_rank"):
        ops.add_low_rank(x, x, mx.zeros((3, 1)), mx.zeros((1, 2)), 1.0)
    with pytest.raises(ValueError, match="rotary"):
        ops.rotary(x, [1.0])
    with pytest.raises(ValueError, match=r"4 values turn"):
        ops.rotary(mx.zeros((1, 1, 2, 3)), [1.0, 0.5])
    with pytest.raises(ValueError, match="one length"):
        ops.AdamW().step(x[0], x[0], (x[0], x[0][:2]), step=1, rate=0.1)
    with pytest.raises(ValueError, match="counted from 1"):
        ops.AdamW().step(x[0], x[0], (x[0], x[0]), step=0, rate=0.1)
    assert np.isnan(ops.cross_entropy(x, mx.array([0, 3])).tolist()[1])  # no such label
