"""Layers of mlx-lm's models with native products, and whole decoder blocks as one operation.

`accelerate` puts them into a model; see accelerate.py.
"""

from .layers import (
    Embedding,
    Linear,
    MultiLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
)

__all__ = [
    "Embedding",
    "Linear",
    "MultiLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMultiLinear",
    "QuantizedSwitchLinear",
    "SwitchLinear",
]
