"""Supervised fine-tuning: the tokens to learn are to become likelier."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .data import Sample
from .packing import Pack
from .tuned import Tuned


class Likelihood:
    """The objective, as training wants it: passes, the value of one, and what to divide by."""

    def __init__(self, tuned: Tuned, pack_length: int) -> None:
        self._tuned, self._length = tuned, pack_length

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Nothing has to be known before."""

    def passes(self, samples: Sequence[Sample]) -> list[Pack]:
        return self._tuned.packs(samples, self._length)

    def value(self, packed: Pack) -> mx.array:
        return self._tuned.summed(packed)

    def weight(self, samples: Sequence[Sample]) -> int:
        return sum(len(s.trained) for s in samples)
