"""Models ready to run: stock mlx-lm classes with native layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..kv import KVConfig, attach, identity, route
from ..nn.accelerate import accelerate
from ..sources import Source, resolve
from ..sources import load as load_source


def load(
    name: str, *, revision: str | None = None, kv: KVConfig | Path | str | None = None
) -> tuple[nn.Module, Any]:
    """`mlx_lm.load` with native layers: a folder, hub id or .gguf file, quantized or not.

    `kv` has keys and values cached in few bits: a kv_config.json, a `KVConfig`, or "8/4", bits of
    all keys and of all values. Then the model makes such caches itself (`make_cache`), for mlx-lm's
    `generate`, `BatchGenerator` and whatever else asks it for caches.

    Returns the model and its tokenizer. Raises SourceError; KVError or UsageError for `kv`.
    """
    return open_source(resolve(name, revision=revision), kv=kv)


def open_source(
    source: Source, *, kv: KVConfig | Path | str | None = None
) -> tuple[nn.Module, Any]:
    """`load` of what `resolve` found."""
    loaded = load_source(source, allow_quantized=True)
    model = loaded.model
    if kv is not None:
        model = attach(model, kv, identity(source))
    accelerate(model)
    if kv is not None:
        route(model)
    return model, loaded.tokenizer
