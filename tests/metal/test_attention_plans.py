"""Launch plans of attention are right before any kernel runs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from optiq.ops.attention_cases import DIMS

from .launcher import Plan, plan_quantized_attention

SIZES = (1, 32, 8, 1, 8192)
K8, V4 = (128, (64, 8)), (128, (64, 4))


def planned(sizes: tuple[int, ...] = SIZES, k: Any = K8, v: Any = V4, **options: Any) -> Plan:
    return plan_quantized_attention(sizes, k, v, [0, 0, 0], [0, 0, 0], **options)


def test_plans_keep_to_metals_limits() -> None:
    for dim, dtype, rows in product((*DIMS, 8), ("float16", "float32"), (1, 3, 40)):
        form = (dim, (32, 4))
        launch = planned((2, 32, 8, rows, 4000), form, form, dtype=dtype)["launches"][0]
        assert launch["threads"] == (128, 1, 1)
        share = int(launch["instantiation"].split(", ")[-2])
        size = 4 if dtype == "float32" else 2
        assert 4 * 32 * 36 * 4 + 8 * share * (dim * size + 16) <= 32768
        assert launch["threadgroups"][1] == -(-4 * rows // (8 * share))


def test_memory_does_not_grow_with_queries_times_keys() -> None:
    decode = planned()
    assert len(decode["launches"]) == 2
    assert sum(decode["temporaries"]) <= 1 << 20
    prefill = planned((1, 32, 8, 2048, 8192))
    assert [len(prefill["launches"]), prefill["temporaries"]] == [1, []]


def test_a_window_bounds_the_keys_that_are_looked_at() -> None:
    splits = [planned(causal=True, window=w)["launches"][0]["threadgroups"][0] for w in (512, 0)]
    assert splits[0] == 1
    assert splits[1] > 8


def test_plans_refuse_what_no_kernel_does() -> None:
    for arguments, message in (
        ({"k": (128, (64, 7))}, "k.bits is 7"),
        ({"v": (128, (64, 2))}, "v.bits is 2"),
        ({"v": (128, (128, 4))}, "v.group_size is 128"),
        ({"k": (512, (64, 8))}, "k.dim is 512"),
        ({"v": (100, (0, 0))}, "v.dim is 100"),
        ({"sizes": (1, 9, 2, 1, 8)}, "no multiple of 2"),
        ({"window": 4}, "causal"),
        ({"mask": (1, 1, 2, 8192)}, "axis 2 of the mask"),
        ({"first": -1}, "at least 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"tune": "kv_split=7"}, r"kv_split=0\|128"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(**arguments)
    assert planned((0, 32, 8, 1, 8192))["launches"] == []
