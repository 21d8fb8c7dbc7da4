"""Weights that are read when a block runs and given up when it has run, so that a model of any size
fits: MLX reads a weight of a file when it is first used, and holds it as long as its array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...base.memory import give_back
from ...models.roles import blocks
from ...sources import Source, open_model

Drop = Callable[[int | None], None]  # what to do when a block, or the head, has run


def keep(block: int | None) -> None:
    """Drop nothing: the model stays in memory."""


class Passing:
    """Forgets the weights of blocks that a model runs for the last time."""

    def __init__(self, model: nn.Module) -> None:
        # By block: each array, as the module that holds it, its key there, its name in the model.
        self._arrays: dict[int | None, list[tuple[nn.Module, str, str]]] = defaultdict(list)
        prefixes = {f"{path}.": i for i, path in enumerate(blocks(model))}
        for path, module in model.named_modules():
            block = next((i for p, i in prefixes.items() if f"{path}.".startswith(p)), None)
            for key, value in module.items():
                if isinstance(value, mx.array):
                    name = f"{path}.{key}" if path else key
                    self._arrays[block].append((module, key, name))

    def drop(self, block: int | None) -> None:
        """Forget the weights of a block. Those outside the blocks, None, stay."""
        if block is not None:
            for module, key, _ in self._arrays[block]:
                module[key] = mx.array([])
        give_back()


class Streamed(Passing):
    """Gives up the weights of `model`, which is a model of `source`, so that they are read again.

    Layers may have become native ones, be wrapped or tapped; a layer that was replaced keeps the
    weights of its own.
    """

    def __init__(self, source: Source, model: nn.Module) -> None:
        super().__init__(model)
        self._source = source
        self._unread: dict[str, mx.array] = {}

    def drop(self, block: int | None) -> None:
        """Give up the weights of a block, or with None of what is outside the blocks."""
        arrays = self._arrays[block]
        if not self._unread.keys() >= {name for _, _, name in arrays}:
            model, _ = open_model(self._source)
            self._unread = dict(tree_flatten(model.parameters()))
        for module, key, name in arrays:
            if name in self._unread:
                module[key] = self._unread.pop(name).astype(module[key].dtype)
        give_back()
