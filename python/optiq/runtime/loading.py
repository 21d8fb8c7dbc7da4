"""Models ready to run: stock mlx-lm classes with native layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.text import one_line
from ..errors import SourceError
from ..kv import KVConfig, attach, identity, route
from ..lora.adapter import Adapter, Base
from ..lora.mounting import mount, opened
from ..nn.accelerate import accelerate
from ..nn.shard import shard
from ..nn.sharded import Ranks
from ..sources import Source, resolve
from ..sources import load as load_source
from ..sources.folder import mlx_lm_version
from .experts import stream


def load(
    name: str,
    *,
    revision: str | None = None,
    kv: KVConfig | Path | str | None = None,
    adapter: Adapter | Path | str | None = None,
    expert_memory: int | str | None = None,
) -> tuple[nn.Module, Any]:
    """`mlx_lm.load` with native layers: a folder, hub id or .gguf file, quantized or not.

    `kv` has keys and values cached in few bits: a kv_config.json, a `KVConfig`, or "8/4", bits of
    all keys and of all values. Then the model makes such caches itself (`make_cache`), for mlx-lm's
    `generate`, `BatchGenerator` and whatever else asks it for caches.

    `adapter` is one of this model: a folder of ours, mlx-lm's or PEFT's, or an `Adapter`.

    With `expert_memory`, such as "4GB", the experts of a mixture stay on disk, and at most so many
    bytes of them are held in memory (see experts.py). Answers are the same.

    Returns the model and its tokenizer. Raises SourceError; KVError or UsageError for `kv`,
    AdapterError for `adapter`, UsageError for `expert_memory`.
    """
    source = resolve(name, revision=revision)
    return open_source(source, kv=kv, adapter=adapter, expert_memory=expert_memory)


def open_source(
    source: Source,
    *,
    kv: KVConfig | Path | str | None = None,
    adapter: Adapter | Path | str | None = None,
    expert_memory: int | str | None = None,
    ranks: Ranks | None = None,
) -> tuple[nn.Module, Any]:
    """`load` of what `resolve` found; with `ranks` this rank's share of it.

    Raises DistributedError for a model that cannot be divided among them.
    """
    loaded = load_source(source, allow_quantized=True)
    model = loaded.model
    if expert_memory is not None:
        stream(model, source, expert_memory)
    if kv is not None:
        model = attach(model, kv, identity(source))
    if ranks is not None:
        shard(model, ranks, source.name)
    accelerate(model, exact=False, repack=True)
    if kv is not None:
        route(model)
    if adapter is not None:
        mount(model, opened(adapter), Base(source.name, source.fingerprint))
    return model, loaded.tokenizer


def first_run(model: nn.Module, tokens: Sequence[int]) -> mx.array:
    """Logits of `tokens` with new caches, not computed yet."""
    from mlx_lm.models.cache import make_prompt_cache

    logits: mx.array = model(mx.array([list(tokens)]), cache=make_prompt_cache(model))
    return logits


def check_graph(model: nn.Module, name: str) -> None:
    """Raise SourceError unless mlx-lm can build the graph of a run; nothing is computed."""
    try:
        first_run(model, (0, 1, 2, 3))
    except Exception as error:  # whatever a model file raises
        raise cannot_run(name, error) from error


def cannot_run(name: str, error: Exception) -> SourceError:
    """mlx-lm has raised `error` running the model `name`."""
    return SourceError(f"mlx-lm {mlx_lm_version()} cannot run {name}: {one_line(error)}")
