"""Take a module out of a model, put another in its place, and put the first back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..formats import Format
from ..rounding import round_weight


@dataclass(frozen=True)
class Slot:
    """The place of a module: `parent[key]`, where the parent is a module, dict or list."""

    parent: Any
    key: str | int

    def get(self) -> nn.Module:
        return self.parent[self.key]

    def set(self, module: nn.Module) -> None:
        self.parent[self.key] = module

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Hold `module` for the length of a with block, then the present one again."""
        kept = self.get()
        self.set(module)
        try:
            yield
        finally:
            self.set(kept)


def slot_at(model: nn.Module, path: str) -> Slot:
    """The place of the module at a dotted path such as "model.layers.3.mlp.up_proj"."""
    parent: Any = model
    *parents, last = path.split(".")
    for part in parents:
        parent = parent[int(part) if isinstance(parent, list) else part]
    return Slot(parent, int(last) if isinstance(parent, list) else last)


def render(module: nn.Module, fmt: Format, rounding: str, path: str) -> nn.Module:
    """The layer that `module` becomes when its weight is rounded exactly as it would be shipped.

    Raises SourceError naming `path` when the weight is not finite.
    """
    from .. import nn as optiq_nn

    rounded = round_weight(module.weight, fmt, rounding=rounding, name=path)
    return optiq_nn.quantized(module, *rounded, fmt)
