"""What a training run takes at most, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.memory import Needs
from ..models.roles import Module
from ..models.shapes import blocks_of, widest_block
from . import ranks
from .moments import EXACT_BYTES
from .options import RANKS, Training
from .tuned import LOGITS_BYTES

# Float32 arrays that exist at a time: of a parameter (itself, its gradient summed and of one pack,
# AdamW's two means, the best so far, and what replaces them), of a block's activations, of logits.
_PARAMETERS, _ACTIVATIONS, _LOGITS = 9, 4, 5
_HEADS = 32  # of attention, whose weights [heads, T, T] are activations, too
# Of a term that sees the task's gradient: itself, its gradient, and the sum in float64. Of a layer
# that is repaired: its weight twice, their difference, what drives it, its square and vectors.
_PROBES, _MATRICES = 4, 6


def needs(
    model: nn.Module,
    modules: Sequence[Module],
    options: Training,
    longest: int,
    original: nn.Module | None,
) -> Needs:
    """`longest` is that of the samples, whose attention weights are whole."""
    parameters = parameters_of(modules, options)
    blocks = len(blocks_of(modules))
    width = max(m.shape[-1] for m in modules)
    tokens = max(options.pack_length, longest)
    one_block = 4 * tokens * (_ACTIVATIONS * widest_block(modules) + _HEADS * longest)
    kept = 4 * tokens * width * (blocks + 1) if options.recompute else (blocks - 1) * one_block
    trained = 4 * _PARAMETERS * parameters
    before = _beginning(modules, options, original is not None)
    return Needs(
        {
            "weights": nbytes_of(model) + (nbytes_of(original) if original else 0),
            "adapter and AdamW": trained,
            "activations": kept + one_block,
            "logits": _LOGITS * LOGITS_BYTES,
            **({"ranks and beginning": before - trained} if before > trained else {}),
        }
    )


def parameters_of(modules: Sequence[Module], options: Training) -> int:
    """Of the adapter, at most."""
    if options.ranks in RANKS:
        return ranks.budget(modules, options.rank)
    given = ranks.from_file(Path(options.ranks), modules)
    return sum(given.get(m.path, 0) * ranks.cost(m) for m in modules)


def nbytes_of(model: nn.Module) -> int:
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def _beginning(modules: Sequence[Module], options: Training, repairs: bool) -> int:
    """Beside the activations, before there is an optimizer."""
    probes = ranks.MOST * ranks.budget(modules, options.rank)
    gradients = 4 * _PROBES * probes if options.ranks == "sensitivity" else 0
    if not repairs:
        return gradients
    inputs = {m.unit: m.shape[1] for m in modules}.values()
    exact = min(EXACT_BYTES, 4 * sum(width**2 for width in inputs))
    one_layer = 8 * _MATRICES * max(max(m.shape) ** 2 for m in modules)
    return max(gradients, 3 * exact + 8 * probes + one_layer)
