"""The caches of one sequence in pieces: rows of a span of tokens, and states at one length.

A cache of full attention has a row for each token, which depends on nothing that comes later: it
can be cut anywhere, and joined. A state is what cannot be cut: a sliding window, a recurrent state,
tokens kept exactly beside their records. It is good at its length alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from .caches import KVRecords
from .codec import Arrays, describe, read, restore
from .half import HalfKVCache

_ROWS = ("keys", "values")


@dataclass(frozen=True)
class Piece:
    """`header` is JSON that refers to `arrays` (see `codec`), with an entry for each cache."""

    header: dict[str, Any]
    arrays: Arrays

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays.values())

    def rows(self, begin: int, end: int) -> Piece:
        """Some of the rows of a span."""
        if all(end - begin == x.shape[2] for x in self.arrays.values()):
            return self
        return Piece(self.header, {k: x[:, :, begin:end] for k, x in self.arrays.items()})

    def alone(self) -> Piece:
        """The same in memory of its own, so that it does not hold what it is a part of."""
        return Piece(self.header, {k: mx.contiguous(x) for k, x in self.arrays.items()})


def divisible(caches: Sequence[Any]) -> bool:
    """Whether spans are all there is, so that any length can be restored."""
    return all(_has_rows(c) and not _exact(c) for c in _leaves(caches))


def length(caches: Sequence[Any]) -> int | None:
    """How many tokens `caches` hold, where one of them says so."""
    return next((int(c.offset) for c in _leaves(caches) if hasattr(c, "offset")), None)


def span(caches: Sequence[Any], begin: int, end: int) -> Piece:
    """The rows of tokens `begin` to `end`, not evaluated yet."""
    header: dict[str, Any] = {}
    arrays: Arrays = {}
    for name, cache in _named(caches):
        if _has_rows(cache) and cache.keys is not None:
            arrays |= {f"{name}.{rows}": getattr(cache, rows)[:, :, begin:end] for rows in _ROWS}
            header[name] = describe(getattr(cache, "vectors", None), name, arrays)
    return Piece(header, arrays).alone()


def state(caches: Sequence[Any]) -> Piece:
    """What spans leave out, not evaluated yet."""
    arrays: Arrays = {}
    header = {
        name: describe(cache, name, arrays, without=_ROWS if _has_rows(cache) else ())
        for name, cache in _named(caches)
    }
    return Piece(header, arrays).alone()


def join(
    caches: Sequence[Any], spans: Sequence[Piece], state: Piece | None, tokens: int, room: int = 0
) -> None:
    """Fill the empty `caches` of a model with `tokens` tokens, the rows of all `spans`.

    Rows of zeros follow them, `room` in all, so that what is read next needs no other copy. Raises
    KeyError, TypeError, ValueError or AttributeError where the pieces are not of these caches.
    """
    for name, cache in _named(caches):
        if state is not None:
            restore(cache, state.header[name], state.arrays)
        if not _has_rows(cache) or not spans or name not in spans[0].header:
            continue
        for rows in _ROWS:
            setattr(cache, rows, _joined([s.arrays[f"{name}.{rows}"] for s in spans], room))
        cache.offset = tokens
        if isinstance(cache, KVRecords):
            cache.vectors = read(spans[0].header[name], {})


def _joined(parts: list[mx.array], room: int) -> mx.array:
    if room:
        batch, heads, _, width = parts[0].shape
        parts = [*parts, mx.zeros((batch, heads, room, width), dtype=parts[0].dtype)]
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _named(caches: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return ((str(i), cache) for i, cache in enumerate(_leaves(caches)))


def _leaves(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _has_rows(cache: Any) -> bool:
    return type(cache) in (KVCache, HalfKVCache, KVRecords)


def _exact(cache: Any) -> bool:
    """Whether tokens are kept exactly beside their records."""
    return isinstance(cache, KVRecords) and bool(cache.layout.sink or cache.layout.recent)
