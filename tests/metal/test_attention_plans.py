"""Launch plans of attention are right before any kernel runs."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import pytest

from optiq.ops.attention import compiled_for
from optiq.ops.attention_cases import DIMS

from .launcher import Plan, plan_quantized_attention

SIZES = (1, 32, 8, 1, 8192)
K8, V4 = (128, (64, 8)), (128, (64, 4))


def planned(sizes: tuple[int, ...] = SIZES, k: Any = K8, v: Any = V4, **options: Any) -> Plan:
    return plan_quantized_attention(sizes, k, v, [0, 0, 0], [0, 0, 0], **options)


def arguments(launch: dict[str, Any]) -> tuple[str, list[str]]:
    """The kernel of a launch and its template arguments."""
    kernel, _, rest = launch["instantiation"].rstrip(">").partition("<")
    return kernel, rest.split(", ")


def test_plans_keep_to_metals_limits() -> None:
    for dim, dtype, rows in product((*DIMS, 8), ("float16", "float32"), (2, 3, 40)):
        form = (dim, (32, 4))
        launch = planned((2, 32, 8, rows, 4000), form, form, dtype=dtype)["launches"][0]
        assert launch["threads"] == (128, 1, 1)
        kernel, of = arguments(launch)
        assert kernel == "attention"
        share, size = int(of[7]), 4 if dtype == "float32" else 2
        assert 4 * 16 * 68 * 4 + 8 * share * (dim * size + 16) <= 32768
        assert launch["threadgroups"][1] == -(-4 * rows // (8 * share))


def test_few_queries_of_a_key_head_go_without_matrices() -> None:
    """Together, however few; a template says whether there are exact tokens, masks or caps."""
    for heads, rows, options, how in (
        (32, 1, {}, ["4", "true", "false", "true"]),
        (8, 3, {"causal": True}, ["3", "false", "false", "true"]),
        (16, 1, {"window": 128, "causal": True}, ["2", "true", "false", "false"]),
        (16, 2, {"recent": 8}, ["4", "false", "true", "true"]),
        (8, 1, {"softcap": 30.0, "first": 4}, ["1", "false", "true", "true"]),
        (8, 1, {"mask": (1, 1, 1, 8192)}, ["1", "false", "false", "true"]),
    ):
        launch = planned((1, heads, 8, rows, 8192), **options)["launches"][0]  # type: ignore[arg-type]
        kernel, of = arguments(launch)
        assert (kernel, of[7:]) == ("attention_vector", how), (heads, rows, options)
        assert launch["threadgroups"][1:] == (1, 8)
        assert launch["threads"] == (128, 1, 1)
    assert arguments(planned((1, 40, 8, 1, 8192))["launches"][0])[0] == "attention"


def test_a_launch_says_what_its_kernels_are_compiled_for() -> None:
    """Beside dtype, dimensions and formats; trials cover split keys and others."""
    kernels: dict[Any, set[str]] = {}
    queries = product((8, 16, 24, 32, 64), (1, 2, 9, 40))
    for (heads, rows), softcap, recent in product(queries, (0.0, 9.0), (0, 8)):
        q, k = (mx.zeros((1, n, size, 128)) for n, size in ((heads, rows), (8, 8192)))
        key = compiled_for(q, k, plain=not softcap, exact=recent > 0)
        the_plan = planned((1, heads, 8, rows, 8192), softcap=softcap, recent=recent)
        kernel, of = arguments(the_plan["launches"][0])
        kernels.setdefault(key, set()).add(f"{kernel} {of[7:-1]}")
    assert all(len(names) == 1 for names in kernels.values()), kernels
    names = [name for key in kernels if key[0] for name in kernels[key]]
    assert len(set(names)) == len(names)


def test_keys_are_split_alike_for_any_few_queries() -> None:
    """So that a query has the same bits beside others."""
    for heads in (8, 16):
        splits = {
            planned((1, heads, 8, rows, 8192), causal=True)["launches"][0]["threadgroups"][0]
            for rows in range(1, 32 // heads + 1)
        }
        assert len(splits) == 1


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
