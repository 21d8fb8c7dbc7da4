"""What the CPU kernels of quantized attention promise beyond the case table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import DENSE, Format
from optiq.ops import native, reference
from optiq.ops.attention import Exact
from optiq.ops.attention_cases import MASKS, WIDTHS, masks, normal
from tests.ops.test_quantized_attention import records
from tests.ops.test_variants import skip_where_not_run

pytestmark = pytest.mark.skipif(native.extension is None, reason="no native kernels")

K, V = Format("affine", 6, 32), Format("affine", 3, 64)


def attend(q: mx.array, k: mx.array, v: mx.array, **more: Any) -> mx.array:
    formats = {"k_format": K, "v_format": V, "scale": q.shape[-1] ** -0.5}
    return ops.quantized_attention(q, k, v, **{**formats, **more})


def drawn(batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int = 80) -> Any:
    """q, and records of K and V with what they stand for."""
    q = normal(batch, heads, rows, dim, seed=1)
    k, exact_k = records(normal(batch, kv_heads, keys, dim, seed=2), K)
    v, exact_v = records(normal(batch, kv_heads, keys, dim, seed=3), V)
    return q, k, v, exact_k, exact_v


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_records_are_those_of_the_fallback(
    bits: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group, dim in ((32, 80), (64, 96), (64, 8), (32, 256)):
        fmt = Format("affine", bits, group)
        x = normal(3, 50, dim, seed=bits) * mx.array([1e-6, 1.0, 900.0])[:, None, None] + 0.3
        x = x.astype(dtype)
        ours = ops.quantize_kv(x, fmt), ops.quantize_kv(x[:, ::2], fmt)
        back = ops.dequantize_kv(ours[0], dim, fmt, dtype)
        with monkeypatch.context() as m:
            m.setattr(native, "extension", None)
            assert mx.array_equal(ours[0], ops.quantize_kv(x, fmt))
            assert mx.array_equal(ours[1], ops.quantize_kv(x[:, ::2], fmt))
            expected = ops.dequantize_kv(ours[0], dim, fmt, dtype)
        assert back.dtype == dtype
        assert mx.allclose(back, expected, rtol=mx.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 700), (5, 1030), (200, 450)])
def test_many_splits_equal_float64_and_the_fallback(
    kind: str, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, exact_k, exact_v = drawn(2, 6, 2, rows, keys)
    given, array = masks(kind, 2, rows, keys)
    got = attend(q, k, v, **given)
    expected = reference.attention(np.array(q), exact_k, exact_v, 80**-0.5, array)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(native, "extension", None)
    np.testing.assert_allclose(np.array(attend(q, k, v, **given)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_queries_are_rounded_once(dtype: mx.Dtype) -> None:
    q, k, v, exact_k, exact_v = drawn(1, 8, 2, 3, 300)
    q = q.astype(dtype)
    got = attend(q, k, v, mask="causal")
    truth = reference.attention(
        np.array(q.astype(mx.float32)), exact_k, exact_v, 80**-0.5, "causal"
    )
    assert got.dtype == dtype
    error = np.abs(np.array(got.astype(mx.float32)) - truth)
    assert (error <= np.abs(truth) * mx.finfo(dtype).eps / 2 + 1e-5).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_plain_keys_and_values(dtype: mx.Dtype) -> None:
    q = normal(1, 4, 2, 64, seed=0)
    k, v = (normal(1, 2, 200, 64, seed=i).astype(dtype) for i in (1, 2))
    got = attend(q, k, v, k_format=DENSE, v_format=DENSE, mask="causal")
    plain = [np.array(a.astype(mx.float32)) for a in (k, v)]
    expected = reference.attention(np.array(q), *plain, 0.125, "causal")
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


def test_a_cache_is_read_in_place() -> None:
    """The first tokens of longer arrays, heads in any order, a broadcast batch."""
    q, k, v, *_ = drawn(2, 6, 2, 3, 400)
    short = attend(q, mx.contiguous(k[:, :, :300]), mx.contiguous(v[:, :, :300]), mask="causal")
    assert mx.array_equal(attend(q, k[:, :, :300], v[:, :, :300], mask="causal"), short)
    turned = mx.contiguous(k.swapaxes(1, 2)).swapaxes(1, 2)
    whole = attend(q, k, v)
    assert mx.array_equal(attend(q, turned, v), whole)
    one = mx.broadcast_to(k[:1], k.shape)
    assert mx.array_equal(attend(q, one, v)[0], whole[0])


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_padded_row_of_a_batch_has_the_bits_of_the_row_alone(
    rows: int, window: int | None
) -> None:
    """Splits of the keys begin where a row begins, so padding moves no sum."""
    q, k, v, *_ = drawn(3, 6, 2, rows, 600)
    starts = [0, 3, 260]
    together = attend(q, k, v, mask="causal", window=window, starts=mx.array(starts))
    for b, start in enumerate(starts):
        one = [a[b : b + 1] for a in (q, k[:, :, start:], v[:, :, start:])]
        alone = attend(*one, mask="causal", window=window)
        assert mx.array_equal(together[b : b + 1], alone)


def test_a_query_row_does_not_depend_on_the_rows_beside_it() -> None:
    q, k, v, *_ = drawn(1, 8, 2, 32, 500)
    together = attend(q, k, v, mask="causal")
    for i in (0, 13, 31):
        keys = 500 - 31 + i
        alone = attend(q[:, :, i : i + 1], k[:, :, :keys], v[:, :, :keys])
        assert mx.array_equal(together[:, :, i : i + 1], alone)


def test_exact_vectors_with_starts_across_splits() -> None:
    q, k, v, exact_k, exact_v = drawn(2, 6, 2, 2, 400)
    plain = [normal(2, 2, 400, 80, seed=i) for i in (2, 3)]
    starts = np.array([0, 130])
    index = mx.array(starts[:, None] + np.arange(140))[:, None, :, None]
    first = Exact(*(mx.take_along_axis(a, index, 2) for a in plain))
    recent = Exact(*(a[:, :, -133:].astype(mx.float16) for a in plain))
    for stored, own, late in zip((exact_k, exact_v), plain, recent, strict=True):
        for b, start in enumerate(starts):
            stored[b, :, start : start + 140] = np.array(own)[b, :, start : start + 140]
        stored[:, :, -133:] = np.array(late.astype(mx.float32))
    _, array = masks("causal", 2, 2, 400)
    array = array & (np.arange(400) >= starts[:, None, None, None])
    got = attend(q, k, v, mask="causal", starts=mx.array(starts), first=first, recent=recent)
    expected = reference.attention(np.array(q), exact_k, exact_v, 80**-0.5, array)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v, *_ = drawn(2, 6, 2, 5, 20)
    got = attend(q, k, v, mask="causal", starts=mx.array([18, 99]))
    assert not mx.any(got[0, :, :3])
    assert not mx.any(got[1])
    assert mx.all(mx.any(got[0, :, 3:], axis=-1))


PROBE = """
import optiq
from optiq.ops import native
from tests.ops import test_quantized_attention as t
for kind, dim, group in zip(t.MASKS, (64, 80, 96, 128, 256, 80), (3, 4, 1, 8, 3, 4)):
    t.test_attention_equals_float64_on_the_stored_values(kind, dim, group)
