"""Keys and values in few bits, and attention over them, against float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import DENSE, Format
from optiq.ops import reference
from optiq.ops.attention import Exact, record_words

WIDTHS = (3, 4, 5, 6, 8)
DIMS = (64, 80, 96, 128, 256)


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def records(x: mx.array, fmt: Format) -> tuple[mx.array, np.ndarray[Any, Any]]:
    """The records of `x`, or `x` where `fmt` is DENSE, and what they stand for in float64."""
    if fmt == DENSE:
        return x, np.array(x.astype(mx.float32), dtype=np.float64)
    packed = ops.quantize_kv(x, fmt)
    exact = reference.dequantize_kv(np.array(packed), x.shape[-1], fmt.group_size, fmt.bits)
    return packed, exact


@pytest.mark.parametrize(("bits", "group", "dim"), [*product(WIDTHS, (32, 64), (*DIMS, 8))])
def test_a_record_is_within_half_a_step_of_its_vector(bits: int, group: int, dim: int) -> None:
    fmt = Format("affine", bits, group)
    x = normal(2, 3, 5, dim, seed=bits) * 4 + 1
    packed, back = records(x, fmt)
    assert packed.dtype == mx.uint32
    assert packed.shape == (2, 3, 5, record_words(dim, fmt))
    groups = -(-dim // group)
    scale = np.array(packed[..., :groups]).view(np.float16)[..., ::2].astype(np.float64)
    step = np.repeat(scale, group, axis=-1)[..., :dim]
    # Scale and bias are float16: the ends of the range move by 2^-11 of their size.
    slack = 2.0**-10 * np.abs(np.array(x)).max()
    assert (np.abs(back - np.array(x)) <= step / 2 + slack).all()
    got = ops.dequantize_kv(packed, dim, fmt, mx.float32)
    np.testing.assert_allclose(np.array(got), back, rtol=0, atol=1e-6 * np.abs(back).max())


def test_a_constant_vector_and_zero_are_exact() -> None:
    fmt = Format("affine", 4, 64)
    x = mx.stack([mx.zeros(64), mx.full((64,), -1.5)])
    assert mx.array_equal(ops.dequantize_kv(ops.quantize_kv(x, fmt), 64, fmt, mx.float32), x)


def test_zero_words_are_the_zero_vector() -> None:
    """So that padding a cache of records pads it with zero vectors."""
    fmt = Format("affine", 5, 32)
    empty = mx.zeros((1, 2, record_words(80, fmt)), dtype=mx.uint32)
    assert mx.array_equal(ops.dequantize_kv(empty, 80, fmt, mx.float32), mx.zeros((1, 2, 80)))


MASKS = ("none", "causal", "window", "bool", "added", "starts")


def masks(kind: str, batch: int, rows: int, keys: int) -> tuple[dict[str, Any], Any]:
    """Arguments of the op, and the mask they mean as an array [B, 1, L, S]."""
    query, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
    causal = np.broadcast_to(key <= query, (batch, 1, rows, keys))
    if kind == "none":
        return {}, None
    if kind == "causal":
        return {"mask": "causal"}, causal
    if kind == "window":
        return {"mask": "causal", "window": 5}, causal & (key > query - 5)
    starts = np.arange(batch) * 3
    if kind == "starts":
        there = key >= starts[:, None, None, None]
        return {"mask": "causal", "starts": mx.array(starts)}, causal & there
    if kind == "bool":
        array = causal & (key != 2)
        return {"mask": mx.array(array)}, array
    added = np.array(normal(1, 1, rows, keys, seed=9))
    return {"mask": mx.array(added)}, added


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("dim", "group"), [*product(DIMS, (1, 3, 4, 8))])
def test_attention_equals_float64_on_the_stored_values(kind: str, dim: int, group: int) -> None:
    for i, (k_bits, v_bits) in enumerate([*product(WIDTHS, WIDTHS), (16, 4), (8, 16)]):
        rows, keys = [(1, 40), (4, 150), (33, 40)][i % 3]
        k_fmt, v_fmt = (
            DENSE if bits == 16 else Format("affine", bits, 64 if i % 2 and dim % 64 == 0 else 32)
            for bits in (k_bits, v_bits)
        )
        q = normal(2, 2 * group, rows, dim, seed=i)
        k, exact_k = records(normal(2, 2, keys, dim, seed=50 + i), k_fmt)
        v, exact_v = records(normal(2, 2, keys, dim, seed=80 + i), v_fmt)
        given, array = masks(kind, 2, rows, keys)
        sinks = normal(2 * group, seed=7) if i % 4 == 1 else None
        softcap = 3.0 if i % 4 == 2 else 0.0
        got = ops.quantized_attention(
            q, k, v, k_format=k_fmt, v_format=v_fmt, scale=dim**-0.5, sinks=sinks,
            softcap=softcap, **given,
        )  # fmt: skip
        expected = reference.attention(
            np.array(q), exact_k, exact_v, dim**-0.5, array,
            None if sinks is None else np.array(sinks), softcap,
        )  # fmt: skip
        np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value_dim", [64, 128])
def test_exact_vectors_replace_their_records(value_dim: int) -> None:
    fmt, keys, starts = Format("affine", 4, 32), 20, np.array([0, 4])
    q, k, v = (
        normal(2, h, n, d, seed=h + n)
        for h, n, d in ((6, 3, 64), (2, keys, 64), (2, keys, value_dim))
    )
    (k_records, exact_k), (v_records, exact_v) = records(k, fmt), records(v, fmt)
    index = starts[:, None] + np.arange(2)
    first = Exact(*(mx.take_along_axis(a, mx.array(index)[:, None, :, None], 2) for a in (k, v)))
    recent = Exact(k[:, :, -5:], v[:, :, -5:])
    for stored, plain in ((exact_k, np.array(k)), (exact_v, np.array(v))):
        for b, start in enumerate(starts):
            stored[b, :, start : start + 2] = plain[b, :, start : start + 2]
        stored[:, :, -5:] = plain[:, :, -5:]
    _, array = masks("causal", 2, 3, keys)
    array = array & (np.arange(keys) >= starts[:, None, None, None])
    got = ops.quantized_attention(
        q, k_records, v_records, k_format=fmt, v_format=fmt, scale=0.125, mask="causal",
        starts=mx.array(starts), first=first, recent=recent, value_dim=value_dim,
    )  # fmt: skip
    expected = reference.attention(np.array(q), exact_k, exact_v, 0.125, array)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


def test_formats_and_shapes_that_do_not_fit() -> None:
    x = normal(1, 1, 4, 64, seed=0)
    with pytest.raises(ValueError, match="2g64"):
        ops.quantize_kv(x, Format("affine", 2, 64))
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.quantize_kv(x[..., :60], Format("affine", 4, 32))
    fmt = Format("affine", 8, 32)
    packed, _ = records(x, fmt)
    with pytest.raises(ValueError, match="are not those of 64 values"):
        ops.dequantize_kv(packed, 64, Format("affine", 4, 32), mx.float32)
    with pytest.raises(ValueError, match="causal"):
        ops.quantized_attention(x, packed, packed, k_format=fmt, v_format=fmt, scale=1.0, window=4)
