"""The tokens of one answer on the CPU, where a step of all blocks is one node of the graph.

mlx-lm's generator has one token in flight while the next is built. Here a token is known before the
next step, so a step can also read guesses (guesses.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from ..kv.rows import Caches, cut, joined, ragged
from ..nn.stack import runs_as_one
from ..ops import native
from .guesses import LONGEST, Lookup, smoothed, worthwhile

SLICE = 512  # tokens of a prompt that are read at a time
ROOM = 1024  # tokens by which caches grow
FIRST = 0.25  # of a step, what a row more is taken to cost before any was read

Floats = NDArray[np.float32]
Sampler = Callable[[mx.array], mx.array]  # log-probabilities [1, V] -> tokens [1]


def can_step(model: nn.Module, caches: Caches) -> bool:
    """Whether `tokens` is for this model and its caches."""
    plain = all(isinstance(c, KVCache) for c in caches)
    return native.active() is not None and plain and runs_as_one(model)


def tokens(
    model: nn.Module,
    prompt: Sequence[int],
    caches: Caches,
    most: int,
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """Up to `most` tokens after a prompt, of which `caches` hold what came before it.

    Without a `sampler` they are the likeliest ones.

    They are those of mlx-lm's generator with the same sampler, and do not depend on guesses.
    """
    for cache in caches:
        cache.step = (len(prompt) + ROOM - 1) // ROOM * ROOM
    for begin in range(0, len(prompt) - 1, SLICE):
        part = prompt[begin : min(begin + SLICE, len(prompt) - 1)]
        model(mx.array([list(part)]), cache=caches)
        mx.eval([c.state for c in caches])
    for cache in caches:
        cache.step = ROOM
    lookup, one = Lookup(prompt), joined([caches], settled=True)
    begin, token, made = int(caches[0].offset), prompt[-1], 0
    step = row = 0.0  # seconds of a step without guesses, and of each that is read
    while made < most:
        worth = worthwhile(1, step, row or FIRST * step)
        guess = lookup.guess(worth, min(LONGEST, most - made - 1)) if step else []
        started = time.perf_counter()
        batch = mx.array([[each] for each in (token, *guess)])
        together = ragged([caches], [1 + len(guess)]) if guess else one
        logits = np.asarray(model(batch, cache=together)[:, -1].astype(mx.float32))
        taken = time.perf_counter() - started
        if guess:
            row = smoothed(row, max(0.0, taken - step) / len(guess))
        else:
            step = smoothed(step, taken)
        for i, guessed in enumerate((*guess, None)):
            token = _drawn(logits[i], sampler)
            lookup.add(token)
            made += 1
            begin += 1
            yield token
            if token != guessed:
                break
        cut(caches, begin)


def _drawn(logits: Floats, sampler: Sampler | None) -> int:
    """A token by its logits `[V]`. In NumPy: MLX's exponentials take a sixth of a token's time."""
    if sampler is None:
        return int(logits.argmax())
    shifted = logits - logits.max()
    drawn: Any = sampler(mx.array(shifted - np.log(np.exp(shifted).sum()))[None]).item()
    return int(drawn)
