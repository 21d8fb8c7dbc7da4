"""Caches by the tokens they hold, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ....base.notice import notice
from ....errors import KVError
from ....kv import pieces
from ....kv.pieces import Piece
from ....kv.prefix import Key
from .disk import Disk
from .tree import Tokens, Tree

SPAN = 256  # most tokens of a block
LEAST = 16  # tokens; fewer are read as fast as their rows are copied
_STEP = 256  # by which mlx-lm's caches grow

Cache = Any


@dataclass(frozen=True)
class _Found:
    """The pieces of the first `length` tokens."""

    length: int
    spans: list[Piece]
    state: Piece | None


class PrefixCache:
    """Caches of what prompts and answers begin with, of at most `nbytes` bytes.

    All of one `Key`: model, adapter and KV configuration. With a `folder`, they are also stored
    there, in at most `folder_bytes`, and found again after a restart; a folder that another server
    uses for the same key is left alone. To be used in the thread that owns MLX.
    """

    def __init__(
        self, key: Key, nbytes: int, folder: Path | None = None, folder_bytes: int = 0
    ) -> None:
        """Raises ServeError for a folder that cannot be used."""
        self._memory = _Memory(Piece({}, {}), nbytes)
        self._disk: Disk | None = None
        if folder is not None:
            try:
                self._disk = Disk(folder, folder_bytes, key, waiting=nbytes)
            except BlockingIOError:
                notice(f"{folder} is in use by another server; prefixes are kept in memory only")

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._memory.nbytes

    @property
    def entries(self) -> int:
        """Blocks in memory."""
        return len(self._memory)

    @property
    def folder_bytes(self) -> int:
        """Bytes on disk."""
        return self._disk.nbytes if self._disk else 0

    def find(
        self, tokens: Sequence[int], make: Callable[[], list[Cache]]
    ) -> tuple[list[Cache], int]:
        """Caches of the first n of `tokens`, which are the caller's own, and n.

        `make` gives the model's empty caches. At least the last token is left to be read, and n is
        0 where so few tokens are known that reading them is as fast.
        """
        caches, ids = make(), _array(tokens)[:-1]
        divisible = pieces.divisible(caches)
        found = self._in_memory(ids, divisible)
        if self._disk is not None:
            found = self._on_disk(self._disk, ids, divisible, found)
        if found.length < LEAST:
            return caches, 0
        room = len(tokens) - found.length + -len(tokens) % _STEP
        pieces.join(caches, found.spans, found.state, found.length, room)
        return caches, found.length

    def keep(
        self, tokens: Sequence[int], caches: Sequence[Cache], *, reading: bool = False
    ) -> None:
        """Remember `caches`, which hold exactly `tokens` and stay the caller's.

        Rows that are known are not copied again. While the tokens of a prompt are still being read,
        only full blocks are kept: so little is left to copy at its end. Raises KVError for caches
        of another length.
        """
        held = pieces.length(caches)
        if held is not None and held != len(tokens):
            raise KVError(f"{len(tokens)} tokens, but caches of {held}; keep what was read")
        ids = _array(tokens)
        if reading:
            if not pieces.divisible(caches):
                return
            ids = ids[: len(ids) // SPAN * SPAN]
        places = [_Place(tier, ids) for tier in (self._memory, self._disk) if tier is not None]
        for begin, end in _bounds({place.path.length for place in places}, len(ids)):
            piece = _evaluated(pieces.span(caches, begin, end))
            added = [place.add(begin, ids[begin:end].copy(), piece) for place in places]
            if not any(added):
                break
        if not pieces.divisible(caches) and any(place.lacks_state for place in places):
            piece = _evaluated(pieces.state(caches))
            for place in places:
                if place.lacks_state:
                    place.add(len(ids), ids[:0].copy(), piece)
        for place in places:
            place.use()

    def close(self) -> None:
        """Write what is not written yet, and leave the folder to others."""
        if self._disk is not None:
            self._disk.close()

    def _in_memory(self, ids: Tokens, divisible: bool) -> _Found:
        path, state = self._memory.walk(ids).reusable(divisible)
        self._memory.use(path, state)
        spans = [block.content.rows(begin, end) for block, begin, end in path.rows(0, path.length)]
        return _Found(path.length, spans, state.content if state else None)

    def _on_disk(self, disk: Disk, ids: Tokens, divisible: bool, found: _Found) -> _Found:
        """What is stored, where that is more than was `found`; memory then also keeps it."""
        while True:
            stored, last = disk.walk(ids).reusable(divisible)
            disk.use(stored, last)
            if stored.length < found.length + LEAST:
                return found
            ids = ids[: stored.length]
            place = _Place(self._memory, ids)
            begin = place.path.length
            spans = [block.content.rows(*rows) for block, *rows in place.path.rows(0, begin)]
            blocks = list(stored.rows(begin, stored.length))
            read = disk.read([block for block, _, _ in blocks] + ([last] if last else []))
            if read is None:
                continue  # without what was lost
            state = read.pop() if last else None
            for piece, (_, first, end) in zip(read, blocks, strict=True):
                piece = _evaluated(piece.rows(first, end).alone())
                place.add(begin, ids[begin : begin + end - first].copy(), piece)
                begin += end - first
                spans.append(piece)
            if state is not None:
                place.add(begin, ids[:0].copy(), state)
            return _Found(stored.length, spans, state)


class _Memory(Tree[Piece]):
    def remember(self, path: Any, tokens: Tokens, piece: Piece) -> bool:
        return self.add(path, tokens, piece, piece.nbytes + tokens.nbytes)


class _Place:
    """Where tokens may be kept, and how far they are known there."""

    def __init__(self, tier: _Memory | Disk, ids: Tokens) -> None:
        self._tier, self._tokens = tier, len(ids)
        self.path: Any = tier.walk(ids)

    @property
    def _state(self) -> Any:
        return self.path.blocks[-1].states.get(self._tokens)

    @property
    def lacks_state(self) -> bool:
        return self.path.length == self._tokens and self._state is None

    def add(self, begin: int, tokens: Tokens, piece: Piece) -> bool:
        """Keep the tokens from `begin` on, unless they are known or those before are not."""
        return begin == self.path.length and self._tier.remember(self.path, tokens, piece)

    def use(self) -> None:
        self._tier.use(self.path, self._state)


def _evaluated(piece: Piece) -> Piece:
    mx.eval(piece.arrays)
    return piece


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int32)


def _bounds(known: set[int], end: int) -> list[tuple[int, int]]:
    """Spans from the least of `known` on, none across another or a multiple of SPAN."""
    begin = min(known)
    inner = {n for n in known | set(range(0, end, SPAN)) if begin < n < end}
    return list(pairwise([begin, *sorted(inner), end])) if begin < end else []
