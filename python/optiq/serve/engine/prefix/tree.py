"""What is known of token sequences, by what they begin with.

A block is a span of tokens that follows the first tokens of another block, or a state at a length.
It is never split: a sequence that leaves it in the middle branches off there, and a walk finds the
branch by the length and the token after it. The least recently used block goes first. A block
counts as used when one below it is, so the first to go never has any below it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

C = TypeVar("C")
Tokens = npt.NDArray[np.int32]


@dataclass(eq=False)
class Block(Generic[C]):
    """`tokens` come after the first `start` of a sequence; a state has none."""

    tokens: Tokens
    start: int
    parent: Block[C] | None
    content: C
    nbytes: int
    branches: dict[tuple[int, int], Block[C]] = field(default_factory=dict)  # by length and token
    states: dict[int, Block[C]] = field(default_factory=dict)  # by length

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@dataclass
class Path(Generic[C]):
    """Blocks that hold the first `length` tokens of a sequence; all of them are used in turn."""

    blocks: list[Block[C]]
    length: int

    def state(self) -> Block[C] | None:
        """The last state of the sequence."""
        for block, left in reversed(self._left()):
            reached = [n for n in block.states if n <= left]
            if reached:
                return block.states[max(reached)]
        return None

    def rows(self, begin: int, end: int) -> Iterator[tuple[Block[C], int, int]]:
        """The blocks of tokens `begin` to `end`, and which rows of each these are."""
        for block, left in self._left():
            first, last = max(begin, block.start), min(end, left)
            if first < last:
                yield block, first - block.start, last - block.start

    def reusable(self, divisible: bool) -> tuple[Path[C], Block[C] | None]:
        """As far as caches can be restored: all of it, or up to its last state."""
        if divisible:
            return self, None
        state = self.state()
        length = state.start if state else 0
        return Path([b for b in self.blocks if b.start < length or b.parent is None], length), state

    def _left(self) -> list[tuple[Block[C], int]]:
        """Each block with the length at which the sequence leaves it."""
        lengths = [block.start for block in self.blocks[1:]] + [self.length]
        return list(zip(self.blocks, lengths, strict=True))


class Tree(Generic[C]):
    """Blocks of at most `limit` bytes in all; `dropped` is told of each that goes."""

    def __init__(
        self, nothing: C, limit: int, dropped: Callable[[Block[C]], object] = lambda block: None
    ) -> None:
        self.limit, self.nbytes = limit, 0
        self._dropped = dropped
        self._root = Block(np.zeros(0, np.int32), 0, None, nothing, 0)
        self._used: OrderedDict[Block[C], None] = OrderedDict()  # each after all below it

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[Block[C]]:
        """Least recently used first."""
        return iter(self._used)

    def walk(self, tokens: Tokens) -> Path[C]:
        """As far as `tokens` are known."""
        block, blocks, n = self._root, [self._root], 0
        while True:
            n += common(block.tokens, tokens[n:])
            after = block.branches.get((n, int(tokens[n]))) if n < len(tokens) else None
            if after is None:
                return Path(blocks, n)
            block = after
            blocks.append(block)

    def add(self, path: Path[C], tokens: Tokens, content: C, nbytes: int) -> bool:
        """Add what comes after `path`: `tokens`, or a state if there are none.

        False where there is no room for it even when all but `path` has gone.
        """
        self.use(path)
        if not self.make_room(nbytes, path):
            return False
        parent = path.blocks[-1]
        block = Block(tokens, path.length, parent, content, nbytes)
        self._used[block] = None
        self.nbytes += nbytes
        if len(tokens):
            parent.branches[path.length, int(tokens[0])] = block
            path.blocks.append(block)
            path.length = block.stop
        else:
            parent.states[path.length] = block
        self.use(path)
        return True

    def make_room(self, nbytes: int, path: Path[C] | None = None) -> bool:
        """Drop the least recently used until there is room for `nbytes`; never what is in `path`,
        which was used last."""
        last = path.blocks[-1] if path else None
        while self.nbytes + nbytes > self.limit:
            oldest = next(iter(self._used), None)
            if oldest is None or oldest is last:
                return False
            self.drop(oldest)
        return True

    def use(self, path: Path[C], state: Block[C] | None = None) -> None:
        for block in ([state] if state else []) + path.blocks[:0:-1]:
            self._used.move_to_end(block)

    def drop(self, block: Block[C]) -> None:
        """Drop `block` and all below it."""
        going = [block]
        for each in going:  # which grows
            going += [*each.branches.values(), *each.states.values()]
        for each in reversed(going):
            assert each.parent is not None
            if len(each.tokens):
                del each.parent.branches[each.start, int(each.tokens[0])]
            else:
                del each.parent.states[each.start]
            del self._used[each]
            self.nbytes -= each.nbytes
            self._dropped(each)


def common(a: Tokens, b: Tokens) -> int:
    """How many first tokens are the same."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
