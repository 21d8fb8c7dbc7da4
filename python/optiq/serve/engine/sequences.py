"""The caches of all answers, by tickets, and what the model reads and gives over them.

Whatever touches a cache is done here, one call after the other. So several ranks that make the same
calls hold the same sequences (see serve/ranks.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ...kv.rows import Caches, cut, joined, ragged
from .adapters import Adapters, Mounted
from .model import GROWTH, Measured
from .sampling import Floats

log = logging.getLogger("optiq.serve")

GROUPS = 16  # of sequences, whose caches are kept as one


class Prefixes(Protocol):
    """Where caches of prompts are found and kept (see prefix)."""

    def find(self, tokens: Sequence[int], make: Callable[[], Caches]) -> tuple[Caches, int]: ...
    def keep(self, tokens: Sequence[int], caches: Caches, *, reading: bool = False) -> None: ...


@dataclass
class Held:
    """One of them. Its adapter works after `adapted` tokens; `length` are to be read before it
    decodes."""

    caches: Caches
    length: int
    adapter: Mounted | None
    adapted: int


class Sequences:
    """To be used in one thread. `adapters` may be set before the first call."""

    def __init__(self, model: nn.Module, measured: Measured, prefix: Prefixes | None) -> None:
        self.model, self.prefix = model, prefix
        self.adapters: Adapters | None = None
        self._measured = measured
        self._open: dict[int, Held] = {}
        # By the tickets of a group: the caches of its sequences as one.
        self._joined: dict[tuple[int, ...], Caches] = {}

    def open(
        self, ticket: int, tokens: Sequence[int], adapter: Mounted | None = None, adapted: int = 0
    ) -> int:
        """A sequence that will read `tokens`, the last of them as it decodes. How many its caches
        hold already: they are those that hold most. It takes the place of one that is open."""
        self._forget(ticket)
        sequence = Held([], len(tokens) - 1, adapter, adapted)
        sequence.caches, length = self._find(sequence, tokens)
        # Room for the whole prompt at once: growing a long cache copies all of it.
        _grow_by(sequence.caches, len(tokens) + GROWTH)
        self._open[ticket] = sequence
        return length

    def close(self, ticket: int) -> None:
        """Forget a sequence, if it is open."""
        self._forget(ticket)

    def read(self, ticket: int, begin: int, tokens: Sequence[int]) -> None:
        """The tokens from `begin` on, all or some of those that are to be read."""
        sequence = self._open[ticket]
        model = self._model_of([_adapter(sequence, begin)])
        model(mx.array([list(tokens)]), cache=sequence.caches)
        mx.eval([cache.state for cache in sequence.caches])
        self._has_read(sequence, begin + len(tokens))

    def logits(
        self,
        tickets: Sequence[int],
        inputs: Sequence[Sequence[int]],
        reader: int | None = None,
        begin: int = 0,
        tokens: Sequence[int] = (),
    ) -> Floats:
        """`[rows, V]` after each of the `inputs`, which each sequence reads one after the other.
        In the same pass `reader` reads its `tokens` from `begin` on.

        Raises Unbatchable where they cannot do so together.
        """
        group = [self._open[ticket] for ticket in tickets]
        caches = [sequence.caches for sequence in group]
        rows = [[token] for each in inputs for token in each]
        lengths = [len(each) for each in inputs]
        adapters = [s.adapter for s, n in zip(group, lengths, strict=True) for _ in range(n)]
        if reader is not None:
            rows += [[token] for token in tokens]
            adapters += [_adapter(self._open[reader], begin)] * len(tokens)
            together = ragged(caches, [*lengths, len(tokens)], self._open[reader].caches)
        elif any(n > 1 for n in lengths):
            together = ragged(caches, lengths)
        elif len(group) == 1 and not self._measured.beside:
            together = caches[0]  # else one node for all blocks is faster, also for one row
        else:
            together = self._together(tuple(tickets), caches)
        logits = self._model_of(adapters)(mx.array(rows), cache=together)
        logits = logits[:, -1].astype(mx.float32)
        if self._measured.states:
            mx.eval(logits, [cache.state for each in caches for cache in each])
        out = np.asarray(logits)
        if reader is not None:
            self._has_read(self._open[reader], begin + len(tokens))
        return out

    def cut(self, ticket: int, length: int) -> None:
        """Forget what was read after so many tokens."""
        cut(self._open[ticket].caches, length)

    def keep(self, ticket: int, tokens: Sequence[int], reading: bool = False) -> None:
        """The caches of `tokens`, which are all that a sequence has read, for prompts that begin
        with them."""
        sequence = self._open[ticket]
        prefix = self._prefix_of(sequence, len(tokens))
        if prefix is None or not tokens:
            return
        try:
            prefix.keep(tokens, sequence.caches, reading=reading)
        except Exception:
            log.exception("the prefix cache failed; the answer goes on without it")

    def agreed(self, nbytes: int) -> int:
        """How many bytes of caches there is room for."""
        return nbytes

    def _forget(self, ticket: int) -> None:
        self._open.pop(ticket, None)
        self._joined = {key: of for key, of in self._joined.items() if ticket not in key}

    def _find(self, sequence: Held, tokens: Sequence[int]) -> tuple[Caches, int]:
        """Caches that hold most of `tokens`, and how many."""
        make = self._measured.make_caches
        if (prefix := self._prefix_of(sequence, len(tokens))) is not None:
            try:
                caches, length = prefix.find(tokens, make)
                if self.prefix is not None and length < sequence.adapted:
                    return self.prefix.find(tokens[: sequence.adapted + 1], make)
                return caches, length
            except Exception:
                log.exception("the prefix cache failed; the prompt is read as a whole")
        return make(), 0

    def _prefix_of(self, sequence: Held, length: int) -> Prefixes | None:
        """For the first tokens of it: what an adapter has read is not what the model has."""
        adapter = sequence.adapter
        if adapter is not None and self.prefix is not None and length > sequence.adapted:
            return adapter.prefix
        return self.prefix

    def _has_read(self, sequence: Held, end: int) -> None:
        if end == sequence.length:
            _grow_by(sequence.caches, GROWTH)

    def _together(self, tickets: tuple[int, ...], caches: list[Caches]) -> Caches:
        if tickets not in self._joined:
            if len(self._joined) >= GROUPS:
                self._joined.clear()
            self._joined[tickets] = joined(caches, settled=True)
        return self._joined[tickets]

    def _model_of(self, rows: Sequence[Mounted | None]) -> nn.Module:
        """The model for a batch of rows with these adapters."""
        if self.adapters is None:
            return self.model
        in_use = (s.adapter for s in self._open.values() if s.adapter is not None)
        return self.adapters.model(rows, in_use)


def _adapter(sequence: Held, begin: int) -> Mounted | None:
    """Which works from `begin` on; no slice goes over the token where it begins to work."""
    return sequence.adapter if begin >= sequence.adapted else None


def _grow_by(caches: Caches, tokens: int) -> None:
    """The room that these caches make when theirs is used up."""
    for cache in caches:
        if isinstance(cache, KVCache):
            cache.step = (tokens + GROWTH - 1) // GROWTH * GROWTH
