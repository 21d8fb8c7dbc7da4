"""Native layers, and `accelerate`, which puts them into a model in place.

Each layer is its stock counterpart with the same parameters; only the product differs. On the
CPU activations are float32: the kernels accumulate in it anyway, and 16-bit activations would
only cost accuracy and conversions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..formats import AFFINE_BITS, AFFINE_GROUPS, Format
from ..ops import native
from .layers import (
    Embedding,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
    stock_classes,
)

__all__ = [
    "Accelerated",
    "Embedding",
    "Linear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSwitchLinear",
    "SwitchLinear",
    "accelerate",
    "quantized",
]


@dataclass
class Accelerated:
    """Paths of the modules that were swapped, and of those left alone with the reason."""

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def accelerate(model: nn.Module) -> Accelerated:
    """Swap linear, embedding and expert layers of an mlx-lm model for native ones, in place.

    On a GPU nothing is swapped: there are no GPU kernels yet and stock MLX is the best choice.
    """
    report = Accelerated()
    swaps: list[tuple[str, nn.Module]] = []
    classes = stock_classes()
    leaves: list[tuple[str, nn.Module]] = tree_flatten(
        model.leaf_modules(), is_leaf=nn.Module.is_module
    )
    for path, module in leaves:
        native_class = classes.get(type(module))
        if native_class is None:
            if hasattr(module, "weight") and module["weight"].ndim > 1:
                report.left[path] = f"{type(module).__name__} has no native counterpart"
        elif reason := _unsupported(module):
            report.left[path] = reason
        else:
            swaps.append((path, native_class.adopt(module)))
            report.swapped.append(path)
    for path, module in swaps:
        replace(model, path, module)
    return report


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted `path` such as "model.layers.3.mlp.up_proj"."""
    parent: Any = model
    *parents, name = path.split(".")
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


def quantized(
    module: nn.Module, codes: mx.array, scales: mx.array, biases: mx.array, fmt: Format
) -> nn.Module:
    """The native quantized layer that `module` becomes with its weight rounded to `fmt`.

    `module` is a Linear, Embedding or SwitchLinear, stock or native; its bias is carried over.
    """
    out: nn.Module
    if isinstance(module, nn.Linear):
        out = QuantizedLinear.empty()
    elif isinstance(module, nn.Embedding):
        out = QuantizedEmbedding.empty()
        rows, dims = module.weight.shape
        out.num_embeddings, out.dims = rows, dims
    else:
        out = QuantizedSwitchLinear.empty()
        out.global_scale = None
    out.group_size, out.bits, out.mode = fmt.group_size, fmt.bits, fmt.mode
    out.weight, out.scales, out.biases = codes, scales, biases
    if "bias" in module:
        out.bias = module["bias"]
    out.freeze()
    return out


def _unsupported(module: nn.Module) -> str:
    if not native.on_cpu():
        return "the default device is a GPU, where stock MLX runs it"
    if not hasattr(module, "bits"):
        return ""
    if module.mode != "affine":
        return f"mode {module.mode!r} has no native kernel"
    if module.bits not in AFFINE_BITS or module.group_size not in AFFINE_GROUPS:
        return f"{module.bits} bits in groups of {module.group_size} have no native kernel"
    return ""
