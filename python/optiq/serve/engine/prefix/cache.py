"""Caches by the tokens they hold, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ....errors import KVError
from ....kv import pieces
from ....kv.pieces import Piece
from ....kv.prefix import Key
from .tree import Path, Tokens, Tree

SPAN = 256  # most tokens of a block
LEAST = 16  # tokens; fewer are read as fast as their rows are copied
_STEP = 256  # by which mlx-lm's caches grow

Cache = Any


class PrefixCache:
    """Caches of what prompts and answers begin with, of at most `nbytes` bytes.

    All of one `Key`: model, adapter and KV configuration. To be used in the thread that owns MLX.
    """

    def __init__(self, key: Key, nbytes: int) -> None:
        self._memory: Tree[Piece] = Tree(Piece({}, {}), nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._memory.nbytes

    @property
    def entries(self) -> int:
        """Blocks in memory."""
        return len(self._memory)

    def find(
        self, tokens: Sequence[int], make: Callable[[], list[Cache]]
    ) -> tuple[list[Cache], int]:
        """Caches of the first n of `tokens`, which are the caller's own, and n.

        `make` gives the model's empty caches. At least the last token is left to be read, and n is
        0 where so few tokens are known that reading them is as fast.
        """
        caches = make()
        path = self._memory.walk(_array(tokens)[:-1])
        state = None
        if not pieces.divisible(caches):
            state = path.state()
            path = path.until(state.start if state else 0)
        n = path.length
        if n < LEAST:
            return caches, 0
        spans = [block.content.rows(begin, end) for block, begin, end in path.rows(0, n)]
        room = len(tokens) - n + -len(tokens) % _STEP
        pieces.join(caches, spans, state.content if state else None, n, room)
        self._memory.use(path, state)
        return caches, n

    def keep(self, tokens: Sequence[int], caches: Sequence[Cache]) -> None:
        """Remember `caches`, which hold exactly `tokens` and stay the caller's.

        Rows that are known are not copied again. Raises KVError for caches of another length.
        """
        held = pieces.length(caches)
        if held is not None and held != len(tokens):
            raise KVError(f"{len(tokens)} tokens, but caches of {held}; keep what was read")
        ids = _array(tokens)
        path = self._memory.walk(ids)
        new: list[Piece] = []
        for begin, end in _bounds(path.length, len(ids)):
            piece = pieces.span(caches, begin, end)
            if not self._add(path, ids[begin:end].copy(), piece):
                break
            new.append(piece)
        if path.length == len(ids) and not pieces.divisible(caches):
            if len(ids) not in path.blocks[-1].states:
                piece = pieces.state(caches)
                if self._add(path, ids[:0].copy(), piece):
                    new.append(piece)
            self._memory.use(path, path.blocks[-1].states.get(len(ids)))
        mx.eval([piece.arrays for piece in new])

    def close(self) -> None:
        pass

    def _add(self, path: Path[Piece], tokens: Tokens, piece: Piece) -> bool:
        return self._memory.add(path, tokens, piece, piece.nbytes + tokens.nbytes)


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int32)


def _bounds(begin: int, end: int) -> list[tuple[int, int]]:
    """Spans from `begin` to `end`, none across a multiple of SPAN."""
    inner = range((begin // SPAN + 1) * SPAN, end, SPAN)
    return list(pairwise([begin, *inner, end])) if begin < end else []
