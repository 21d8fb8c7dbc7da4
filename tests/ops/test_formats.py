"""Which formats there are: the native checks and the tables of `optiq.formats` say the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import pytest

from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, KV_BITS, KV_GROUPS, is_kv_format
from optiq.ops import native

ALL = set(product(range(-1, 12), (-32, 0, 16, 32, 48, 64, 96, 128, 256)))


def accepted(call: Callable[[int, int], Any]) -> set[tuple[int, int]]:
    """(bits, group size) for which there is no error; an error names what is wrong."""
    found = set()
    for bits, group_size in ALL:
        error = ""
        try:
            call(group_size, bits)
            found.add((bits, group_size))
        except ValueError as refused:
            error = str(refused)
        limits = (f"bits is {bits}; it must be", f"group_size is {group_size}; it must be")
        assert not error or any(limit in error for limit in limits)
    return found


@pytest.mark.skipif(native.extension is None, reason="no native kernels")
def test_formats() -> None:
    ext: Any = native.extension
    x = mx.zeros((768, 768))
    weights = set(product(AFFINE_BITS, AFFINE_GROUPS))
    assert accepted(lambda g, b: ext.quantize(x, None, g, b)) == weights
    assert accepted(lambda g, b: ext.plan_quantize(768, 768, g, b)) == weights
    assert accepted(lambda g, b: ext.plan_quantized_matmul(1, 768, [(8, (g, b))])) == weights
    kv = set(product(KV_BITS, KV_GROUPS))
    assert {fmt for fmt in ALL if is_kv_format(*fmt)} == kv
    assert accepted(lambda g, b: ext.quantize_kv(x, g, b)) == kv
    assert accepted(lambda g, b: ext.plan_quantize_kv(1, (64, (g, b)))) == kv
