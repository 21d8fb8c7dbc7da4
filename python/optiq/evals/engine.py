"""Ask a model in batches: greedy answers and next-token probabilities through BatchGenerator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True)
class Engine:
    """A model, its tokenizer, and how many sequences it decodes at a time."""

    model: nn.Module
    tokenizer: Any
    batch: int = 16
