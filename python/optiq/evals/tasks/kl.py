"""KL to a reference model on held-out text: how far the model moved, seen token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ...calibration import HELD_OUT_TOKENS, gather, token_hash
from ...nn.accelerate import accelerate
from ...quality.divergence import Table, check_tokens, columns
from ...sources import Source, load
from ..engine import Engine, Prompt
from ..records import Metrics, Record
from ..task import Item

COLUMNS = ("kl", "top1", "loss")  # the rows of a table of `divergence`


class Kl:
    """Documents are the held-out rows of the bundled mix. The reference is loaded when needed."""

    name = "kl"

    def __init__(
        self, tokenizer: Any, reference: Source, *, limit: int | None, seed: int = 0
    ) -> None:
        self._reference_source = reference
        text = gather(tokenizer, None, "heldout", HELD_OUT_TOKENS, seed)
        self._sequences = text.sequences[:limit]
        self.data_sha256 = token_hash(self._sequences)
        self.waves = [
            [Item(f"line/{s.line}", s.domain, {"tokens": s.tokens})] for s in self._sequences
        ]
        self.protocol = (
            f"kl/1: reference {reference.fingerprint[:12]}, full vocabulary, nats, "
            f"{sum(len(s.tokens) for s in self._sequences)} tokens of held-out rows"
        )

    def run(self, engine: Engine, wave: Sequence[Item]) -> list[Record]:
        reference, tokenizer = self._reference
        check_tokens(tokenizer, {"the model": engine.tokenizer}, self._sequences)
        records = []
        for item in wave:
            tokens = item.data["tokens"]
            table = columns(reference, {"the model": engine.model}, tokens)["the model"]
            metrics: Metrics = {
                name: [float(f"{value:.8g}") for value in row]
                for name, row in zip(COLUMNS, table, strict=True)
            }
            sha256 = Prompt(tokens, 1).sha256
            records.append(Record(item.id, item.group, sha256, "", metrics))
            engine.finished()
        return records

    @cached_property
    def _reference(self) -> tuple[nn.Module, Any]:
        loaded = load(self._reference_source, allow_quantized=True)
        accelerate(loaded.model, exact=False)
        return loaded.model, loaded.tokenizer


def table(records: Sequence[Record]) -> Table:
    """The records as `divergence.summary` takes them: per document, `COLUMNS` by token."""
    rows: list[NDArray[np.float64]] = [
        np.array([record.metrics[name] for name in COLUMNS], dtype=np.float64) for record in records
    ]
    return rows
