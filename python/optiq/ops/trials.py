"""A tiny case for each op that has Metal kernels: on a GPU no op is used before it has passed.

Only gross faults show here, within a second; `optiq doctor --selftest` is the thorough test.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import Format
from . import attention, kl, reference, rounding
from .affine import AffineWeight


def _close(got: mx.array, expected: mx.array, eps: float) -> bool:
    """Within `eps` of the largest value."""
    error: Any = (mx.abs(got.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()
    return bool(error <= eps)


def _quantized_matmul(ext: ModuleType) -> bool:
    """One product of each kernel for few rows of x, over the dtypes."""
    dense = mx.random.normal((2, 64, 256), key=mx.random.key(0))

    def case(rows: int, bits: int, dtype: mx.Dtype) -> tuple[mx.array, list[mx.array], mx.array]:
        """x, two stacked weights in three arrays, and what they stand for."""
        x = mx.random.normal((rows, 256), key=mx.random.key(rows)).astype(dtype)
        codes, scales, biases = mx.quantize(dense.astype(dtype), 64, bits)
        s, b = (a.astype(mx.float32) for a in (scales, biases))
        return x, [codes, scales, biases], mx.dequantize(codes, s, b, 64, bits)

    def right(y: mx.array, x: mx.array, w: mx.array) -> bool:
        return _close(y, x.astype(mx.float32) @ w.T, max(2e-3, 2 * mx.finfo(x.dtype).eps))

    for rows, dtype in ((1, mx.float16), (16, mx.bfloat16)):
        x, stacked, w = case(rows, 4, dtype)
        y = ext.quantized_matmul(x, *(a[0] for a in stacked), True, 64, 4)
        if not right(y, x, w[0]):
            return False
    x, stacked, w = case(2, 3, mx.float32)
    parts = [(*(a[i] for a in stacked), 64, 3) for i in range(2)]
    mixed = ext.mixed_quantized_matmul(x, parts)
    experts = ext.quantized_matmul(
        x, *stacked, True, 64, 3, indices=mx.array([1, 0], dtype=mx.uint32)
    )
    back = ext.quantized_matmul(x[:, :64], *parts[1][:3], False, 64, 3)
    return (
        all(right(mixed[i], x, w[i]) for i in range(2))
        and all(right(experts[i], x[i], w[1 - i]) for i in range(2))
        and right(back, x[:, :64], w[1].T)
    )


def _quantize(ext: ModuleType) -> bool:
    """Min/max as MLX rounds on this device, bit for bit; the search as good as that in `mx.*`."""
    fmt = Format("affine", 3, 64)
    w = mx.random.normal((16, 128), key=mx.random.key(0)).astype(mx.float16)
    importance = mx.random.uniform(0.1, 1.0, (128,), key=mx.random.key(1))
    stock = mx.quantize(w, fmt.group_size, fmt.bits)
    plain = ext.quantize(w, None, fmt.group_size, fmt.bits)
    if not all(mx.array_equal(a, b).item() for a, b in zip(plain, stock, strict=True)):
        return False

    exact = np.array(w.astype(mx.float32))
    columns = reference.search_weights(exact, np.array(importance), fmt.group_size)

    def error(codes: mx.array, scales: mx.array, biases: mx.array) -> float:
        s, b = (np.array(a.astype(mx.float32)) for a in (scales, biases))
        back = reference.dequantize(np.array(codes), s, b, fmt.group_size, fmt.bits)
        return float((columns * (back - exact) ** 2).sum())

    searched = ext.quantize(w, importance, fmt.group_size, fmt.bits)
    return error(*searched) <= 1.01 * error(*rounding._search(w, fmt, importance))


def _kl_divergence(ext: ModuleType) -> bool:
    """A dense and a quantized head over a vocabulary of several tiles."""
    key = mx.random.key
    h_p, h_q = (mx.random.normal((35, 64), key=key(i)).astype(mx.float16) for i in range(2))
    w_p = mx.random.normal((300, 64), key=key(2)).astype(mx.float16)
    w_q = AffineWeight(*mx.quantize(w_p, 64, 4))
    got = ext.kl_divergence(h_p, [w_p], h_q, list(w_q[:3]), (0, 0), (64, 4), 0.0)
    expected = kl._tiled(h_p, w_p, h_q, w_q, 0.0)
    return bool(mx.array_equal(got[1], expected.agree).item()) and all(
        _close(got[i], expected[i], 1e-3) for i in (0, 2, 3)
    )


def _quantize_kv(ext: ModuleType) -> bool:
    """Within half a step of the vectors, and what rounding scale and bias to float16 adds."""
    x = mx.random.normal((40, 80), key=mx.random.key(0)).astype(mx.float16)
    records = np.array(ext.quantize_kv(x, 32, 5))
    exact = np.array(x).astype(np.float64)
    off = np.abs(reference.dequantize_kv(records, 80, 32, 5) - exact).max()
    step = np.ptp(exact, axis=-1).max() / 31
    return bool(off <= step / 2 + 2.0**-10 * np.abs(exact).max())


def _quantized_attention(ext: ModuleType) -> bool:
    """A decode step over two splits of the keys, and a prefill, both of a padded batch."""
    k_format, v_format = Format("affine", 8, 64), Format("affine", 4, 32)
    keys, starts = 1100, np.array([0, 70])
    x = mx.random.normal((2, 2, keys, 64), key=mx.random.key(1))
    k, v = attention.quantize_kv(x, k_format), attention.quantize_kv(-x, v_format)
    exact_k, exact_v = (
        reference.dequantize_kv(np.array(r), 64, f.group_size, f.bits)
        for r, f in ((k, k_format), (v, v_format))
    )
    for rows in (1, 40):
        q = mx.random.normal((2, 6, rows, 64), key=mx.random.key(rows))
        y = ext.quantized_attention(
            q, k, v, (64, 8), (32, 4), 0.125, "causal", starts=mx.array(starts)
        )
        query, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
        seen = (key <= query) & (key >= starts[:, None, None, None])
        expected = reference.attention(np.array(q), exact_k, exact_v, 0.125, seen)
        if not _close(y, mx.array(expected.astype(np.float32)), 1e-4):
            return False
    return True


TRIALS = {
    "quantized_matmul": _quantized_matmul,
    "quantize": _quantize,
    "kl_divergence": _kl_divergence,
    "quantize_kv": _quantize_kv,
    "quantized_attention": _quantized_attention,
}
