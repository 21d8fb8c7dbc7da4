"""What a training run takes at most, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.memory import Needs
from ..models.roles import Module
from ..models.shapes import blocks_of, widest_block
from .options import Training
from .tuned import LOGITS_BYTES

# Float32 arrays that exist at a time: of a parameter (itself, its gradient summed and of one pack,
# AdamW's two means, the best so far, and what replaces them), of a block's activations, of logits.
_PARAMETERS, _ACTIVATIONS, _LOGITS = 9, 4, 5
_HEADS = 32  # of attention, whose weights [heads, T, T] are activations, too


def needs(
    model: nn.Module,
    modules: Sequence[Module],
    ranks: Mapping[str, int],
    options: Training,
    longest: int,
) -> Needs:
    """`longest` is that of the samples, whose attention weights are whole."""
    arrays: Any = tree_flatten(model.parameters())
    weights = sum(array.nbytes for _, array in arrays)
    rank_of = {m.path: ranks.get(m.path, 0) for m in modules}
    parameters = sum(rank_of[m.path] * sum(m.shape) for m in modules if m.path in ranks)
    blocks = len(blocks_of(modules))
    width = max(m.shape[-1] for m in modules)
    tokens = max(options.pack_length, longest)
    one_block = 4 * tokens * (_ACTIVATIONS * widest_block(modules) + _HEADS * longest)
    kept = 4 * tokens * width * (blocks + 1) if options.recompute else (blocks - 1) * one_block
    return Needs(
        {
            "weights": weights,
            "adapter and AdamW": 4 * _PARAMETERS * parameters,
            "activations": kept + one_block,
            "logits": _LOGITS * LOGITS_BYTES,
        }
    )
