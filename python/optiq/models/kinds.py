"""What the weight of a layer holds: one matrix, or one for each expert or each head."""

from __future__ import annotations

from enum import Enum

import mlx.nn as nn
from mlx_lm.models import mla, switch_layers


class Kind(Enum):
    MATRIX = "matrix"
    EXPERTS = "experts"  # every row of the input names the experts that it goes to
    HEADS = "heads"  # every head has its own rows: latent attention


# Stock classes of weights with an axis before rows and columns.
STACKED: dict[type[nn.Module], Kind] = {
    switch_layers.SwitchLinear: Kind.EXPERTS,
    switch_layers.QuantizedSwitchLinear: Kind.EXPERTS,
    mla.MultiLinear: Kind.HEADS,
    mla.QuantizedMultiLinear: Kind.HEADS,
}


def kind_of(layer: nn.Module) -> Kind:
    """The kind of a layer, stock, native or wrapped."""
    return next((kind for cls, kind in STACKED.items() if isinstance(layer, cls)), Kind.MATRIX)


def is_embedding(layer: nn.Module) -> bool:
    """Whether it is a table that tokens are looked up in, quantized or not."""
    return isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding))


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The class whose product has a gradient at the weight, which native stacked products lack."""
    return next((cls for cls in STACKED if isinstance(layer, cls)), type(layer))
