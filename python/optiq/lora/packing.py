"""Several samples in one pass of a model, none of which sees another.

The samples stand one after the other in one sequence. A `Segments` takes the place of each layer's
cache: it keeps nothing, and attends sample by sample, so no mask of all against all is ever made.
Rotary positions are relative, so a sample may stand anywhere. `packable` tries whether that holds
for a model; where it does not (positions that are learned, states that run on), samples run alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..kv import route
from ..kv.records import Handle
from ..ops import causal_attention, native
from .data import Sample

# Of the largest logit, packed against alone: the products of the CPU take activations as 16-bit
# fixed point where rows are few, a GPU has 16 bits in all. A sample that sees another is far off.
DIFFERENCE = 1e-3
GPU_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Pack:
    """Samples that go through the model together."""

    samples: tuple[Sample, ...]

    @cached_property
    def tokens(self) -> list[int]:
        return [token for sample in self.samples for token in sample.tokens]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        ends, at = [], 0
        for sample in self.samples:
            at += len(sample.tokens)
            ends.append(at)
        return tuple(ends)

    @cached_property
    def learned(self) -> list[int]:
        """The places of the tokens to learn, each of which the place before it predicts."""
        starts = (0, *self.ends[:-1])
        return [
            start + i
            for start, sample in zip(starts, self.samples, strict=True)
            for i in sample.trained
        ]


def pack(samples: Iterable[Sample], most: int) -> list[Pack]:
    """All samples in packs of at most `most` tokens: the longest first, each where it fits."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.tokens)):
        n = len(sample.tokens)
        at = next((i for i, left in enumerate(room) if left >= n), None)
        if at is None:
            bins.append([])
            room.append(most)
            at = -1
        bins[at].append(sample)
        room[at] -= n
    return [Pack(tuple(samples)) for samples in bins]


@dataclass(frozen=True)
class Window:
    """A mask of the last `size` tokens, as `attend` is to make it for each sample."""

    size: int


class Segments:
    """Stands for the cache of one layer while a pack runs; `ends` are where its samples end.

    Keys and values are attended to once, by the block that made them: where a later block reads
    them too (Gemma 4), they would reach it past the block's outputs, and gradients would be lost.
    """

    offset = 0

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends = tuple(ends)
        self._now: tuple[mx.array, mx.array] | None = None

    def make_mask(self, n: int, *, window_size: int | None = None, **_: Any) -> Any:
        return "causal" if window_size is None else Window(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self._now = keys, values
        return Handle(self, True, tuple(keys.shape)), Handle(self, False, tuple(values.shape))

    def attend(
        self, q: mx.array, *, scale: float, mask: Any, sinks: Any = None, softcap: float = 0.0
    ) -> mx.array:
        if softcap or not (isinstance(mask, Window) or mask == "causal"):
            raise TypeError("the model makes a mask or a score of its own")
        if self._now is None:
            raise TypeError("a block reads the keys and values of another")
        (keys, values), self._now = self._now, None
        window = mask.size if isinstance(mask, Window) else None
        out, start = [], 0
        for end in self.ends:
            at = slice(start, end)
            of_one = q[:, :, at], keys[:, :, at], values[:, :, at]
            out.append(causal_attention(*of_one, scale=scale, window=window, sinks=sinks))
            start = end
        return mx.concatenate(out, axis=2)


def segments(model: nn.Module, ends: Sequence[int]) -> list[Segments]:
    """For all layers of `model`."""
    return [Segments(ends) for _ in make_prompt_cache(model)]


def packable(model: nn.Module) -> str:
    """Why samples have to run alone in this model; empty where they can be packed.

    The attention of `model` is routed (see optiq.kv), in place.
    """
    route(model)
    parts = [[1 + (7 * i + j) % 5 for i in range(n)] for j, n in enumerate((12, 5, 9))]
    joined = mx.array([[token for part in parts for token in part]])
    try:
        ends = (12, 17, 26)
        got = model(joined, cache=segments(model, ends))
        expected = mx.concatenate([model(mx.array([part])) for part in parts], axis=1)
        error: Any = mx.abs(got - expected).max().item()
        scale: Any = mx.abs(expected).max().item()
    except Exception as fault:  # whatever a model file does with a cache that it does not know
        return f"packed they raise {type(fault).__name__}"
    if error <= (DIFFERENCE if native.on_cpu() else GPU_DIFFERENCE) * scale:
        return ""
    return f"packed they differ by {error:.1e} of {scale:.1e}"
