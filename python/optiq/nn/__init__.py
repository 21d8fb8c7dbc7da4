"""Native layers, and `accelerate`, which puts them into a model in place.

Each layer is its stock counterpart with the same parameters; only the product differs. On the
CPU activations are float32: the kernels accumulate in it anyway, and 16-bit activations would
only cost accuracy and conversions. So that nothing else is rounded to 16 bits on the way (as the
`1 + weight` of Gemma's norms would be), vectors such as norm weights become float32, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..formats import AFFINE_BITS, AFFINE_GROUPS, Format
from ..ops import native
from ..swap import slot_at
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
    Layers that are native already are in neither list.
    """
    report = Accelerated()
    swaps: list[tuple[str, nn.Module]] = []
    classes = stock_classes()
    leaves: dict[str, nn.Module] = dict(
        tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    )
    for path, module in leaves.items():
        native_class = classes.get(type(module))
        if type(module) in classes.values():
            continue
        if native_class is None:
            weight = getattr(module, "weight", None)
            if isinstance(weight, mx.array) and weight.ndim > 1:
                report.left[path] = f"{type(module).__name__} has no native counterpart"
        elif reason := _unsupported(module):
            report.left[path] = reason
        else:
            swaps.append((path, native_class.adopt(module)))
            report.swapped.append(path)
    for path, module in swaps:
        slot_at(model, path).set(module)
    if native.on_cpu():
        model.apply(_exact)
    return report


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


def _exact(parameter: mx.array) -> mx.array:
    vector = parameter.ndim <= 1 and mx.issubdtype(parameter.dtype, mx.floating)
    return parameter.astype(mx.float32) if vector else parameter


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
