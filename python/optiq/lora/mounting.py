"""Adapters beside the layers of a model that answers."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from ..models.adaptable import changeable
from . import peft
from .adapter import Adapter, Base, check_fits, read
from .layers import put


def opened(adapter: Adapter | Path | str) -> Adapter:
    """An adapter as it is, or that in a folder of ours, mlx-lm's or PEFT's. Raises AdapterError."""
    if isinstance(adapter, Adapter):
        return adapter
    folder = Path(adapter).expanduser()
    return peft.read(folder) if peft.is_peft(folder) else read(folder)


def mount(model: nn.Module, adapter: Adapter, base: Base | None = None) -> None:
    """Put the adapter beside the layers of `model`, in place. Raises AdapterError."""
    adapter.check_everywhere("this command")
    check_fits(adapter, changeable(model), base)
    put(model, adapter.terms, adapter.scale, magnitudes=adapter.magnitudes)
