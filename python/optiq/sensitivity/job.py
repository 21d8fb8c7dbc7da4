"""What both methods share: the work to do, how it is cut into batches, where it had got to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from ..formats import DENSE, Format
from ..roles import Module, Role
from ..rounding import Rounding, render
from .checkpoint import Checkpoint
from .reference import Reference
from .weight_error import relative_error

# Tokens whose block outputs are kept at a time. A layer is rounded once per batch and format, so
# a batch must be worth that; all of a batch's tokens are in memory at every block.
BATCH_TOKENS = 2048


@dataclass
class Job:
    """Score every module of `formats` in each of its formats on `sequences` of token ids."""

    model: nn.Module
    modules: Sequence[Module]
    formats: dict[str, tuple[Format, ...]]  # by module path
    sequences: Sequence[Sequence[int]]
    reference: Reference
    checkpoint: Checkpoint
    rounding: Rounding
    seed: int
    progress: bool

    def rounded(self, module: Module) -> list[Format]:
        """The formats of `module` that change its weight."""
        return [fmt for fmt in self.formats[module.path] if fmt != DENSE]

    def render(self, module: Module, layer: nn.Module, fmt: Format) -> nn.Module:
        """`layer`, which has the module's weight or rows of it, rounded as it would be shipped.

        The error of a whole weight is noted the first time.
        """
        rounded = render(layer, fmt, self.rounding, module.path)
        noted = self.checkpoint.weight_errors.setdefault(module.path, {})
        if str(fmt) not in noted and layer.weight.shape == module.shape:
            noted[str(fmt)] = relative_error(layer, rounded)
        return rounded

    def batches(self) -> list[list[int]]:
        """Indices of the sequences, in order, at most BATCH_TOKENS tokens together or one each."""
        batches: list[list[int]] = []
        room = 0
        for i, tokens in enumerate(self.sequences):
            if len(tokens) > room:
                batches.append([])
                room = BATCH_TOKENS
            batches[-1].append(i)
            room -= len(tokens)
        return batches


def is_head(module: Module) -> bool:
    """Whether the module's weight makes the logits."""
    return module.tied or module.role is Role.HEAD
