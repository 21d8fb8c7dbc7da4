"""Take a module out of a model, put another in its place, and put the first back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True)
class Place:
    """The place of a module: `parent[key]`, where the parent is a module, dict or list."""

    parent: Any
    key: str | int

    def get(self) -> nn.Module:
        module: nn.Module = self.parent[self.key]
        return module

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


def place_at(model: nn.Module, path: str) -> Place:
    """The place of the module at a dotted path such as "model.layers.3.mlp.up_proj"."""
    parent: Any = model
    *parents, last = path.split(".")
    for part in parents:
        parent = parent[int(part) if isinstance(parent, list) else part]
    return Place(parent, int(last) if isinstance(parent, list) else last)


class Wrapper(nn.Module):
    """Stands in for `inner`: same attributes, same answer to isinstance."""

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner

    def __getattr__(self, key: str) -> Any:
        value = self.get(key)
        return value if value is not None else getattr(self.get("inner"), key)

    def __setattr__(self, key: str, value: Any) -> None:
        """Model files also assign to the parameters of their layers (Gemma 3n)."""
        inner = self.get("inner")
        target = inner if inner is not None and key in inner and key not in self else super()
        target.__setattr__(key, value)

    # Model files ask isinstance(layer, ...) to choose a layer's mask.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        inner = self.get("inner")
        return type(self) if inner is None else type(inner)
