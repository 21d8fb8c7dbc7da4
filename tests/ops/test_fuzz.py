"""The bindings with random, mostly wrong input: an exception or a right shape, never a crash.

A few hundred cases run with the other tests; `make fuzz` runs 10,000 under ASan and UBSan.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiq.ops import native

CASES = int(os.environ.get("OPTIQ_FUZZ_CASES", "300"))

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no kernels: {native.reason}")

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.bool_]
sizes = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 24, 32, 33, 64, 96, 128, 192])
shapes = st.lists(sizes, max_size=3)
widths = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 64])
groups = st.sampled_from([-32, 0, 16, 32, 48, 64, 128])
# What makes arrays strange besides their shape: strides, an offset, values.
views = st.sampled_from(["plain", "transposed", "strided", "broadcast", "nan", "large"])


@st.composite
def arrays(draw: st.DrawFn, shape: list[int] | None = None, dtype: Any = None) -> mx.array:
    shape = draw(shapes) if shape is None else shape
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    view = draw(views)
    if view == "broadcast":
        return mx.broadcast_to(mx.array(1).astype(dtype), shape)
    if view == "strided" and shape:
        return mx.zeros([*shape[:-1], 2 * shape[-1]], dtype=dtype)[..., ::2]
    if view == "transposed" and len(shape) > 1:
        return mx.zeros([*shape[:-2], shape[-1], shape[-2]], dtype=dtype).swapaxes(-1, -2)
    fill = {"nan": float("nan"), "large": 3e38}.get(view, 1.0)
    return mx.full(shape, fill if mx.issubdtype(dtype, mx.floating) else 5).astype(dtype)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Any, ...]:
    """(codes, scales, biases, group size, bits), right in four of five parts on the average."""
    bits, group = draw(widths), draw(groups)
    rows, count = draw(sizes), draw(st.integers(0, 3))
    lead = [2] if draw(st.integers(0, 5)) == 0 else []
    floating = draw(st.sampled_from(DTYPES[:3]))
    words = max(0, count * max(group, 0) * max(bits, 0) // 32)
    parts = [
        arrays([*lead, rows, words], mx.uint32),
        arrays([*lead, rows, count], floating),
        arrays([*lead, rows, count], floating),
    ]
    wrong = draw(st.integers(0, 11))
    if wrong < 3:
        parts[wrong] = arrays()
    return (*(draw(part) for part in parts), group, bits)


@st.composite
def attention(draw: st.DrawFn, group: int, bits: int) -> Any:
    """A call of quantized_attention, more often right than not."""
    assert native.extension is not None
    batch, kv_heads, dim = draw(st.integers(0, 2)), draw(st.integers(1, 2)), 8 * draw(sizes)
    rows, keys = draw(st.sampled_from([0, 1, 2, 5])), draw(st.sampled_from([0, 1, 3, 33, 200]))
    packed = draw(st.booleans()) and bits > 0 and group > 0
    last = -(-dim // group) + -(-dim * bits // 32) if packed else dim
    floating = st.sampled_from(DTYPES[:3])
    q = draw(arrays([batch, 2 * kv_heads, rows, dim], draw(floating)))
    stored = mx.uint32 if packed else draw(floating)
    k, v = (draw(arrays([batch, kv_heads, keys, last], stored)) for _ in range(2))
    fmt = (group, bits) if packed else (0, 0)
    more: dict[str, Any] = {
        "masking": draw(st.sampled_from(["", "causal"])),
        "mask": draw(arrays([rows, keys], draw(st.sampled_from([mx.bool_, mx.float16])))),
        "window": draw(st.sampled_from([-1, 1, 3, 300])),
        "sinks": draw(arrays([2 * kv_heads])),
        "starts": mx.array([draw(st.integers(-9, 300)) for _ in range(batch)]).astype(mx.int32),
        "first": tuple(draw(arrays([batch, kv_heads, 3, dim], mx.float16)) for _ in range(2)),
        "recent": tuple(draw(arrays([batch, kv_heads, 70, dim], mx.float32)) for _ in range(2)),
        "value_dim": draw(sizes),
    }
    given = {name: x for name, x in more.items() if draw(st.integers(0, 3)) == 0}
    if draw(st.integers(0, 5)) == 0:
        k = draw(arrays())
    return lambda: native.extension.quantized_attention(q, k, v, fmt, fmt, 0.1, **given)


@st.composite
def gradients(draw: st.DrawFn, x: mx.array) -> Any:
    """The gradients of an op for training, or a step of AdamW; shapes fit more often than not."""
    ext = native.extension
    assert ext is not None
    width, rank = (x.shape[-1] if x.ndim else 1), draw(sizes)
    wrong, fits = draw(arrays()), draw(st.integers(0, 3)) > 0
    vector = draw(arrays([width], mx.float32)) if fits else wrong
    matrix = draw(arrays([width, rank], mx.float32)) if fits else wrong
    sums = draw(arrays([*x.shape[:-1], 3], mx.float32)) if fits else wrong
    heads = draw(arrays([draw(sizes) % 3, 2, draw(sizes), rank], mx.float32)) if fits else wrong
    turns = [0.5] * draw(st.integers(0, rank))
    step, labels = draw(st.integers(-1, 9)), draw(arrays(list(x.shape[:-1]), mx.int32))
    calls: list[tuple[Any, list[mx.array]]] = [
        (lambda x, w: ext.rms_norm(x, w, 1e-5), [x, vector]),
        (lambda y, x, a: ext.add_low_rank(y, x, a, mx.zeros((rank, 3)), 2.0), [sums, x, matrix]),
        (lambda h: ext.rotary(h, 2 * len(turns), fits, turns, 1.5, step), [heads]),
        (lambda g, u: ext.gated(g, u, "silu"), [x, draw(arrays(list(x.shape)))]),
        (lambda x: ext.causal_softmax(x, 1.0, max(step, 1), step), [x]),
        (lambda x: ext.cross_entropy(x, labels), [x]),
        (lambda v: ext.adamw(v, v, v, v[:width], step, 1, 1, 0, 0.9, 0.9, 1e-8)[0], [vector]),
    ]
    op, inputs = draw(st.sampled_from(calls))

    def call() -> Any:
        found = [op(*inputs)]
        mx.eval(found)
        return mx.vjp(lambda *a: [op(*a)], inputs, [mx.ones_like(y) for y in found])

    return call


def attempt(call: Any) -> None:
    try:
        mx.eval(call())
    except (ValueError, TypeError, RuntimeError) as error:
        if not str(error):
            raise


@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_no_input_crashes(data: st.DataObject) -> None:
    ext = native.extension
    assert ext is not None
    codes, scales, biases, group, bits = weight = data.draw(weights())
    fitting = [data.draw(sizes), scales.shape[-1] * max(group, 0) if scales.ndim else 0]
    x = data.draw(arrays(fitting, mx.float32) if data.draw(st.booleans()) else arrays())
    op = data.draw(
        st.sampled_from(
            [
                "one",
                "experts",
                "mixed",
                "dense",
                "round",
                "kl",
                "logits",
                "records",
                "attention",
                "gradients",
            ]
        )
    )
    if op == "one":
        transpose = data.draw(st.booleans())
        attempt(lambda: ext.quantized_matmul(x, codes, scales, biases, transpose, group, bits))
    elif op == "experts":
        rows = x.shape[0] if x.ndim else 1
        right = mx.array([i % 3 for i in range(rows)], dtype=mx.uint32)  # one of them out of range
        indices = right if data.draw(st.booleans()) else data.draw(arrays())
        attempt(
            lambda: ext.quantized_matmul(
                x, codes, scales, biases, True, group, bits, indices=indices
            )
        )
    elif op == "mixed":
        parts = [weight, *data.draw(st.lists(weights(), max_size=3))]
        attempt(lambda: ext.mixed_quantized_matmul(x, parts))
    elif op == "dense":
        w = data.draw(arrays())
        attempt(lambda: ext.linear(x, w, data.draw(st.booleans())))
    elif op == "round":
        importance = data.draw(st.none() | arrays())
        attempt(lambda: ext.quantize(x, importance, group, bits))
    elif op == "kl":
        heads = [data.draw(arrays()), data.draw(arrays())]
        hidden = data.draw(arrays())
        attempt(lambda: ext.kl_divergence(x, [heads[0]], hidden, [heads[1]], (0, 0), (0, 0)))
    elif op == "records":
        dtype = data.draw(st.sampled_from(DTYPES))
        attempt(lambda: ext.quantize_kv(x, group, bits))
        attempt(lambda: ext.dequantize_kv(codes, data.draw(sizes), group, bits, dtype))
    elif op == "attention":
        attempt(data.draw(attention(group, bits)))
    elif op == "gradients":
        attempt(data.draw(gradients(x)))
    else:
        attempt(lambda: ext.compare_logits(x, data.draw(arrays(list(x.shape)))))