t.test_exact_vectors_replace_their_records(64)
print(native.extension.isa())
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "neon"])
def test_instruction_sets(isa: str) -> None:
    skip_where_not_run(isa)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {"OPTIQ_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_no_gradients() -> None:
    q, k, v, *_ = drawn(1, 4, 2, 1, 10)
    with pytest.raises(ValueError, match="no gradients"):
        mx.grad(lambda q: attend(q, k, v).sum())(q)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": mx.zeros((1, 5, 1, 80))}, "multiple of kv_heads"),
        ({"q": mx.zeros((1, 4, 80))}, r"\[B, heads, L, dim\]"),
        ({"q": mx.zeros((1, 4, 1, 80), dtype=mx.int32)}, "q is"),
        ({"q": mx.zeros((2, 4, 1, 80))}, "keys .* do not fit a batch of 2"),
        ({"q": mx.zeros((1, 4, 1, 64))}, "keys .* records of 14 words"),
        ({"k": mx.zeros((1, 2, 9, 18))}, "keys .* float32 do not fit"),
        ({"v": mx.zeros((1, 2, 8, 10), dtype=mx.uint32)}, "values .* do not fit"),
        ({"value_dim": 96}, "values .* do not fit"),
        ({"value_dim": 12}, "multiple of 8"),
        ({"v_format": Format("affine", 2, 64)}, "values: bits is 2; it must be 3, 4, 5, 6 or 8"),
        ({"v_format": Format("affine", 4, 128)}, "values: group_size is 128; it must be 32 or 64"),
        ({"v_format": DENSE}, "values .* do not fit"),
        ({"mask": "caudal"}, "causal"),
        ({"mask": mx.zeros((3, 9))}, "does not broadcast"),
        ({"mask": mx.zeros((1, 9), dtype=mx.int32)}, "mask is"),
        ({"mask": "causal", "window": 0}, "window is 0"),
        ({"sinks": mx.zeros(3)}, "sinks"),
        ({"starts": mx.zeros((2,), dtype=mx.int32)}, "starts"),
        ({"first": Exact(mx.zeros((1, 2, 3, 80)), mx.zeros((1, 2, 2, 80)))}, "exact values"),
        ({"recent": Exact(mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 80)))}, "exact keys"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], names: str) -> None:
    q, k, v, *_ = drawn(1, 4, 2, 1, 9)
    good = {"q": q, "k": k, "v": v}
    attend(**good)
    with pytest.raises(ValueError, match=names):
        attend(**{**good, **change})
