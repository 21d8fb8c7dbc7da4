"""What the engine has to know of a model before it takes requests, found by running it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from ...base.memory import available_memory
from ...base.notice import notice
from ...base.text import one_line
from ...errors import ServeError
from ...kv import route
from ...kv.half import empty_caches
from ...kv.rows import Caches, can_forget, cuttable, readable_beside, together
from ...ops import metal

GRID = 256  # tokens of a slice, for models whose results depend on where slices end
FEW = 16  # rows up to which a product with dense weights gives each row the same bits
TRIED = 64  # tokens of the prompt that is measured
SLICE = 512  # tokens of a slice whose activations are reserved
GROWTH = 256  # tokens by which caches grow
CONTEXT = 32768  # of a model that does not say


@dataclass(frozen=True)
class Measured:
    """Sizes and seconds.

    A sequence of n tokens takes `fixed_bytes` + `token_bytes` * min(n, window) of each cache, the
    `windows` as (bytes per token, most tokens or 0). `grid` is 0 where a prompt may be cut anywhere
    with the same result. `states`: caches that a step leaves to be evaluated. At most `together`
    sequences share a step, and a prompt can be read `beside` them in the same one. With
    `drafts` they can also read guesses there, and forget what was wrong.
    """

    make_caches: Callable[[], Caches]
    context: int
    vocabulary: int
    windows: tuple[tuple[int, int], ...]
    fixed_bytes: int
    weight_bytes: int
    work_bytes: int
    grid: int
    states: bool
    together: int
    beside: bool
    drafts: bool
    step_seconds: float
    token_seconds: float

    def nbytes(self, tokens: int) -> int:
        """Bytes of the caches of one sequence."""
        grown = (tokens + GROWTH - 1) // GROWTH * GROWTH
        each = (
            size * (min(grown, most + GROWTH) if most else grown) for size, most in self.windows
        )
        return self.fixed_bytes + sum(each)

    def room(self, memory: int | None, beside: int) -> int:
        """Bytes for caches when all may take `memory`, or most of what is free, with `beside` bytes
        for others.

        Raises ServeError where that is too little.
        """
        if memory is None:
            room = available_memory() * 3 // 4 - self.work_bytes - beside
            return max(room, self.nbytes(GROWTH))
        room = memory - self.weight_bytes - self.work_bytes - beside
        if room < self.nbytes(GROWTH):
            needed = memory - room + self.nbytes(GROWTH)
            raise ServeError(
                f"the server needs {needed / 1e9:.2f} GB for this model, --memory allows "
                f"{memory / 1e9:.2f}; allow more, or serve a smaller model"
            )
        return room


def measure(model: nn.Module, running: int, context: int | None = None) -> Measured:
    """Prepare `model` for so many sequences at a time, in place, and measure it.

    Raises ServeError.
    """
    for attempt in (1, 2):
        try:
            return _measure(model, running, context)
        except Exception as error:
            if attempt == 1 and metal.give_up(error):
                continue
            raise ServeError(f"the model does not run ({one_line(error)})") from error
    raise AssertionError  # not reached


def _measure(model: nn.Module, running: int, context: int | None) -> Measured:
    route(model)
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(x.nbytes for _, x in parameters)

    make = partial(empty_caches, model)
    shared = _together(model, max(2, running), make)  # one alone reads guesses as others' rows
    caches = make()
    prompt = mx.zeros((1, TRIED), dtype=mx.int32)
    mx.eval(model(mx.zeros((1, TRIED), dtype=mx.int32), cache=make()))  # compiles what is compiled
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    model(prompt, cache=caches)
    mx.eval([c.state for c in caches])
    read = time.perf_counter() - started
    work = (mx.get_peak_memory() - active) * (SLICE // TRIED)
    started = time.perf_counter()
    logits = model(prompt[:, :1], cache=caches)
    mx.eval(logits)
    step = time.perf_counter() - started
    leaves = [leaf for cache in caches for leaf in _leaves(cache)]
    kv = [c for c in leaves if hasattr(c, "keys") and c.keys is not None]
    plain = all(isinstance(c, KVCache) for c in leaves)
    grid = 0 if plain and cuttable(model, make) else GRID
    beside = shared > 1 and not grid and readable_beside(model, make)
    return Measured(
        make_caches=make,
        context=context or _context(model),
        vocabulary=int(logits.shape[-1]),
        windows=tuple((token_bytes(c), int(getattr(c, "max_size", 0) or 0)) for c in kv),
        fixed_bytes=sum(int(c.nbytes) for c in leaves if c not in kv),
        weight_bytes=weights,
        work_bytes=work,
        grid=grid,
        states=any(isinstance(c, ArraysCache) for c in leaves),
        together=min(shared, running),
        beside=beside,
        drafts=beside and can_forget(model, make),
        step_seconds=step,
        token_seconds=read / TRIED,
    )


def _together(model: nn.Module, running: int, make: Callable[[], Caches]) -> int:
    """The most sequences up to `running` that can share a step."""
    reason = ""
    for rows in (running, FEW):
        if 1 < rows <= running:
            reason = together(model, rows, make)
            if not reason:
                return rows
    if reason:
        notice(f"each sequence takes its steps alone in this model, which is slower: {reason}")
    return 1


def _leaves(cache: Any) -> list[Any]:
    if isinstance(cache, CacheList):
        return [leaf for inner in cache.caches for leaf in _leaves(inner)]
    return [cache]


def token_bytes(cache: Any) -> int:
    """Of keys and values in all heads."""
    return sum(x.shape[1] * x.shape[3] * x.dtype.size for x in (cache.keys, cache.values))


def _context(model: nn.Module) -> int:
    """Tokens that the model's configuration allows."""
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None)
    for where in (args, text):
        for name in ("max_position_embeddings", "max_seq_len", "seq_length", "model_max_length"):
            value = where.get(name) if isinstance(where, dict) else getattr(where, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return CONTEXT
