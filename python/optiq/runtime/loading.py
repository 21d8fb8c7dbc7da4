"""Models ready to run: stock mlx-lm classes with native layers."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..formats import DENSE
from ..kv import KVConfig, attach, identity, route
from ..models.places import slot_at
from ..nn.accelerate import accelerate
from ..planning.plan import Plan
from ..quantize.rounding.weights import MINMAX, Rounding
from ..quantize.rounding.weights import render as render_layer
from ..sources import LoadedModel, Source, resolve
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


def render(
    loaded: LoadedModel, plan: Plan, *, rounding: Rounding = MINMAX, blocks: bool = True
) -> nn.Module:
    """The model that `plan` describes, in memory: each weight is rounded and its source dropped.

    Takes over `loaded.model`, whose weights should still be lazy; `blocks` is that of `accelerate`.
    """
    leaves: dict[str, nn.Module] = dict(
        tree_flatten(loaded.model.leaf_modules(), is_leaf=nn.Module.is_module)
    )
    for planned in plan.modules:
        if planned.format != DENSE:
            path, fmt = planned.module.path, planned.format
            module = leaves.pop(path)
            layer = render_layer(module, fmt, rounding, path)
            mx.eval(layer.parameters())
            slot_at(loaded.model, path).set(layer)
    accelerate(loaded.model, blocks=blocks)
    return loaded.model


def size(model: nn.Module) -> dict[str, Any]:
    """Bytes of all tensors, and bits per logical parameter, of a model as it came from its files.

    A quantized weight counts as the weight it stands for.
    """
    tensors: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    groups: dict[str, int] = {
        path: module.group_size
        for path, module in model.named_modules()
        if hasattr(module, "group_size")
    }
    parameters = 0
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if path not in groups or leaf == "bias":
            parameters += array.size
        elif leaf == "scales":
            parameters += prod(array.shape) * groups[path]
    nbytes = sum(array.nbytes for array in tensors.values())
    return {"nbytes": nbytes, "bpw": 8 * nbytes / parameters}
