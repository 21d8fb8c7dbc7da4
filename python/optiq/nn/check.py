"""Whether a fused block computes what the original does, tried on random input."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

PROMPT, STEPS = 7, 6  # tokens; the rotating cache of 8 turns over
# Both accumulate products in float32, from activations of at least 15 bits; of the largest value.
TOLERANCE = 2.0**-11


def disagreement(original: nn.Module, fused: nn.Module, width: int) -> str:
    """Why the two differ, or nothing: without a cache, and token by token with two kinds of it."""
    x = mx.random.normal((2, PROMPT + STEPS, width), key=mx.random.key(0))
    try:
        for make in (None, KVCache, lambda: RotatingKVCache(8)):
            expected, got = (_run(block, x, make) for block in (original, fused))
            scale = mx.abs(expected - x).max()
            error: Any = (mx.abs(got - expected).max() / scale).item()
            if not error <= TOLERANCE:  # or not a number
                return f"fused, it differs from the original by {error:.1e} of the largest value"
    except Exception as error:  # whatever a foreign block raises
        return f"compared with its fused form, it raises {type(error).__name__}"
    return ""


def _run(block: nn.Module, x: mx.array, make: Any) -> mx.array:
    def call(x: mx.array, mask: mx.array | None, cache: Any) -> mx.array:
        out = block(x, mask, cache)
        hidden: mx.array = out[0] if isinstance(out, tuple) else out
        return hidden

    if make is None:
        return call(x, create_causal_mask(x.shape[1]), None)
    cache = make()
    rows = [call(x[:, :PROMPT], create_causal_mask(PROMPT), cache)]
    rows += [call(x[:, i : i + 1], None, cache) for i in range(PROMPT, x.shape[1])]
    return mx.concatenate(rows, axis=1)
