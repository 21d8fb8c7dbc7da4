"""Decoding off a cache in which a single layer's keys or values are quantized.

A context is read once with full-precision caches, and what every layer writes to its cache is
noted, chunk by chunk, up to the last tokens, its tail. To probe a layer, what was noted is written
to a cache of the probed format as the prefill would have done, and the tail is run from that layer
on: it reads the context back from quantized records, and its own tokens too. What the layers before
it gave is the same as ever and is not computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ...base.modules import leaf_modules
from ...models.blocks import whole_text_caches
from ...models.roles import Module, Role, role_of
from ...nn.replay import ALL, Pass, Replay, Tape, arrays

# Tokens of a prefill step: scores of a chunk against all keys are in memory at once.
CHUNK = 512

Written = list[tuple[mx.array, mx.array]]  # keys and values of each update


@dataclass
class Context:
    """A context that was read. Lists are by cache, but `tail`: by chunk of the tail."""

    caches: list[Any]  # as they were before the tail
    written: list[Written]
    tail: list[Tape]


class Decoder(Replay):
    """Runs `model` with caches; a context manager like `Replay`.

    `owners[i]` is the number of the first block call that is given the i-th cache.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, heads(model))
        self.owners: dict[int, int] = {}
        self._caches: Sequence[Any] = ()
        self._sharing = whole_text_caches(model) is not None

    def __enter__(self) -> Decoder:
        super().__enter__()
        self._caches = make_prompt_cache(self.model)
        self.run(mx.array([[0]]), (), ALL, list(self._caches))  # for `owners`; nothing is computed
        return self

    def read(self, tokens: Sequence[int], tail: int, *, step: int = CHUNK) -> Context:
        """Read a context whose last `tail` tokens are the tail, decoded `step` at a time."""
        start = len(tokens) - tail
        caches = make_prompt_cache(self.model)
        self._caches, classes = caches, [type(cache) for cache in caches]
        written: list[Written] = [[] for _ in caches]
        for cache, notes in zip(caches, written, strict=True):
            if hasattr(cache, "update_and_fetch"):
                cache.__class__ = _noting(type(cache), notes)
        for part in _chunks(tokens[:start], CHUNK):
            hidden = self.run(mx.array([part]), (), ALL, caches).hidden
            mx.eval(hidden, states(caches), written)
        for cache, kind in zip(caches, classes, strict=True):
            cache.__class__ = kind
        going = clones(caches)
        return Context(
            caches, written, [self.record(part, going) for part in _chunks(tokens[start:], step)]
        )

    def decode(self, context: Context, index: int, cache: Any) -> list[mx.array]:
        """The inputs of the head [1, T, d] of each chunk of the tail, with `cache` as index-th.

        It is empty at first, and is written to.
        """
        for keys, values in context.written[index]:
            cache.update_and_fetch(keys, values)
        # Where later blocks read the caches of earlier ones, all run.
        first = 0 if self._sharing else self.owners[index]
        caches = [
            copy.deepcopy(c) if self.owners.get(i, -1) >= first else _placed(c)
            for i, c in enumerate(context.caches)
        ]
        caches[index] = cache
        found = []
        for tape in context.tail:
            hidden = self.run(tape.tokens, tape.outputs, range(first, len(self.order)), caches)
            mx.eval(hidden.hidden, states(caches))
            found.append(hidden.hidden)
            for i, c in enumerate(caches):
                if self.owners.get(i, -1) < first and hasattr(c, "offset"):
                    c.offset += tape.tokens.shape[1]  # masks are made from where it is
        return found

    def run(
        self,
        tokens: mx.array,
        outputs: Sequence[Any],
        live: range,
        cache: list[Any] | None = None,
    ) -> Pass:
        """As `Replay.run`; where blocks read one another's caches, none of them is ever empty."""
        if cache is None and self._sharing:
            cache = clones(self._caches)
        return super().run(tokens, outputs, live, cache)

    def visit(self, index: int, inner: nn.Module, args: Any, kwargs: Any) -> Any:
        given = {id(value) for value in (*args, *kwargs.values())}
        for i, cache in enumerate(self._caches):
            if id(cache) in given:
                self.owners.setdefault(i, self._call)
        return super().visit(index, inner, args, kwargs)


def heads(model: nn.Module) -> list[Module]:
    """The module that makes logits, of a model that may be quantized, as `Replay` takes it."""
    inside = {id(m) for layer in model.layers for m in layer.modules()}
    leaves = leaf_modules(model).items()
    outside = [(path, m) for path, m in leaves if id(m) not in inside and "weight" in m]
    for path, m in outside:
        if role_of(path) is Role.HEAD:
            return [Module(path, Role.HEAD, path, tuple(m.weight.shape), None)]
    for path, m in outside:
        if hasattr(m, "as_linear"):
            shape = tuple(m.weight.shape)
            return [Module(path, Role.EMBEDDING, path, shape, None, tied=True)]
    return []


def states(caches: Sequence[Any]) -> list[mx.array]:
    """All arrays that caches hold."""
    return arrays([cache.state for cache in caches])


def clones(caches: Sequence[Any]) -> list[Any]:
    """Caches of their own; arrays are copied when they are written to."""
    return [copy.deepcopy(cache) for cache in caches]


def _placed(cache: Any) -> Any:
    """A cache that knows its place but holds nothing: no block reads it."""
    placed = copy.copy(cache)
    for name in ("keys", "values"):
        if hasattr(placed, name):
            setattr(placed, name, None)
    return placed


def _noting(kind: type, notes: Written) -> type:
    """The class `kind`, but its instance writes down what it is given."""

    class Noting(kind):  # type: ignore[misc]
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            notes.append((copy.copy(keys), copy.copy(values)))
            return super().update_and_fetch(keys, values)

    return Noting


def _chunks(tokens: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens), size):
        yield list(tokens[start : start + size])
