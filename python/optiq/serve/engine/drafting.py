"""Guesses of a small model, which reads the same tokens as the one that answers.

It says what it holds most likely, token by token, as far as that is worth what it costs. Each token
of an answer is still drawn from its own row, so answers are the same with and without it, whatever
their temperature; only how many come in a step depends on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ...errors import ServeError
from ...kv import route
from ...kv.rows import Caches, cut, joined
from .model import token_bytes

SLICE = 64  # tokens of a conversation that are read in a step of the answers
SURE = (0.5, 0.8, 0.95)  # shares that the model gives its guess, from which on it is another class
PRIOR = ((0.3, 4.0), (0.6, 4.0), (0.8, 4.0), (0.95, 4.0))  # share of right guesses, as so many seen
MEMORY = 0.97  # of a class for each new guess, and of what guesses brought for each token
PATIENCE = 8.0  # tokens a conversation may lose, at most, until guesses have to pay
PAUSE = 128  # tokens after which guesses that did not pay are tried again


class DraftModel:
    """To be used in the engine's thread, after `check`."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        route(model)
        parameters: Any = tree_flatten(model.parameters())
        self.model, self._tokenizer = model, tokenizer
        self.weight_bytes: int = sum(x.nbytes for _, x in parameters)
        self.token_bytes = 0
        self.seconds = 0.0  # of one token, smoothed

    def check(self, tokenizer: Any) -> None:
        """Raise ServeError unless it has these tokens, and caches that can forget."""
        if self._tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ServeError(
                "the draft model has other tokens than the model; give one of the same family, "
                "such as its smallest"
            )
        caches = self.make_caches()
        if not all(isinstance(c, KVCache) for c in caches):
            raise ServeError(
                "the draft model keeps a window or a state and cannot take a guess back; give one "
                "with plain attention"
            )
        logits = self.model(mx.array([[1]]), cache=caches)
        mx.eval(logits, [c.state for c in caches])
        self.token_bytes = sum(map(token_bytes, caches))

    def make_caches(self) -> Caches:
        caches: Caches = make_prompt_cache(self.model)
        return caches

    def likeliest(self, logits: mx.array) -> tuple[int, float]:
        """The likeliest token, and the share that the model gives it."""
        values = np.asarray(logits[0, -1].astype(mx.float32))
        token = int(values.argmax())
        return token, float(1.0 / np.exp(values - values[token]).sum())


class Drafted:
    """The guesses in one conversation."""

    def __init__(self, draft: DraftModel, prompt: Sequence[int]) -> None:
        self._draft = draft
        self._tokens = list(prompt)
        self._held: list[int] = []  # what the caches have read
        self._same = 0  # of its tokens, which are known to be those of the conversation
        self._caches: Caches = []
        self._one: Caches = []  # the same, for one token at a time
        self._said: deque[tuple[int, int]] = deque()  # guesses and their classes
        self._right = [share * seen for share, seen in PRIOR]
        self._seen = [seen for _, seen in PRIOR]
        self._gain = PATIENCE  # tokens that guesses brought more than they cost
        self._pause = 0  # tokens until they are tried again

    def add(self, token: int) -> None:
        """What came next."""
        if self._said:
            guess, kind = self._said.popleft()
            self._right[kind] = MEMORY * self._right[kind] + (guess == token)
            self._seen[kind] = MEMORY * self._seen[kind] + 1
            if guess == token:
                self._gain += 1
            else:
                self._said.clear()
        self._tokens.append(token)
        self._gain = min(self._gain, PATIENCE)
        self._pause = max(0, self._pause - 1)

    def guess(self, token: float, row: float, most: int) -> list[int]:
        """The next tokens, up to `most`, while each is worth it: a token is worth `token` seconds,
        and to read a guess costs `row`."""
        if self._pause or most < 1 or token <= 0:
            return []
        if self._gain <= 0:
            self._pause, self._gain = PAUSE, PATIENCE / 4
            return []
        self._said.clear()
        started, before = time.perf_counter(), self._draft.seconds
        logits = self._catch_up()
        guesses: list[int] = []
        chance, steps = 1.0, 1
        while logits is not None:
            guess, share = self._draft.likeliest(logits)
            kind = sum(share >= limit for limit in SURE)
            chance *= self._right[kind] / self._seen[kind]
            if chance * token < row + before:
                break
            guesses.append(guess)
            self._said.append((guess, kind))
            if len(guesses) == most:
                break
            logits = self._read([guess])
            steps += 1
        taken = time.perf_counter() - started
        if logits is not None:
            self._draft.seconds = before + 0.2 * (taken / steps - before) if before else taken
        self._gain -= (taken + len(guesses) * row) / token
        return guesses

    def _catch_up(self) -> mx.array | None:
        """The logits after all tokens, None while there are more to be read than in one step."""
        if not self._caches:
            self._caches = self._draft.make_caches()
        while (
            self._same < min(len(self._held), len(self._tokens) - 1)
            and self._held[self._same] == self._tokens[self._same]
        ):
            self._same += 1
        del self._held[self._same :]
        cut(self._caches, self._same)
        unread = self._tokens[self._same :]
        if len(unread) <= SLICE:
            return self._read(unread)
        self._read(unread[:SLICE])
        return None

    def _read(self, tokens: Sequence[int]) -> mx.array:
        self._held += tokens
        if len(tokens) == 1 and len(self._held) > 1:
            self._one = self._one or joined([self._caches], settled=True)
            out: mx.array = self._draft.model(mx.array([list(tokens)]), cache=self._one)
        else:
            out = self._draft.model(mx.array([list(tokens)]), cache=self._caches)
        mx.eval(out, [c.state for c in self._caches])
        return out
