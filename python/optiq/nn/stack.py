"""All decoder blocks of a model as one node of the graph, in a step of several sequences.

The model's own code stays in charge: it embeds, makes masks, calls its blocks in turn and ends with
its norm. But the first block computes all of them, over the caches that the model was called with,
and the others hand on what they are given. That the caches are longer is only noted at the end,
when each block was called as was foreseen. A model that calls them otherwise runs again, block by
block, and is left alone from then on. Where it does nothing but embed before its blocks and norm
after them, as its first step shows to the bit, both are in the node and its code is not run.

The node has no outputs but the last block's: MLX's cost of an output grows with their number, and
there would be two for each block and sequence. So it writes into the caches when it is evaluated,
and until then nobody may read them. That holds for `optiq.kv.rows`, whose caches are read by none
but the next step; a cache that something else holds is left to the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..ops import native
from ..ops.attention import packing
from .blocks import RUN, Fused, FusedSharing, formats_in_place
from .layers import Adopting, QuantizedEmbedding, RMSNorm, arrays_of
from .parts import Native

_stacked_classes: dict[type[nn.Module], type[nn.Module]] = {}


def stack(module: nn.Module) -> nn.Module:
    """The module that has taken over what `module` holds, with blocks as its `layers`."""
    cls = type(module)
    if cls not in _stacked_classes:
        _stacked_classes[cls] = type(f"Stacked{cls.__name__}", (Stacked, cls), {})
    stacked: nn.Module = _stacked_classes[cls].adopt(module)  # type: ignore[attr-defined]
    if type(norm := stacked.get("norm")) is nn.RMSNorm:
        stacked["norm"] = RMSNorm.adopt(norm)
    stacked.__dict__["_ends"] = Ends()
    return stacked


def stackable(blocks: Sequence[nn.Module]) -> bool:
    return all(
        isinstance(b, Fused) and not isinstance(b, FusedSharing) and b.runner.with_mlp
        for b in blocks
    )


def runs_as_one(model: nn.Module) -> bool:
    """Whether steps over `optiq.kv.rows` are one node."""
    found = [m for m in model.modules() if isinstance(m, Stacked)]
    return len(found) == 1 and found[0].as_one


class Stacked(Adopting):
    """Mixed into the class of the module that calls the blocks."""

    @property
    def as_one(self) -> bool:
        """Whether its blocks can run as one node."""
        blocks = self["layers"]
        if not stackable(blocks) or self.__dict__.get("_unforeseen"):
            return False
        x = mx.zeros((1, 1, 1))
        return all(isinstance(b.runner.parts(b, x), Native) for b in blocks)

    def __call__(self, inputs: Any, cache: Any = None, *args: Any, **options: Any) -> Any:
        out = self._of_all(inputs, cache, *args, **options)
        answers = getattr(cache[0], "answers", None) if isinstance(cache, list) and cache else None
        return out if answers is None else out[:answers]

    def _of_all(self, inputs: Any, cache: Any, *args: Any, **options: Any) -> Any:
        blocks = self["layers"]
        if (
            isinstance(cache, list)
            and len(cache) == len(blocks)
            and hasattr(cache[0], "rows")
            and not self.__dict__.get("_unforeseen")
        ):
            run = Together(blocks, cache)
            ends: Ends = self.__dict__["_ends"]
            alone = all(a is None for a in (*args, *options.values()))
            whole = run.whole(ends.of(self), inputs) if alone else None
            if whole is not None and ends.right:
                run.advance()
                return whole
            if whole is not None:
                mx.eval(whole)  # which lets go of the caches
            token = RUN.set(run)
            try:
                out = super().__call__(inputs, cache, *args, **options)
                run.end()
                if whole is not None:
                    ends.right = bool(mx.array_equal(whole, out))
                return out
            except Unforeseen:
                self.__dict__["_unforeseen"] = True
            finally:
                RUN.reset(token)
        return super().__call__(inputs, cache, *args, **options)


class Unforeseen(Exception):
    """A block was not called as it would be if nothing happened between the blocks."""


class Ends:
    """The embedding before the blocks and the norm after them, if a model has nothing else there.

    `right`: whether one node with the blocks gave the bits of the model's own code; None before it
    was tried.
    """

    def __init__(self) -> None:
        self.right: bool | None = None
        self._native: Any = None
        self._ext: Any = None

    def __deepcopy__(self, memo: Any) -> Ends:
        return Ends()

    def __reduce__(self) -> Any:
        return Ends, ()

    def of(self, module: nn.Module) -> Any:
        """Those of a module, for the extension; None where it has others, or more."""
        ext, embedding, norm = native.active(), module.get("embed_tokens"), module.get("norm")
        if ext is None or type(norm) is not RMSNorm or type(embedding) is not QuantizedEmbedding:
            return None
        if embedding.mode != "affine":
            return None
        arrays = *arrays_of(embedding), norm["weight"]
        if self._ext is not ext or not self._native.made_of(arrays):
            bits = embedding.group_size, embedding.bits
            self._ext, self.right = ext, None
            self._native = ext.ModelEnds(*arrays[:3], *bits, arrays[3], norm.eps)
        return None if self.right is False else self._native


class Prepared:
    """The blocks of a model over the caches of some sequences, for as many steps as they take."""

    def __init__(self, blocks: Sequence[Fused], caches: Sequence[Any]) -> None:
        self.blocks = list(blocks)
        self.ext = native.active()
        self.stack: Any = None  # where the blocks have to run one by one
        self.unmasked = False  # a row sees all of its cache
        given, x = [], mx.zeros((1, 1, 1))
        if not stackable(blocks) or not all(hasattr(c, "rows") for c in caches):
            return
        for block, cache in zip(blocks, caches, strict=True):
            parts = block.runner.parts(block, x)
            formats = formats_in_place(cache.rows)
            if formats is None or not isinstance(parts, Native):
                return
            rotating = [isinstance(c, RotatingKVCache) for c in cache.rows]
            packings = tuple(map(packing, formats))
            given.append((parts.block, block.runner.links, cache.rows, rotating, packings))
            self.natives = parts
        self.stack = self.natives.ext.PreparedStack(given)
        self.unmasked = all(isinstance(c, KVCache) for cache in caches for c in cache.rows)

    def holds(self, blocks: Sequence[Fused], settled: bool) -> bool:
        """Whether these are still the blocks, with the parts that they had; if they are `settled`,
        those are not looked at."""
        if self.stack is None or self.ext is not native.active():
            return False
        same = len(blocks) == len(self.blocks) and all(map(is_, blocks, self.blocks))
        return same and (settled or bool(self.stack.unchanged()))


class Together:
    """One call of a model: what its blocks are to do, and what they gave."""

    def __init__(self, blocks: Sequence[Fused], caches: Sequence[Any]) -> None:
        self._blocks, self._caches = blocks, caches
        self._next = 0  # the block to be called
        self._alone = False  # each block has to run by itself
        self._mask: Any = None
        self._h: mx.array | None = None
        self._stack: Any = None

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

    def whole(self, ends: Any, tokens: mx.array) -> mx.array | None:
        """What the model gives for a token of each row, with its `ends` and blocks in one node.
        None where they cannot run as one, or where it has no `ends`."""
        ext = native.active()
        if ext is None or ends is None or ext.traced(tokens) or tokens.shape[1:] != (1,):
            return None
        prepared = self._prepare()
        return self._step(prepared, tokens, "", ends) if prepared.unmasked else None

    def end(self) -> None:
        """Note that the caches are longer."""
        if self._alone or self._next == 0:
            return
        if self._next < len(self._blocks):
            raise Unforeseen
        self.advance()

    def advance(self) -> None:
        self._stack.advance()

    def _compute(self, x: mx.array, mask: Any) -> bool:
        """Whether the blocks can run as one."""
        ext = native.active()
        if ext is None or x.dtype != mx.float32 or ext.traced(x):
            return False
        if not (mask is None or isinstance(mask, str)):
            return False
        prepared = self._prepare()
        if prepared.stack is None:
            return False
        self._mask = mask
        self._h = self._step(prepared, x, mask or "")
        return self._h is not None

    def _prepare(self) -> Prepared:
        first = self._caches[0]
        prepared: Prepared | None = getattr(first, "prepared", None)
        if prepared is None or not prepared.holds(self._blocks, getattr(first, "settled", False)):
            prepared = first.prepared = Prepared(self._blocks, self._caches)
        return prepared

    def _step(self, prepared: Prepared, x: mx.array, mask: str, *ends: Any) -> mx.array | None:
        first, self._stack = self._caches[0], prepared.stack
        lengths = getattr(first, "lengths", None) or [x.shape[1]] * len(first.rows)
        out: mx.array | None = prepared.stack.step(x, lengths, mask, prepared.natives.slots, *ends)
        return out
