"""The layers of a model, quantized or not, that an adapter may change, and its output head."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..base.modules import leaf_modules
from .kinds import Kind, is_embedding, kind_of
from .roles import Module, Role, blocks, role_of, unit_of


def adaptable(model: nn.Module) -> list[Module]:
    """Linear layers inside the blocks, routers left out; `shape` is that of the dense weight.

    Expert layers are among them, so that a caller can refuse them by name.
    """
    prefixes = [f"{path}." for path in blocks(model)]
    found = []
    for path, layer in _leaves(model).items():
        block = next((i for i, prefix in enumerate(prefixes) if path.startswith(prefix)), None)
        expert = kind_of(layer) is Kind.EXPERTS
        if block is None or not (expert or isinstance(layer, (nn.Linear, nn.QuantizedLinear))):
            continue
        role = Role.EXPERT if expert else role_of(path)
        if role is not Role.ROUTER:
            found.append(Module(path, role, unit_of(path), weight_shape(layer), block))
    return found


def head(model: nn.Module) -> Module | None:
    """The layer that makes the logits: a head, or an embedding that is also one."""
    prefixes = tuple(f"{path}." for path in blocks(model))
    outside = {path: m for path, m in _leaves(model).items() if not path.startswith(prefixes)}
    for path, layer in outside.items():
        if role_of(path) is Role.HEAD and isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            return Module(path, Role.HEAD, path, weight_shape(layer), None)
    for path, layer in outside.items():
        if hasattr(layer, "as_linear"):
            return Module(path, Role.EMBEDDING, path, weight_shape(layer), None, tied=True)
    return None


def changeable(model: nn.Module) -> list[Module]:
    """What an adapter may change that was made elsewhere: also the embeddings and the head."""
    last = head(model)
    tied = last.path if last is not None and last.tied else None
    embeddings = [
        Module(path, Role.EMBEDDING, path, weight_shape(m), None, tied=path == tied)
        for path, m in _leaves(model).items()
        if is_embedding(m)
    ]
    heads = [last] if last is not None and not last.tied else []
    return [*adaptable(model), *embeddings, *heads]


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of the weight that a layer holds or stands for."""
    if "scales" in layer:
        *outer, groups = layer["scales"].shape
        return (*outer, groups * layer.group_size)
    return tuple(layer["weight"].shape)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in leaf_modules(model).items() if "weight" in m}
