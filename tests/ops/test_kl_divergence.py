"""The KL that never stores the logits, against float64, natively and in the fallback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.ops import AffineWeight, Comparison, kl, native, reference
from optiq.ops.cases import LARGE_PAIRS, PAIRS, Pair, f64


def fallback(
    h_p: mx.array, w_p: ops.kl.Head, h_q: mx.array, w_q: ops.kl.Head, soft_cap: float | None = None
) -> Comparison:
    return kl._tiled(h_p, w_p, h_q, w_q, soft_cap or 0.0)


Ways = {"here": ops.kl_divergence, "fallback": fallback}


@pytest.fixture(params=Ways)
def way(request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    function: Callable[..., Comparison] = Ways[request.param]
    return function


@pytest.mark.parametrize("case", [*PAIRS, *LARGE_PAIRS], ids=str)
def test_matches_float64(way: Callable[..., Comparison], case: Pair) -> None:
    got = way(*case.sides(), soft_cap=case.soft_cap)
    assert [a.dtype for a in got] == [mx.float32, mx.bool_, mx.float32, mx.float32]
    exact = way is not fallback and native.active() is not None
    assert case.part(got, exact) <= 1


@pytest.mark.parametrize("spread", [4.0, 12.0, 30.0])
@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
def test_peaked_and_far_apart(spread: float, noise: float) -> None:
    """Where few tokens hold the probability, an error of their logits would show."""
    if native.active() is None:
        pytest.skip("the fallback has float32 logits")
    case = Pair(64, 4000, 640, 640, spread=spread, noise=noise)
    assert case.part(ops.kl_divergence(*case.sides()), exact=True) <= 1


@pytest.mark.parametrize(
    "case",
    [
        Pair(7, 300, 64, 40),
        Pair(20, 1000, 64, 64, noise=2.0, dtype="bf16", bits_p=4),
        Pair(9, 500, 32, 96, bits_q=3),
        Pair(6, 500, 64, 64, soft_cap=10.0, spread=8.0, bits_q=8),
        Pair(530, 130, 32, 32, soft_cap=3.0),
    ],
    ids=str,
)
def test_gradient_at_the_student(way: Callable[..., Comparison], case: Pair) -> None:
    h_p, w_p, h_q, w_q = case.sides()
    rng = np.random.default_rng(0)
    upstream = rng.standard_normal(case.tokens).astype(np.float32)

    def loss(h: mx.array) -> mx.array:
        return (mx.array(upstream) * way(h_p, w_p, h, w_q, soft_cap=case.soft_cap).kl).sum()

    value, slope = mx.value_and_grad(loss)(h_q)
    assert slope.dtype == h_q.dtype
    assert np.isfinite(value.item())
    sides = (f64(h_p), f64(w_p), f64(h_q), f64(w_q))
    truth = reference.kl_gradient(*sides, upstream, soft_cap=case.soft_cap)
    rounding = {"f32": 0, "bf16": 2.0**-8, "f16": 2.0**-11}[case.dtype]
    bound = 2e-5 * np.abs(upstream[:, None]) + rounding * np.abs(truth)
    assert (np.abs(f64(slope) - truth) <= bound).all()


def test_gradient_of_the_log_sum_exp(way: Callable[..., Comparison]) -> None:
    h_p, w_p, h_q, w_q = Pair(5, 200, 48, 48).sides()
    slope = mx.grad(lambda h: way(h_p, w_p, h, w_q).lse_q.sum())(h_q)
    truth = mx.grad(lambda h: mx.logsumexp(h @ w_q.T, axis=-1).sum())(h_q)
    np.testing.assert_allclose(np.array(slope), np.array(truth), atol=1e-5)


def test_gradients_elsewhere_are_refused(way: Callable[..., Comparison]) -> None:
    h_p, w_p, h_q, w_q = Pair(5, 200, 48, 48).sides()
    for function, at in (
        (lambda h: way(h, w_p, h_q, w_q).kl.sum(), h_p),
        (lambda w: way(h_p, w_p, h_q, w).kl.sum(), w_q),
    ):
        if way is fallback or native.active() is None:
            assert mx.all(mx.isnan(mx.grad(function)(at))).item()
        else:
            with pytest.raises(ValueError, match="h_q only"):
                mx.grad(function)(at)


def test_is_zero_for_itself(way: Callable[..., Comparison]) -> None:
    h, w, _, _ = Pair(40, 700, 64, 64, spread=9.0).sides()
    got = way(h, w, h, w)
    assert mx.all(mx.abs(got.kl) < 1e-12).item()
    assert mx.all(got.agree).item()


def test_flat_distributions_agree_on_the_first_word(way: Callable[..., Comparison]) -> None:
    """All logits equal: nothing matters singly, and the first is the maximum on both sides."""
    w = mx.random.normal((20_000, 32), key=mx.random.key(0))
    got = way(mx.zeros((3, 32)), w, mx.zeros((3, 32)), w)
    assert mx.all(mx.abs(got.kl) < 1e-6).item()
    assert mx.all(got.agree).item()
    assert mx.allclose(got.lse_p, mx.log(mx.array(20_000.0))).item()


def test_not_finite_is_nan_for_that_token_only(way: Callable[..., Comparison]) -> None:
    h_p, w_p, h_q, w_q = Pair(6, 400, 64, 64).sides()
    h_q[2, 3] = mx.nan
    h_p[4, 0] = mx.inf
    got = way(h_p, w_p, h_q, w_q)
    expected = np.isin(np.arange(6), (2, 4))
    for a in (got.kl, got.lse_p, got.lse_q):
        assert (np.isnan(np.array(a)) == expected).all()
    assert not np.array(got.agree)[expected].any()
    slope = mx.grad(lambda h: way(h_p, w_p, h, w_q).kl.sum())(h_q)
    assert (np.isnan(np.array(slope)).any(-1) == expected).all()


def test_leading_axes_views_and_empty(way: Callable[..., Comparison]) -> None:
    h_p, w_p, h_q, w_q = Pair(12, 300, 64, 40).sides()
    flat = way(h_p, w_p, h_q, w_q)
    shaped = way(h_p.reshape(3, 4, 64), w_p, h_q.reshape(3, 4, 40), w_q)
    assert shaped.kl.shape == (3, 4)
    assert mx.allclose(shaped.kl.flatten(), flat.kl, atol=1e-6).item()
    strided = way(mx.array(np.array(h_p).T.copy()).T, w_p, h_q, w_q)
    assert mx.allclose(strided.kl, flat.kl, atol=1e-6).item()
    assert way(h_p[0], w_p, h_q[0], w_q).kl.shape == ()
    assert way(h_p[:0], w_p, h_q[:0], w_q).kl.shape == (0,)


def test_vmap_is_refused() -> None:
    if native.active() is None:
        pytest.skip("the fallback is made of operations that have one")
    h_p, w_p, h_q, w_q = Pair(6, 100, 32, 32).sides()
    with pytest.raises(ValueError, match="batch axes"):
        mx.vmap(lambda a, b: ops.kl_divergence(a, w_p, b, w_q).kl)(h_p[:, None], h_q[:, None])


def test_wrong_input_names_the_argument(way: Callable[..., Comparison]) -> None:
    h_p, w_p, h_q, w_q = Pair(4, 96, 64, 64).sides()
    codes, scales, biases = mx.quantize(w_q, 64, 4)
    good = AffineWeight(codes, scales, biases, 64, 4)
    whole = mx.zeros((4, 64), dtype=mx.int32)
    for sides, message in (
        ((whole, w_p, h_q, w_q), r"h_p is .*int32"),
        ((h_p, w_p, h_q, whole), r"w_q is .*int32"),
        ((h_p, w_p[None], h_q, w_q), r"w_p is .*\[vocab, d\]"),
        ((h_p, w_p, h_q[:, :32], w_q), "last axis of h_q"),
        ((h_p, w_p[:50], h_q, w_q), "50 rows"),
        ((h_p[:2], w_p, h_q, w_q), "all axes but the last"),
        ((h_p, w_p[:0], h_q, w_q[:0]), "at least one"),
        ((h_p, w_p, h_q, good._replace(bits=7)), r"w_q\.bits is 7"),
        ((h_p, w_p, h_q, good._replace(group_size=16)), r"w_q\.group_size is 16"),
        ((h_p, w_p, h_q, good._replace(codes=scales)), r"w_q\.w is .*uint32"),
        ((h_p, w_p, h_q, good._replace(codes=codes[:, 1:])), "need codes of shape"),
        ((h_p, w_p, h_q, good._replace(biases=biases[1:])), r"w_q\.scales .* must agree"),
        ((h_p, w_p, h_q, good._replace(scales=codes, biases=codes)), r"w_q\.scales is .*uint32"),
    ):
        with pytest.raises(ValueError, match=message):
            way(*sides)
    for cap in (-1.0, 0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="soft_cap"):
            ops.kl_divergence(h_p, w_p, h_q, w_q, soft_cap=cap)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(("who", "vocabulary"), [("here", 262_144), ("fallback", 65_536)])
def test_memory_is_bounded(gradient: bool, who: str, vocabulary: int) -> None:
    """At 512 tokens; the logits of one side alone would take 512 MiB, 128 MiB in the fallback."""
    if who == "here" and native.active() is None:
        pytest.skip("measured as the fallback")
    code = f"""
import resource
import optiq
import mlx.core as mx
from tests.ops.test_kl_divergence import Ways
kl, words = Ways["{who}"], {vocabulary}
h = mx.random.normal((512, 16))
w, few = mx.random.normal((words, 16)), mx.random.normal((4096, 16))
def run(w):
    mx.eval(kl(h, w, h + 0.1, w))
    if {gradient}:
        mx.eval(mx.grad(lambda a: kl(h, w, a, w).kl.sum())(h + 0.1))
run(few)
mx.eval(w)
mx.clear_cache()
mx.reset_peak_memory()
active = mx.get_active_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(w)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, (mx.get_peak_memory() - active) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    resident, allocated = map(float, done.stdout.split())
    assert resident <= 64
    assert allocated <= 64
