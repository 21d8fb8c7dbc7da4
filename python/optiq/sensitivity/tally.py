"""Running sums of scores, enough for a mean per token and its error clustered by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Sums = dict[str, dict[str, list[float]]]


class Tally:
    """Per module path and format name: the sums over sequences s of K, K^2 and K n.

    K is a sequence's score summed over its tokens, in nats; n is its number of tokens.
    """

    def __init__(self, sums: Sums | None = None) -> None:
        self.sums: Sums = sums or {}

    def add(self, path: str, fmt: str, total: float, tokens: int) -> None:
        """Add one sequence's score `total`, summed over its `tokens` tokens."""
        sums = self.sums.setdefault(path, {}).setdefault(fmt, [0.0, 0.0, 0.0])
        sums[0] += total
        sums[1] += total * total
        sums[2] += total * tokens

    def score(self, path: str, fmt: str, lengths: Sequence[int]) -> dict[str, float | None]:
        """Mean per token over sequences of these `lengths`, and its standard error.

        The error is that of a ratio of sums over independent sequences (Cochran, Sampling
        Techniques, 6.4): sqrt(S/(S-1) sum_s (K_s - mean n_s)^2) / sum_s n_s; tokens of one
        sequence are not independent. With a single sequence it is unknown: None.
        """
        k, kk, kn = self.sums[path][fmt]
        n, nn, count = sum(lengths), sum(m * m for m in lengths), len(lengths)
        mean = k / n
        if count < 2:
            return {"kl": mean, "se": None}
        squares = max(0.0, kk - 2 * mean * kn + mean * mean * nn)
        return {"kl": mean, "se": sqrt(count / (count - 1) * squares) / n}
