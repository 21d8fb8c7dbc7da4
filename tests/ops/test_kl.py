"""KL from logits, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq import ops
from optiq.ops import reference


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 1000, 49_152])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 3.0])
def test_matches_float64(vocabulary: int, noise: float) -> None:
    rng = np.random.default_rng(vocabulary)
    p = rng.standard_normal((5, vocabulary)).astype(np.float32) * 4
    q = (p + noise * rng.standard_normal(p.shape)).astype(np.float32)
    kl, agree = ops.kl_from_logits(mx.array(p), mx.array(q))
    np.testing.assert_allclose(np.array(kl), reference.kl_from_logits(p, q), rtol=2e-5, atol=2e-7)
    both = ops.compare_logits(mx.array(p), mx.array(q))
    for lse, logits in ((both.lse_p, p), (both.lse_q, q)):
        truth = np.log(np.exp(logits.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(np.array(lse), truth, rtol=1e-6, atol=1e-6)
    assert (np.array(agree) == (p.argmax(-1) == q.argmax(-1))).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(-50, 50))
def test_is_zero_for_equal_and_unmoved_by_shifts(rows: int, vocabulary: int, shift: float) -> None:
    p = mx.random.normal((rows, vocabulary), key=mx.random.key(rows)) * 5
    kl, agree = ops.kl_from_logits(p, p + shift)
    assert mx.all(mx.abs(kl) < 1e-5).item()
    assert mx.all(ops.kl_from_logits(p, p)[0] == 0).item()
    assert agree.shape == (rows,)


def test_extreme_and_masked_logits() -> None:
    p = mx.array([[0.0, -1e30, 300.0, -mx.inf]])
    q = mx.array([[0.0, 5.0, 290.0, -mx.inf]])
    kl, agree = ops.kl_from_logits(p, q)
    assert mx.all(mx.isfinite(kl)).item()
    assert agree.item()


def test_sixteen_bit_logits_and_leading_axes() -> None:
    p = mx.random.normal((2, 3, 50)).astype(mx.bfloat16)
    q = mx.random.normal((2, 3, 50)).astype(mx.bfloat16)
    kl, agree = ops.kl_from_logits(p, q)
    assert kl.shape == agree.shape == (2, 3)
    truth = reference.kl_from_logits(np.array(p.astype(mx.float32)), np.array(q.astype(mx.float32)))
    np.testing.assert_allclose(np.array(kl), truth, rtol=1e-5)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="same shape"):
        ops.kl_from_logits(mx.zeros((2, 3)), mx.zeros((2, 4)))
    with pytest.raises(ValueError, match="p is"):
        ops.kl_from_logits(mx.zeros((2, 3), dtype=mx.int32), mx.zeros((2, 3)))
