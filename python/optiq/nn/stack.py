"""All decoder blocks of a model as one node of the graph, in a step of several sequences.

The model's own code stays in charge: it embeds, makes masks, calls its blocks in turn and ends with
its norm. But the first block computes all of them, over the caches that the model was called with,
and the others hand on what they are given. That the caches are longer is only noted at the end,
when each block was called as was foreseen. A model that calls them otherwise runs again, block by
block, and is left alone from then on.

The node has no outputs but the last block's: MLX's cost of an output grows with their number, and
there would be two for each block and sequence. So it writes into the caches when it is evaluated,
and until then nobody may read them. That holds for `optiq.kv.rows`, whose caches are read by none
but the next step; a cache that something else holds is left to the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.attention import packing
from .blocks import RUN, Fused, FusedSharing, Slots, slots_of
from .layers import Adopting
from .parts import Native

_stacked_classes: dict[type[nn.Module], type[nn.Module]] = {}


def stack(module: nn.Module) -> nn.Module:
    """The module that has taken over what `module` holds, with blocks as its `layers`."""
    cls = type(module)
    if cls not in _stacked_classes:
        _stacked_classes[cls] = type(f"Stacked{cls.__name__}", (Stacked, cls), {})
    stacked: nn.Module = _stacked_classes[cls].adopt(module)  # type: ignore[attr-defined]
    return stacked


def stackable(blocks: Sequence[nn.Module]) -> bool:
    return all(
        isinstance(b, Fused) and not isinstance(b, FusedSharing) and b.runner.with_mlp
        for b in blocks
    )


class Stacked(Adopting):
    """Mixed into the class of the module that calls the blocks."""

    def __call__(self, inputs: Any, cache: Any = None, *args: Any, **options: Any) -> Any:
        out = self._of_all(inputs, cache, *args, **options)
        answers = getattr(cache[0], "answers", None) if isinstance(cache, list) and cache else None
        return out if answers is None else out[:answers]

    def _of_all(self, inputs: Any, cache: Any, *args: Any, **options: Any) -> Any:
        blocks = self["layers"]
        if (
            isinstance(cache, list)
            and len(cache) == len(blocks)
            and all(hasattr(c, "rows") for c in cache)
            and not self.__dict__.get("_unforeseen")
            and stackable(blocks)
            and not blocks[0].runner.sharded
        ):
            run = Together(blocks, cache)
            token = RUN.set(run)
            try:
                out = super().__call__(inputs, cache, *args, **options)
                run.end()
                return out
            except Unforeseen:
                self.__dict__["_unforeseen"] = True
            finally:
                RUN.reset(token)
        return super().__call__(inputs, cache, *args, **options)


class Unforeseen(Exception):
    """A block was not called as it would be if nothing happened between the blocks."""


class Together:
    """One call of a model: what its blocks are to do, and what they gave."""

    def __init__(self, blocks: Sequence[Fused], caches: Sequence[Any]) -> None:
        self._blocks, self._caches = blocks, caches
        self._next = 0  # the block to be called
        self._alone = False  # each block has to run by itself
        self._mask: Any = None
        self._h: mx.array | None = None
        self._slots: list[Slots] = []

    def take(self, block: Fused, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
        if self._alone:
            return None
        i, self._next = self._next, self._next + 1
        foreseen = i < len(self._blocks) and block is self._blocks[i] and cache is self._caches[i]
        if i == 0:
            self._alone = not foreseen or not self._compute(x, mask)
        elif not foreseen or x is not self._h or mask is not self._mask:
            raise Unforeseen
        return self._h

    def end(self) -> None:
        """Note that the caches are longer."""
        if self._alone or self._next == 0:
            return
        if self._next < len(self._blocks):
            raise Unforeseen
        for slots in self._slots:
            slots.advance()

    def _compute(self, x: mx.array, mask: Any) -> bool:
        """Whether the blocks can run as one."""
        if not (mask is None or isinstance(mask, str)):
            return False
        self._mask = mask
        natives, given = [], []
        for block, cache in zip(self._blocks, self._caches, strict=True):
            parts = block.runner.parts(block, x)
            slots = slots_of(cache, x.shape[1]) if isinstance(parts, Native) else None
            if slots is None or not isinstance(parts, Native):
                return False
            self._slots.append(slots)
            natives.append(parts)
            given.append((*slots.arrays(), slots.places, *map(packing, slots.formats)))
        ext = natives[0].ext
        self._h = ext.block_stack(
            [n.block for n in natives], x, given, mask or "", natives[0].slots
        )
        return self._h is not None
