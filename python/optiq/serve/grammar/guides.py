"""Guides (`serve/engine/request.py`): a grammar, and what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ServeError
from ..engine.request import Guide

Words = npt.NDArray[np.uint32]


class GrammarGuide:
    """Follows a grammar with one of llguidance's matchers, which nobody else uses.

    `known` has the bits of the tokens that both the tokenizer and the embedding have.
    """

    def __init__(self, matcher: Any, size: int, known: Words) -> None:
        self._matcher = matcher
        self._words = np.zeros(-(-size // 32), np.uint32)
        self._known = known
        self._done = False

    def allow(self, words: Words) -> bool:
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        np.bitwise_and(self._words[: len(words)], self._known, out=words)
        if not words.any():
            raise ServeError("no token that this model has can follow in the grammar")
        return True

    def accept(self, token: int) -> None:
        if not self._done:
            self._matcher.consume_token(token)
            self._check()
            self._done = self._matcher.is_stopped()

    @property
    def done(self) -> bool:
        return self._done

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().partition("<state>")[0].split())
            raise ServeError(f"the grammar cannot be followed: {reason}")


class AfterReasoning:
    """Leaves reasoning free, and follows `then` once it has ended.

    The answer begins `inside` the reasoning, or may open it with its first token. `free` has the
    bits of the tokens that reasoning may have: all but those that end an answer.
    """

    def __init__(
        self, start: Sequence[int], end: Sequence[int], free: Words, then: Guide, *, inside: bool
    ) -> None:
        self._start = Mark(start)
        self._end = Mark(end)
        self._free = free
        self._then = then
        self._state = "inside" if inside else "before"

    def allow(self, words: Words) -> bool:
        if self._state == "inside":
            words[:] = self._free
            return True
        if self._state == "opening":
            _set(words, self._start.next)
            return True
        limited = self._then.allow(words)
        if limited and self._state == "before":
            _set(words, self._start.next)
        return limited

    def accept(self, token: int) -> None:
        if self._state == "inside":
            if self._end.follow(token):
                self._state = "after"
        elif self._state == "opening" or (self._state == "before" and token == self._start.next):
            self._state = "inside" if self._start.follow(token) else "opening"
        else:
            self._state = "after"
            self._then.accept(token)

    @property
    def done(self) -> bool:
        return self._state == "after" and self._then.done


class Budget:
    """Ends reasoning, wherever it stands in the answer, after `budget` tokens of it in all."""

    def __init__(
        self,
        start: Sequence[int],
        end: Sequence[int],
        budget: int,
        then: Guide | None,
        *,
        inside: bool,
    ) -> None:
        self._start = Mark(start)
        self._end = Mark(end)
        self._left = budget
        self._then = then
        self._inside = inside

    def allow(self, words: Words) -> bool:
        if self._inside and self._left <= 0:
            _set(words, self._end.next)
            return True
        return self._then is not None and self._then.allow(words)

    def accept(self, token: int) -> None:
        if self._inside:
            self._left -= 1
            self._inside = not self._end.follow(token)
        else:
            self._inside = self._start.follow(token)
        if self._then is not None:
            self._then.accept(token)

    @property
    def done(self) -> bool:
        return self._then is not None and self._then.done


class Mark:
    """Finds a sequence of tokens among those that come."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._seen: list[int] = []

    @property
    def next(self) -> int:
        """The token that goes on with the mark."""
        return self._tokens[len(self._seen)]

    def follow(self, token: int) -> bool:
        """Whether `token` completes the mark."""
        self._seen.append(token)
        while self._seen != self._tokens[: len(self._seen)]:
            del self._seen[0]
        if len(self._seen) < len(self._tokens):
            return False
        self._seen.clear()
        return True


def _set(words: Words, token: int) -> None:
    words[token // 32] |= np.uint32(1 << token % 32)
