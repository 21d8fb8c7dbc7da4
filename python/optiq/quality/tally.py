"""From what each sequence gave to a score: a mean per token and its error clustered by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

# By module path and format name: KL in nats summed over the tokens, of each sequence.
Totals = dict[str, dict[str, list[float]]]


def score(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, float | None]:
    """Mean per token over sequences of these `lengths`, and its standard error.

    The error is that of a ratio of sums over independent sequences (Cochran, Sampling
    Techniques, 6.4): sqrt(S/(S-1) sum_s (K_s - mean n_s)^2) / sum_s n_s; tokens of one
    sequence are not independent. With a single sequence it is unknown: None.
    """
    count, tokens = len(lengths), sum(lengths)
    mean = fsum(totals) / tokens
    if count < 2:
        return mean, None
    squares = fsum((k - mean * n) ** 2 for k, n in zip(totals, lengths, strict=True))
    return mean, sqrt(count / (count - 1) * squares) / tokens
