"""Whether blocks and modules compute what the originals do, tried on random input."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..ops import native
from ..ops.contest import error_of
from ..ops.matmul import GPU_ROWS

STEPS = 6  # tokens; the rotating cache of 8 turns over


def disagreement(original: nn.Module, fused: nn.Module, width: int, dtype: mx.Dtype) -> str:
    """Why the two differ, or nothing: without a cache, and token by token with two kinds of it.

    On a GPU in the model's dtype and, after a prompt of many rows, at one row: these are the
    launches of an answer.
    """
    batch, prompt = (2, 7) if native.on_cpu() else (1, GPU_ROWS + 1)
    x = mx.random.normal((batch, prompt + STEPS, width), key=mx.random.key(0)).astype(dtype)
    try:
        for make in (None, KVCache, lambda: RotatingKVCache(8)):
            expected, got = (_run(block, x, prompt, make) for block in (original, fused))
            if error := error_of(got, expected, expected - x):
                return f"fused, it differs from the original by {error} of the largest value"
    except Exception as error:  # whatever a foreign block raises
        return f"compared with its fused form, it raises {type(error).__name__}"
    return ""


def agree(original: nn.Module, swap: nn.Module, x: mx.array) -> bool:
    """Whether two modules that take one array give the same of `x`."""
    try:
        expected, got = original(x), swap(x)
        return not error_of(got, expected, expected)
    except Exception:  # whatever a foreign module raises
        return False


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
