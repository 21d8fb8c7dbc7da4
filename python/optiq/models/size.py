"""How large a model is, as it came from its files."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class ModelSize(NamedTuple):
    """Bytes of all tensors, and bits per logical parameter."""

    nbytes: int
    bpw: float


def model_size(model: nn.Module) -> ModelSize:
    """The size of a model as it came from its files.

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
    return ModelSize(nbytes, 8 * nbytes / parameters)
