"""Decoder blocks that run as a whole: one node of the graph per block where the extension runs, or
one for all of them (optiq.nn.stack).

A fused block has the class, the children and the parameters of the block it replaces; only
`__call__` differs. Where its parts were replaced (LoRA), its input is being traced (gradients,
compile), or the cache is one of mlx-lm's quantized ones, it runs as the original.

Caches of records (optiq.kv) are read as they are. They have stock classes as bases and

    write(keys, values)   writes vectors
    inputs()              what `ops.quantized_attention` takes: k, v, their formats, ...
    layout                formats `k`, `v`; `sink`, `recent`: tokens that are also kept exact

A cache may also stand for one cache of each row of the batch, its `rows` (optiq.kv.rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..formats import DENSE, Format
from ..models.blocks import Block, Unknown
from ..ops import metal, native
from .adapted import Adapted
from .launched import Launched
from .layers import Adopting
from .parts import PLAIN, Composed, Native, Place
from .sharded import Summed

Cache = Any
CPU_FLOATS = mx.float32, mx.float16  # of the vectors of a cache that a block writes into


class Run(Protocol):
    """One call of a model whose blocks run as one node."""

    def take(self, block: Fused, x: mx.array, mask: Any, cache: Cache) -> mx.array | None:
        """What the last block gives, in place of what this one would; None where it has to run."""


RUN: ContextVar[Run | None] = ContextVar("RUN", default=None)
# Parents, keys and children: child i is what parent i has at key i.
Links = tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]
_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fuse(block: nn.Module, anatomy: Block) -> nn.Module:
    """The fused block that has taken over what `block` holds."""
    cls = type(block)
    if cls not in _fused_classes:
        mixin = FusedSharing if anatomy.shares else Fused
        _fused_classes[cls] = type(f"Fused{cls.__name__}", (mixin, cls), {})
    fused: nn.Module = _fused_classes[cls].adopt(block)  # type: ignore[attr-defined]
    fused.__dict__["_runner"] = Runner(anatomy)
    return fused


class Fused(Adopting):
    """Mixed into the class of the original block."""

    @property
    def runner(self) -> Runner:
        own: Runner = self.__dict__["_runner"]
        return own

    def __call__(self, x: mx.array, mask: Any = None, cache: Cache = None) -> mx.array:
        run = RUN.get()
        if run is not None and (last := run.take(self, x, mask, cache)) is not None:
            return last
        runner = self.runner
        parts = runner.parts(self, x)
        if parts is None or _foreign(parts, cache):
            out: mx.array = super().__call__(x, mask, cache)
            return out
        h = _attend(parts, x, mask, cache, runner.with_mlp)
        return h if runner.with_mlp else runner.feed_forward(self, h)


class FusedSharing(Fused):
    """Mixed into the class of a block of Gemma 4."""

    def __call__(  # type: ignore[override]
        self,
        x: mx.array,
        mask: Any = None,
        cache: Cache = None,
        per_layer_input: mx.array | None = None,
        shared_kv: tuple[mx.array, mx.array] | None = None,
        offset: Any = None,
    ) -> tuple[mx.array, tuple[mx.array, mx.array], Any]:
        parts = self.runner.parts(self, x)
        if parts is None or _foreign(parts, cache):
            out: tuple[mx.array, tuple[mx.array, mx.array], Any] = super(Fused, self).__call__(
                x, mask, cache, per_layer_input, shared_kv, offset
            )
            return out
        offset = 0 if cache is None else mx.array(cache.offset)
        k: Any
        v: Any  # a block that shares them takes them as they are
        if isinstance(parts, Native) and hasattr(cache, "rows"):
            q, k, v = parts.project(x, offset)
            k, v = cache.update_and_fetch(k, v)
            h = parts.attend_each(x, q, *cache.fetched)
        else:
            h, k, v = _run_sharing(parts, x, mask, cache)
        if per_layer_input is not None and self.per_layer_input_gate is not None:
            gate = nn.gelu_approx(self.per_layer_input_gate(h)) * per_layer_input
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gate))
        return h * self.layer_scalar, (k, v), offset


def _foreign(parts: Native | Composed, cache: Cache) -> bool:
    """Whether only the original block can use the cache: mlx-lm's quantized one; caches of each
    row where it is not the extension that attends."""
    return hasattr(cache, "bits") or (hasattr(cache, "rows") and not isinstance(parts, Native))


class Runner:
    """The anatomy of a block, and its parts made ready when they are first used."""

    def __init__(self, anatomy: Block) -> None:
        self.anatomy = anatomy
        self.with_mlp = anatomy.mlp is not None
        self._parts: Native | Composed | None = None
        self._ext: Any = None
        self.links: Links | None = None
        self._intact: Callable[..., bool] = intact

    def __deepcopy__(self, memo: Any) -> Runner:
        return Runner(self.anatomy)

    def __reduce__(self) -> Any:
        return Runner, (self.anatomy,)

    def parts(self, block: nn.Module, x: mx.array) -> Native | Composed | None:
        """None where the original has to run: around foreign layers, and for traced inputs."""
        ext = native.active()
        if ext is not None and (x.dtype != mx.float32 or ext.traced(x)):
            return None
        if self._ext is not ext or self.links is None or not self._intact(*self.links):
            # Also anew after weights were loaded or converted.
            self._ext, self._intact, self.links = ext, intact, links(block, self.anatomy)
            try:
                self._parts = make_parts(block, self.anatomy)
            except (Unknown, ValueError, KeyError):
                self._parts = None
            if isinstance(self._parts, Native) and self.links is not None:
                self._parts.block.watch(self.links[2])
                self._intact = self._parts.block.unchanged
        return self._parts

    def feed_forward(self, block: nn.Module, h: mx.array) -> mx.array:
        """The second half of a block whose MLP is not a plain one."""
        norms = self.anatomy.norms
        y = block[norms.mlp_in](h) if norms.mlp_in else h
        y = block[self.anatomy.feed_forward](y)
        y = block[norms.mlp_post](y) if norms.mlp_post else y
        y = y if self.anatomy.gain == 1.0 else y * self.anatomy.gain
        return mx.add(h, y)


def _attend(
    parts: Native | Composed, x: mx.array, mask: Any, cache: Cache, with_mlp: bool
) -> mx.array:
    rows = x.shape[1]
    if isinstance(parts, Launched) and (h := _launched(parts, x, mask, cache)) is not None:
        return h
    if isinstance(parts, Native):
        if cache is None:
            return parts.step(x, (), (), [Place(0, rows, 0, rows)], mask, with_mlp)[0]
        if (slots := slots_of(cache, rows)) is not None:
            h, *stored = parts.step(
                x, *slots.arrays(), slots.places, mask, with_mlp, slots.formats
            )  # fmt: skip
            slots.store(stored)
            return h
    if isinstance(parts, Native) and hasattr(cache, "rows"):  # some have to grow or turn over
        each = []
        for row, own, m, c in cache.each(x, mask):
            with parts.only(row):
                each.append(_attend(parts, own, m, c, with_mlp))
        return mx.concatenate([h.reshape(-1, *x.shape[1:]) for h in each])
    if _of_records(cache):
        q, k, v = parts.project(x, cache.offset)
        cache.write(k, v)
        return parts.attend(x, q, mask=mask, mlp=with_mlp, **cache.inputs())
    return _run(parts, x, mask, cache, with_mlp)[0]


def _run_sharing(
    parts: Native | Composed, x: mx.array, mask: Any, cache: Cache
) -> tuple[mx.array, mx.array, mx.array]:
    """The block, and the keys and values that it saw."""
    if isinstance(parts, Launched) and not _of_records(cache):
        h = _launched(parts, x, mask, cache)
        if h is not None:
            keys = min(cache.offset, cache.keys.shape[2])
            return h, cache.keys[:, :, :keys], cache.values[:, :, :keys]
    return _run(parts, x, mask, cache, with_mlp=True)


def _launched(parts: Launched, x: mx.array, mask: Any, cache: Cache) -> mx.array | None:
    """The block in few launches, into its cache; None where it cannot be."""
    if mask is not None or cache is None or x.shape[1] > 1:
        return None
    slots = slots_of(cache, 1, (x.dtype,))
    if slots is None:
        return None
    stored = parts.step(x, cache.keys, cache.values, slots.places[0], slots.formats)
    if stored is None:
        return None
    h, *caches = stored
    slots.store(caches)
    return h


@dataclass(frozen=True)
class Slots:
    """Where the new rows of a block go: caches into which the extension may itself write."""

    caches: Sequence[Cache]
    places: list[Place]
    formats: tuple[Format, Format]

    def arrays(self) -> tuple[list[mx.array], list[mx.array]]:
        """Keys and values of the caches."""
        return [c.keys for c in self.caches], [c.values for c in self.caches]

    def store(self, stored: Sequence[mx.array]) -> None:
        """Keep what a step gave: keys and values in turn."""
        for c, keys, values in zip(self.caches, stored[::2], stored[1::2], strict=True):
            c.keys, c.values = keys, values
        self.advance()

    def advance(self) -> None:
        """Note that the caches hold the new rows."""
        for c, place in zip(self.caches, self.places, strict=True):
            c.offset = place.position + place.rows
            if isinstance(c, RotatingKVCache):
                c._idx = place.start + 1


def slots_of(cache: Cache, rows: int, floats: Sequence[mx.Dtype] = CPU_FLOATS) -> Slots | None:
    """None where a cache has to be asked, or has to make room first, or where its vectors are of
    another type."""
    caches = getattr(cache, "rows", (cache,))
    formats = formats_in_place(caches, floats)
    if formats is None:
        return None
    places = []
    for c, own in zip(caches, getattr(cache, "lengths", [rows] * len(caches)), strict=True):
        place = _place(c, own)
        if place is None:
            return None
        places.append(place)
    return Slots(caches, places, formats)


def formats_in_place(
    caches: Sequence[Cache], floats: Sequence[mx.Dtype] = CPU_FLOATS
) -> tuple[Format, Format] | None:
    """Those of caches into which a block may itself write; None where one of them has to do it."""
    formats = {_in_place(c, floats) for c in caches}
    return formats.pop() if len(formats) == 1 else None


def _of_records(cache: Cache) -> bool:
    return hasattr(cache, "inputs") and hasattr(cache, "layout")


def _in_place(cache: Cache, floats: Sequence[mx.Dtype]) -> tuple[Format, Format] | None:
    """The formats of a cache into which a block may itself write rows by the rules of its stock
    class; None where the cache has to do it.
    """
    if not _of_records(cache):
        stock = type(cache) in (KVCache, RotatingKVCache) or hasattr(cache, "blocks_may_write")
        there = stock and cache.keys is not None and cache.keys.dtype in floats
        return PLAIN if there else None
    layout = cache.layout
    if cache.keys is None or layout.sink or layout.recent or DENSE in (layout.k, layout.v):
        return None
    return (layout.k, layout.v) if isinstance(cache, (KVCache, RotatingKVCache)) else None


def _place(cache: Cache, rows: int) -> Place | None:
    """Where the stock class would put so many new rows; None where it would make room first."""
    start, size = cache.offset, cache.keys.shape[2]
    if isinstance(cache, KVCache):
        return Place(start, start + rows, start, rows) if start + rows <= size else None
    whole = size == cache.max_size
    if rows > 1 or not (whole or start < size < cache.max_size):
        return None
    at = cache.keep if whole and cache._idx == size else cache._idx
    return Place(at, min(start + 1, size), start, 1)


def _run(
    parts: Native | Composed, x: mx.array, mask: Any, cache: Cache, with_mlp: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """The block around a cache of any kind, and the keys and values that it saw."""
    q, k, v = parts.project(x, 0 if cache is None else cache.offset)
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    return parts.attend(x, q, k, v, mask, with_mlp), k, v


def make_parts(block: nn.Module, anatomy: Block) -> Native | Composed:
    """Raises Unknown or ValueError for layers that cannot be fused."""
    if ext := native.active():
        return Native(ext, block, anatomy)
    if metal.enabled():
        with suppress(Unknown):
            return Launched(block, anatomy)
    return Composed(block, anatomy)


def launchable(block: nn.Module, anatomy: Block) -> bool:
    """Whether a GPU has kernels for all of the block."""
    try:
        Launched(block, anatomy)
    except Unknown:
        return False
    return True


def links(block: nn.Module, anatomy: Block) -> Links | None:
    """How the block leads to all its parts and their arrays; None if one is not there."""
    a, m, norms = anatomy.attention, anatomy.mlp, anatomy.norms
    paths = [*a.qkv, a.out, a.q_norm, a.k_norm, a.sinks, norms.attention_in, norms.attention_post]
    paths += [*m.gate_up, m.down, norms.mlp_in, norms.mlp_post] if m else []
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for path in paths:
        at: Any = block
        for key in path.split(".") if path else ():
            if not isinstance(at, dict) or key not in at:
                return None
            found[id(at), key] = (at, key, at[key])
            at = at[key]
        if isinstance(at, Adapted | Summed):
            found[id(at), "linear"] = (at, "linear", at["linear"])
            at = at["linear"]
        if isinstance(at, nn.Module):
            arrays = {k: v for k, v in at.items() if isinstance(v, mx.array)}
            found |= {(id(at), k): (at, k, v) for k, v in arrays.items()}
    parents, keys, children = zip(*found.values(), strict=True)
    return parents, keys, children


def intact(parents: Any, keys: Any, children: Any) -> bool:
    """Whether all links are as they were, in Python."""
    return all(dict.get(p, k) is c for p, k, c in zip(parents, keys, children, strict=True))
