"""Whether native layers and fused blocks compute what the originals do, tried on random input."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..ops import native
from ..ops.matmul import GPU_ROWS

STEPS = 6  # tokens; the rotating cache of 8 turns over
# Both accumulate products in float32, from activations of at least 15 bits; of the largest value
# that is computed. And a few roundings of the result.
TOLERANCE = 2.0**-11
ROUNDINGS = 8


def disagreement(original: nn.Module, fused: nn.Module, width: int, dtype: mx.Dtype) -> str:
    """Why the two differ, or nothing: without a cache, and token by token with two kinds of it.

    On a GPU in the model's dtype and, after a prompt that stock MLX reads, at one row: these are
    the launches of an answer.
    """
    batch, prompt = (2, 7) if native.on_cpu() else (1, GPU_ROWS + 1)
    x = mx.random.normal((batch, prompt + STEPS, width), key=mx.random.key(0)).astype(dtype)
    try:
        for make in (None, KVCache, lambda: RotatingKVCache(8)):
            expected, got = (_run(block, x, prompt, make) for block in (original, fused))
            if error := _error(got, expected, expected - x):
                return f"fused, it differs from the original by {error} of the largest value"
    except Exception as error:  # whatever a foreign block raises
        return f"compared with its fused form, it raises {type(error).__name__}"
    return ""


def layer_disagreement(original: nn.Module, layer: nn.Module) -> str:
    """The same of a quantized layer, at one row."""
    name = "as_linear" if hasattr(original, "as_linear") else "__call__"
    scales: mx.array = original["scales"]
    width = scales.shape[-1] * original.group_size
    x = mx.random.normal((1, width), key=mx.random.key(0)).astype(scales.dtype)
    try:
        expected, got = (getattr(m, name)(x) for m in (original, layer))
        if error := _error(got, expected, expected):
            return f"its native product differs from the stock one by {error} of the largest value"
    except Exception as error:  # whatever a compiler, a driver or MLX raises
        return f"its native product raises {type(error).__name__}: {error}"
    return ""


def _error(got: mx.array, expected: mx.array, computed: mx.array) -> str:
    """How far the two are apart, as a part of what was computed, where that is too far."""
    eps = mx.finfo(expected.dtype).eps
    got, expected, computed = (a.astype(mx.float32) for a in (got, expected, computed))
    error, largest, scale = (mx.abs(a).max() for a in (got - expected, expected, computed))
    if (error <= TOLERANCE * scale + ROUNDINGS * eps * largest).item():  # not where it is NaN
        return ""
    return f"{(error / scale).item():.1e}"


def _run(block: nn.Module, x: mx.array, prompt: int, make: Any) -> mx.array:
    def call(x: mx.array, mask: mx.array | None, cache: Any) -> mx.array:
        out = block(x, mask, cache)
        hidden: mx.array = out[0] if isinstance(out, tuple) else out
        return hidden

    if make is None:
        return call(x, create_causal_mask(x.shape[1]), None)
    cache = make()
    rows = [call(x[:, :prompt], create_causal_mask(prompt), cache)]
    rows += [call(x[:, i : i + 1], None, cache) for i in range(prompt, x.shape[1])]
    return mx.concatenate(rows, axis=1)
