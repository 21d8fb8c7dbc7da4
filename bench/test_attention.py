"""A decode step's attention over 8,192 keys in few bits, against stock MLX with 16-bit and 32-bit
keys, and against mlx-lm's attention over a quantized cache of 8 and 4 bits.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from optiq import ops
from optiq.formats import DENSE, Format

KEYS = 8192
MODELS = {"smollm2": (9, 3, 64), "llama3-8b": (32, 8, 128)}  # heads, key heads, dim
STOCK = ("float16", "bfloat16", "float32", "q8", "q4")
CASES = [
    *(("optiq", name) for name in ("8/8", "8/4", "4/4", "plain")),
    *(("stock", name) for name in STOCK),
]
OURS = [name for who, name in CASES if who == "optiq"]


def drawn(model: str, dtype: mx.Dtype) -> list[mx.array]:
    heads, kv_heads, dim = MODELS[model]
    shapes = [(1, heads, 1, dim), (1, kv_heads, KEYS, dim), (1, kv_heads, KEYS, dim)]
    keys = mx.random.split(mx.random.key(0), 3)
    return [mx.random.normal(s, key=k).astype(dtype) for s, k in zip(shapes, keys, strict=True)]


@pytest.mark.parametrize(("who", "name"), CASES)
@pytest.mark.parametrize("model", MODELS)
def test_decode(benchmark, record, model: str, who: str, name: str) -> None:  # type: ignore[no-untyped-def]
    scale = MODELS[model][2] ** -0.5
    stored: list[Any]
    if who == "optiq":  # float32 queries, as in a fused block on the CPU
        formats = [DENSE] * 2 if name == "plain" else [Format.parse(f) for f in name.split("/")]
        q, *vectors = drawn(model, mx.float32)
        stored = [
            x if f == DENSE else ops.quantize_kv(x, f)
            for x, f in zip(vectors, formats, strict=True)
        ]

        def attend() -> mx.array:
            return ops.quantized_attention(
                q, *stored, k_format=formats[0], v_format=formats[1], scale=scale
            )
    elif name.startswith("q"):
        bits = int(name[1:])
        q, *vectors = drawn(model, mx.float32)  # a fiftieth of its time in float16
        stored = [mx.quantize(x, 64, bits) for x in vectors]

        def attend() -> mx.array:  # which scales the queries in place
            return quantized_scaled_dot_product_attention(
                q + 0, *stored, scale=scale, mask=None, group_size=64, bits=bits
            )
    else:
        q, *stored = drawn(model, getattr(mx, name))

        def attend() -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, *stored, scale=scale)

    mx.eval(q, stored)
    benchmark.pedantic(
        lambda: mx.eval(attend()), rounds=30 if who == "optiq" else 5, warmup_rounds=1
    )
    arrays = [a for x in stored for a in (x if isinstance(x, tuple | list) else [x])]
    nbytes = sum(a.nbytes for a in arrays)
    benchmark.extra_info["GB/s"] = nbytes / benchmark.stats.stats.median / 1e9
    for ours in OURS if who == "stock" else [name]:
        for theirs in STOCK if who == "optiq" else [name]:
            record(f"{model} {ours} against {theirs}", who)
