"""The next token of each row, drawn on the host from the row's logits and nothing else.

Numbers are drawn from (seed, position), so an answer does not depend on which rows are beside it,
on how many steps the engine took before, or on the machine's other work.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from math import inf, isfinite, log

import numpy as np
import numpy.typing as npt

from ...base.text import one_line
from ...errors import ServeError
from .request import Guide, Sampling, Token

Floats = npt.NDArray[np.float32]

_CUTS = (4.0, 8.0, 16.0, inf)  # how far below the likeliest word, in nats, the search goes


class Sampler:
    """Draws the tokens of one answer to `prompt`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocabulary: int,
        guide: Guide | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        self.sampling = sampling
        self.guide = guide
        self.top_logprobs = top_logprobs
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._position = 0
        self._bias = _sparse(sampling.logit_bias)
        s = sampling
        self._penalized = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (
            1,
            0,
            0,
        )
        if self._penalized:
            self._counts = np.zeros(vocabulary, dtype=np.int32)  # in the answer
            self._seen = np.zeros(vocabulary, dtype=bool)  # in prompt and answer
            self._seen[np.asarray(prompt, dtype=np.int64)] = True
        self._words = np.zeros((vocabulary + 31) // 32, dtype=np.uint32)

    def adjusted(self, logits: Floats) -> Floats:
        """Logits `[V]` after bias, penalties and guide: the same array where nothing changes it."""
        allowed = self._allowed(logits.size)
        if not self._penalized and self._bias is None and allowed is None:
            return logits
        logits = logits.copy()
        if self._penalized:
            s = self.sampling
            seen = np.flatnonzero(self._seen)
            of = logits[seen]
            # CTRL, Keskar et al. 2019, equation 2, for logits of either sign.
            logits[seen] = np.where(of > 0, of / s.repetition_penalty, of * s.repetition_penalty)
            used = np.flatnonzero(self._counts)
            logits[used] -= s.presence_penalty + s.frequency_penalty * self._counts[used]
        if self._bias is not None:
            ids, bias = self._bias
            logits[ids] += bias
        if allowed is not None:
            logits[~allowed] = -inf
        return logits

    def _allowed(self, size: int) -> npt.NDArray[np.bool_] | None:
        if self.guide is None:
            return None
        self._words[:] = 0
        if not self.guide.allow(self._words):
            return None
        bits = np.unpackbits(self._words.astype("<u4").view(np.uint8), bitorder="little")
        return bits[:size].astype(bool)

    def draw(self, logits: Floats) -> int:
        """A token, from adjusted logits `[V]`."""
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        return _drawn(logits, s, self._uniform())

    def accept(self, token: int) -> None:
        """Note what was drawn. Raises what the guide raises."""
        self._position += 1
        if self._penalized:
            self._counts[token] += 1
            self._seen[token] = True
        if self.guide is not None:
            self.guide.accept(token)

    def _uniform(self) -> float:
        """In [0, 1), 53 random bits."""
        key = f"{self._seed}:{self._position}".encode()
        bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return (bits >> 11) * 2.0**-53


def choose_one(row: Floats, highest: float, sampler: Sampler) -> Token | ServeError:
    """The next token, from logits `[V]` and the highest of them; an error ends one answer."""
    if not isfinite(highest):
        return ServeError("the model gave logits that are not numbers; try another prompt")
    try:
        adjusted = sampler.adjusted(row)
        if adjusted is not row and adjusted.max() == -inf:
            return ServeError("the grammar of this answer allows no further token")
        token = sampler.draw(adjusted)
        sampler.accept(token)
    except Exception as error:  # of a guide, whatever it is
        return ServeError(f"the grammar of this answer failed ({one_line(error)})")
    return _with_logprobs(token, row, highest, sampler.top_logprobs)


def _with_logprobs(token: int, logits: Floats, highest: float, top: int | None) -> Token:
    if top is None:
        return Token(token)
    total = highest + log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if top:
        ids = np.argpartition(-logits, top)[:top]
        ids = ids[np.lexsort((ids, -logits[ids]))]
        best = tuple((int(i), float(logits[i]) - total) for i in ids)
    return Token(token, float(logits[token]) - total, best)


def _drawn(logits: Floats, s: Sampling, uniform: float) -> int:
    """A draw from softmax(logits / temperature), cut by min_p, then top_k, then top_p."""
    scaled = (logits - logits.max()) * np.float32(1 / s.temperature)
    if s.top_k == 0 and s.top_p == 1 and s.min_p == 0:
        return _at(np.exp(scaled), uniform)
    least = log(s.min_p) if s.min_p else -inf
    total = float(np.exp(scaled[scaled >= least]).sum(dtype=np.float64)) if s.top_p < 1 else 0.0
    for cut in _CUTS:
        # All words above a threshold are the likeliest ones, so the rest need not be sorted.
        ids = np.flatnonzero(scaled >= max(-cut, least))
        p = np.exp(scaled[ids])
        by_count = s.top_k and len(ids) >= s.top_k
        by_mass = s.top_p < 1 and not s.top_k and float(p.sum(dtype=np.float64)) >= s.top_p * total
        if by_count or by_mass or -cut <= least:
            break
    order = np.argsort(-p, kind="stable")
    ids, p = ids[order], p[order]
    if s.top_k:
        ids, p = ids[: s.top_k], p[: s.top_k]
        total = float(p.sum(dtype=np.float64))
    if s.top_p < 1:
        before = np.cumsum(p, dtype=np.float64) - p
        kept = max(1, int(np.searchsorted(before, s.top_p * total, side="left")))
        ids, p = ids[:kept], p[:kept]
    return int(ids[_at(p, uniform)])


def _at(weights: Floats, uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` of their sum.

    Sums of blocks find the block first: a running sum over a large vocabulary costs far more.
    """
    block = 512
    starts = np.arange(0, weights.size, block)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    ends = np.cumsum(sums)
    goal = uniform * ends[-1]
    chosen = min(int(np.searchsorted(ends, goal, side="right")), len(starts) - 1)
    inside = weights[starts[chosen] : starts[chosen] + block]
    running = np.cumsum(inside, dtype=np.float64) + (ends[chosen] - sums[chosen])
    at = int(np.searchsorted(running, goal, side="right"))
    if at >= inside.size or inside[at] == 0:  # rounding at the end of a block
        at = int(np.flatnonzero(inside)[-1])
    return int(starts[chosen]) + at


def _sparse(bias: object) -> tuple[npt.NDArray[np.int64], Floats] | None:
    if not isinstance(bias, dict) or not bias:
        return None
    ids = np.fromiter(bias, dtype=np.int64, count=len(bias))
    return ids, np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
