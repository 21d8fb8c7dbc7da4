"""What a benchmark is: items in fixed waves, and a way to turn a wave into records.

A wave is what is asked of the model together. Which items share one is fixed by the task and not
by what an earlier run got done, so that a resumed run computes what an uninterrupted one would
have: the rounding of a batched product may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .engine import Engine
from .records import Record


@dataclass(frozen=True)
class Item:
    """One question. `group` is its cluster, such as a subject; `data` is the row, checked."""

    id: str
    group: str
    data: Mapping[str, Any]


class Task(Protocol):
    """A benchmark, ready to run on its items."""

    @property
    def name(self) -> str:
        """mmlu, gsm8k, ifeval, bfcl, humaneval or kl."""

    @property
    def protocol(self) -> str:
        """One line that changes whenever a number could."""

    @property
    def data_sha256(self) -> str: ...

    @property
    def waves(self) -> Sequence[Sequence[Item]]: ...

    def run(self, engine: Engine, wave: Sequence[Item]) -> list[Record]:
        """One record for each item of `wave`, in its order."""
