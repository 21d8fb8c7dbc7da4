"""Pick samples so that every domain gives the same number of tokens.

A sequence is one sample from its first token on, never a window of a concatenation: models see a
BOS and a conversation's start, and no sample's length decides how much its domain counts.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..chat.template import Tokenizer
from ..errors import CalibrationError
from .files import BUNDLED
from .render import render
from .rows import Row

MIN_ROW = 8  # tokens; a shorter row says more about its BOS than about its domain
MIN_CUT = 32  # tokens; no sample is cut below this to hit a quota


class TooLittleText(CalibrationError):
    """There are no rows, or too few tokens to balance the domains."""


@dataclass(frozen=True)
class Sample:
    """One sequence: `tokens` are ids from the sample's start, `line` its place in the file."""

    domain: str
    tokens: list[int]
    line: int


@dataclass(frozen=True)
class Calibration:
    """Sequences of which every prefix is also balanced; `note` says what fell short, or is empty.

    `source` is what a plan calls the file of the rows.
    """

    sequences: list[Sample]
    sha256: str
    tokens_per_domain: dict[str, int]
    note: str = ""
    source: str = BUNDLED.name


def batches(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    max_length: int = 512,
    seed: int = 0,
) -> Calibration:
    """About `tokens` tokens of `rows`, shared equally between their domains.

    Whole samples are taken in an order shuffled by `seed` and cut at `max_length`; the last one or
    two of a domain are cut further to hit its share, never below 32 tokens. When a domain has
    fewer tokens than its share, all shares are lowered to what it has, and rows under 8 tokens are
    left out; `note` says so. Raises TooLittleText for no rows or shares under 32 tokens.
    """
    if max_length < MIN_CUT:
        raise CalibrationError(f"max_length is {max_length}; expected at least {MIN_CUT} tokens")
    pools, left_out = _render_all(rows, tokenizer, max_length)
    if not pools:
        short = f" of {MIN_ROW} tokens or more" if left_out else ""
        raise TooLittleText(f"there are no calibration rows{short}; give a file with at least one")
    if tokens < MIN_CUT * len(pools):
        raise TooLittleText(
            f"{tokens} calibration tokens are too few for {len(pools)} domains; "
            f"ask for at least {MIN_CUT * len(pools)}"
        )
    share, note = _share(pools, tokens)
    placed: list[tuple[int, int, Sample]] = []
    for index, (domain, pool) in enumerate(pools.items()):
        random.Random(f"{seed}/{domain}").shuffle(pool)
        start = 0
        for sample in _fill(pool, share):
            placed.append((start, index, sample))
            start += len(sample.tokens)
    sequences = [sample for _, _, sample in sorted(placed, key=lambda item: item[:2])]
    per_domain = {
        domain: sum(len(s.tokens) for s in sequences if s.domain == domain) for domain in pools
    }
    note = "; ".join(filter(None, [left_out, note]))
    return Calibration(sequences, token_hash(sequences), per_domain, note)


def token_hash(sequences: Iterable[Sample]) -> str:
    """sha256 of the stream: per sequence its length, then its ids, all int32 little-endian."""
    digest = hashlib.sha256()
    for sample in sequences:
        digest.update(np.asarray([len(sample.tokens), *sample.tokens], dtype="<i4").tobytes())
    return digest.hexdigest()


def _render_all(
    rows: Iterable[Row], tokenizer: Tokenizer, max_length: int
) -> tuple[dict[str, list[Sample]], str]:
    """The rows by domain, and a note about those that are too short."""
    pools: dict[str, list[Sample]] = defaultdict(list)
    short: list[int] = []
    for number, row in enumerate(rows, start=1):
        line = row.get("line", number)
        ids = render(row, tokenizer)
        if len(ids) < MIN_ROW:
            short.append(line)
        else:
            pools[row["domain"]].append(Sample(row["domain"], ids[:max_length], line))
    lines = ", ".join(map(str, short[:3])) + (", ..." if len(short) > 3 else "")
    note = f"left out {len(short)} rows under {MIN_ROW} tokens (lines {lines})" if short else ""
    return dict(pools), note


def _share(pools: dict[str, list[Sample]], tokens: int) -> tuple[int, str]:
    """Tokens of each domain, and a note if the smallest domain cannot give its part of `tokens`."""
    available = {domain: sum(len(s.tokens) for s in pool) for domain, pool in pools.items()}
    smallest = min(available, key=lambda domain: available[domain])
    share = tokens // len(pools)
    if available[smallest] >= share:
        return share, ""
    share = available[smallest]
    if share < MIN_CUT:
        raise TooLittleText(
            f"domain {smallest!r} has only {share} tokens; expected at least {MIN_CUT}: "
            "add rows to it or remove it"
        )
    return share, (
        f"asked for {tokens} tokens, reached {share * len(pools)}: domain {smallest!r} has "
        f"only {share}, and all domains are kept equal"
    )


def _fill(pool: list[Sample], share: int) -> Iterator[Sample]:
    """Samples of `pool` in order, the last ones cut, adding up to `share` tokens.

    A rest of under 32 tokens would leave room for no sequence, so the sample before it gives way.
    """
    left = share
    for sample in pool:
        size = min(len(sample.tokens), left)
        if 0 < left - size < MIN_CUT:
            size = left - MIN_CUT
            if size < MIN_CUT:
                continue
        yield Sample(sample.domain, sample.tokens[:size], sample.line)
        left -= size
        if left == 0:
            return
