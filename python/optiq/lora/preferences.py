"""Direct preference optimization: of two answers to a prompt, one is to become likelier.

The loss of a pair is -log sigmoid(beta * (log p(chosen) / ref(chosen) - log p(rejected) /
ref(rejected))), where ref is the base without an adapter (Rafailov et al. 2023). A row is
`{"prompt", "chosen", "rejected"}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..calibration.rows import Row
from ..errors import CalibrationError
from .data import Data, Sample, read_with, sample, shortened
from .packing import Pack
from .tuned import Tuned

KEYS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Sample
    rejected: Sample

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.chosen.tokens + self.rejected.tokens

    @property
    def trained(self) -> tuple[int, ...]:
        """Places among `tokens`."""
        before = len(self.chosen.tokens)
        return self.chosen.trained + tuple(before + i for i in self.rejected.trained)

    @property
    def line(self) -> int:
        return self.chosen.line


def check_pair(value: object) -> Row:
    """`value` as a row of preferences; raises CalibrationError."""
    row = dict(value) if isinstance(value, dict) else {}
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise CalibrationError(
                f'{key} is missing or empty; expected {{"prompt": "...", "chosen": "...", '
                '"rejected": "..."}'
            )
    if row["chosen"] == row["rejected"]:
        raise CalibrationError("chosen and rejected are the same; expected two answers")
    return row


def pair(row: Row, tokenizer: Any, most: int) -> tuple[Pair, bool]:
    """A checked row, each answer cut after `most` tokens, and whether one was longer.

    Raises AdapterError.
    """
    rows = ({**row, "completion": row[key]} for key in ("chosen", "rejected"))
    (chosen, one), (rejected, other) = (shortened(sample(r, tokenizer), most) for r in rows)
    return Pair(chosen, rejected), one or other


def read_pairs(path: Path, tokenizer: Any, max_length: int) -> Data[Pair]:
    """As `data.read`."""
    return read_with(path, check_pair, lambda row: pair(row, tokenizer, max_length))


class Preferences:
    """The objective, as training wants it: passes, the value of one, and what to divide by."""

    def __init__(self, tuned: Tuned, beta: float, pack_length: int) -> None:
        self._tuned, self._beta, self._length = tuned, beta, pack_length
        self._reference: dict[Pair, tuple[float, float]] = {}

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Measure how likely the answers are to the base; the model has to be the base now."""
        for unit in self.passes(pairs):
            likely = np.asarray(self._likelihoods(unit), np.float64).reshape(-1, 2)
            for each, (chosen, rejected) in zip(unit, likely, strict=True):
                self._reference[each] = float(chosen), float(rejected)

    def passes(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs that go through the model together."""
        units: list[list[Pair]] = []
        room = 0
        for each in pairs:
            if not units or len(each.tokens) > room:
                units.append([])
                room = self._length
            units[-1].append(each)
            room -= len(each.tokens)
        return units

    def value(self, unit: Sequence[Pair]) -> mx.array:
        """The sum of the losses of some pairs, not computed yet."""
        reference = mx.array([self._reference[each] for each in unit])
        gained = self._likelihoods(unit).reshape(-1, 2) - reference
        return mx.sum(mx.logaddexp(-self._beta * (gained[:, 0] - gained[:, 1]), mx.array(0.0)))

    def weight(self, pairs: Sequence[Pair]) -> int:
        return len(pairs)

    def _likelihoods(self, unit: Sequence[Pair]) -> mx.array:
        """log p of each answer, chosen and rejected in turn."""
        samples = [s for each in unit for s in (each.chosen, each.rejected)]
        if self._tuned.alone:
            return -mx.stack([self._tuned.summed(Pack((s,))) for s in samples])
        losses = self._tuned.losses(Pack(tuple(samples)))
        ends = np.cumsum([len(s.trained) for s in samples])[:-1].tolist()
        return -mx.stack([mx.sum(part) for part in mx.split(losses, ends)])
