"""Linear layers that add the low-rank term of an adapter to each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .. import ops


class Selection:
    """The slot of each row of the next batch; shared by all layers of a model."""

    def __init__(self) -> None:
        self.slots: list[int] = [0]

    def set(self, slots: Sequence[int]) -> None:
        self.slots = list(slots)

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """While this row runs by itself."""
        slots, self.slots = self.slots, self.slots[row : row + 1]
        try:
            yield
        finally:
            self.slots = slots


class Adapted(nn.Module):
    """`linear` with the terms of a layer, chosen by the slots of `selection`."""

    def __init__(self, linear: nn.Module, terms: ops.LowRankTerms, selection: Selection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        self.terms, self.selection = terms, selection

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        slots = self.selection.slots
        if not self.terms or not any(slots):
            return y
        y = self.terms.scaled(y, slots, self.linear.get("bias"))
        term = ops.gathered_low_rank(x.reshape(-1, x.shape[-1]), self.terms, slots)
        return y + term.reshape(y.shape).astype(y.dtype)
