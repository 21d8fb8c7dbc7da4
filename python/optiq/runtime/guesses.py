"""Guesses of what comes next in an answer, from what came after the same words before.

Agents and editors have a model write again much of what they gave it. A step reads such a guess as
further rows of the batch, and each token is drawn from its own row as ever; where it is the one
that was guessed, the next row holds. So an answer is the same with and without guesses, whatever
its temperature (prompt lookup, Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that have to be the same
LONGEST = 15  # tokens of a guess
MOST = 32  # guessed tokens in a step
LONGER = (4, 8, 16)  # tokens in common, from which on a guess is another class
PRIOR = ((0.3, 4.0), (0.5, 4.0), (0.7, 4.0), (0.9, 4.0))  # share of right guesses, as so many seen
SMOOTHING = 0.2  # of seconds, by each new step
MEMORY = 0.97  # of a class, for each new guess


class Lookup:
    """The tokens of one conversation, and where in it what comes next may stand already.

    Each token is compared with its guess, whether or not a step has read that. So how often
    guesses are right is known at no cost.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt[:-1])
        t = self._tokens
        # By NGRAM tokens: what comes after them, where they stand last.
        ngrams = zip(*(t[i:] for i in range(NGRAM)), strict=False)
        self._after: dict[tuple[int, ...], int] = {n: i for i, n in enumerate(ngrams, NGRAM)}
        self._at: int | None = None  # of the token that is guessed
        self._same = 0  # tokens before it that are as the last ones
        self._right = [share * seen for share, seen in PRIOR]
        self._seen = [seen for _, seen in PRIOR]
        for token in prompt[-1:]:
            self.add(token)

    def add(self, token: int) -> None:
        """What came next."""
        right = self._at is not None and self._tokens[self._at] == token
        if self._at is not None:
            kind = _kind(self._same)
            self._right[kind] = MEMORY * self._right[kind] + right
            self._seen[kind] = MEMORY * self._seen[kind] + 1
        self._tokens.append(token)
        last = tuple(self._tokens[-NGRAM:])
        if right:
            assert self._at is not None
            self._at, self._same = self._at + 1, self._same + 1
        else:
            self._at = self._after.get(last)
            self._same = 0 if self._at is None else self._in_common(self._at)
        if len(last) == NGRAM:
            self._after[last] = len(self._tokens)

    def guess(self, worth: float, most: int) -> list[int]:
        """The next tokens, up to `most`, while their chance to be right is at least `worth`."""
        if self._at is None:
            return []
        chance, end = 1.0, self._at
        while end - self._at < most and end < len(self._tokens):
            kind = _kind(self._same + end - self._at)
            chance *= self._right[kind] / self._seen[kind]
            if chance < worth:
                break
            end += 1
        return self._tokens[self._at : end]

    def _in_common(self, at: int) -> int:
        """How many tokens before `at` are as the last ones, as far as it matters."""
        n, t = NGRAM, self._tokens
        while n < LONGER[-1] and n < at and t[at - n - 1] == t[-n - 1]:
            n += 1
        return n


def worthwhile(rows: int, step: float, row: float) -> float:
    """The chance to be right from which on a guess brings more tokens a second than it costs.

    A step with so many rows takes `step` seconds, and one more row `row` more.
    """
    return row * rows / step if step > 0 else 1.0


def smoothed(before: float, now: float) -> float:
    """Seconds of steps so far, with those of one more; 0 before the first."""
    return now if before == 0 else before + SMOOTHING * (now - before)


def _kind(same: int) -> int:
    return sum(same >= limit for limit in LONGER)
