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
from optiq.ops.attention_cases import (
    ATTENTION,
    DIMS,
    LONG_ATTENTION,
    MASKS,
    RECORDS,
    WIDTHS,
    Attention,
    Records,
    masks,
    normal,
)
from optiq.ops.cases import DTYPES


def records(x: mx.array, fmt: Format) -> tuple[mx.array, np.ndarray[Any, Any]]:
    """The records of `x`, or `x` where `fmt` is DENSE, and what they stand for in float64."""
    if fmt == DENSE:
        return x, np.array(x.astype(mx.float32), dtype=np.float64)
    packed = ops.quantize_kv(x, fmt)
    exact = reference.dequantize_kv(np.array(packed), x.shape[-1], fmt.group_size, fmt.bits)
    return packed, exact


@pytest.mark.parametrize("case", RECORDS, ids=str)
def test_a_record_is_within_half_a_step_of_its_vector(case: Records) -> None:
    packed, back = records(case.vectors(), case.format)
    assert packed.dtype == mx.uint32
    assert packed.shape == (2, 3, 7, record_words(case.dim, case.format))
    assert case.part(packed) <= 1
    got = ops.dequantize_kv(packed, case.dim, case.format, mx.float32)
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


def attended(case: Attention) -> mx.array:
    return ops.quantized_attention(case.queries(), *case.stored(), **case.arguments())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dim", "group"), [*product(DIMS, (1, 3, 4, 8))])
def test_attention_equals_float64_on_the_stored_values(mask: str, dim: int, group: int) -> None:
    for i, widths in enumerate([*product(WIDTHS, WIDTHS), (16, 4), (8, 16)]):
        size = 64 if i % 2 and dim % 64 == 0 else 32
        k, v = (DENSE if bits == 16 else Format("affine", bits, size) for bits in widths)
        rows, keys = [(1, 40), (4, 150), (33, 40)][i % 3]
        softcap = 3.0 if i % 4 == 2 else 0.0
        case = Attention(rows, keys, dim, k, v, group, mask, sinks=i % 4 == 1, softcap=softcap)
        assert case.part(attended(case)) <= 1, str(case)


@pytest.mark.parametrize("case", [*ATTENTION, *LONG_ATTENTION], ids=str)
def test_attention_of_the_case_table(case: Attention) -> None:
    got = attended(case)
    assert got.dtype == DTYPES[case.dtype]
    assert case.part(got) <= 1


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
