"""Caches of 16-bit floats under blocks that compute in 32.

On the CPU activations are float32 (nn/accelerate.py), and so a stock cache would be: twice the
bytes that mlx-lm takes on a GPU, all of them read in every step. float16 keeps 11 bits of a key or
value where a model in bfloat16 has 8.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from ..models.roles import blocks
from ..nn.blocks import Fused
from ..ops import native

TOP = 65504.0  # the largest float16


class _Half:
    """Mixed into a stock class."""

    blocks_may_write = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        return super().update_and_fetch(_half(keys), _half(values))  # type: ignore[misc]


class HalfKVCache(_Half, KVCache):  # type: ignore[misc]
    """All tokens of one sequence."""

    keys: Any
    values: Any

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        if self.keys is None and (ext := native.active()):
            # The stock class fills its room with zeros, which for a long prompt takes as long as
            # several steps of those who decode.
            rows = -(-keys.shape[2] // self.step) * self.step
            self.keys, self.values = (
                ext.room((*x.shape[:2], rows, x.shape[3]), mx.float16) for x in (keys, values)
            )
        return super().update_and_fetch(keys, values)


class HalfRotatingKVCache(_Half, RotatingKVCache):  # type: ignore[misc]
    """The last tokens of one sequence."""


_HALVES: dict[type, type] = {KVCache: HalfKVCache, RotatingKVCache: HalfRotatingKVCache}


def halvable(model: nn.Module) -> bool:
    """Whether float16 costs no more time than float32: where fused blocks read it as it is."""
    found = blocks(model).values()
    return native.on_cpu() and bool(found) and all(isinstance(b, Fused) for b in found)


def empty_caches(model: nn.Module) -> list[Any]:
    """Caches of `model`, those of stock classes as ones of float16 where it is `halvable`."""
    caches: list[Any] = make_prompt_cache(model)
    return halved(caches) if halvable(model) else caches


def halved(caches: list[Any]) -> list[Any]:
    """Empty caches, those of stock classes as ones of float16."""
    return [_halved(cache) for cache in caches]


def _halved(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*map(_halved, cache.caches))
    half = _HALVES.get(type(cache))
    if half is None:
        return cache
    made: Any = object.__new__(half)
    made.__dict__.update(cache.__dict__)
    return made


def _half(x: mx.array) -> mx.array:
    return mx.clip(x, -TOP, TOP).astype(mx.float16)
