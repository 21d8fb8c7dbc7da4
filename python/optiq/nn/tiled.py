"""Quantized layers whose weight lies in the order in which the CPU reads it.

There is one copy of the weight, and the parameters stay: `weight`, `scales` and `biases` are
computed from it when they are read, to the bit as they were, and hold memory only from then on.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops import native

NAMES = "weight", "scales", "biases"


class Tiles:
    """The tiles of a layer. A copy of it shares them, as it shares arrays; a pickled one has
    none."""

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle

    def __deepcopy__(self, memo: Any) -> Tiles:
        return self

    def __reduce__(self) -> Any:
        return Tiles, ()


def tile(layer: nn.Module) -> None:
    """Put the weight of an affine layer into reading order, where the extension has one for it."""
    ext = native.active()
    if ext is None or layer.mode != "affine" or tiles_of(layer) is not None:
        return
    handle = ext.tile(*(layer[name] for name in NAMES), layer.group_size, layer.bits)
    if handle is not None:
        dict.update(layer, zip(NAMES, handle.arrays, strict=True))
        layer.__dict__["_tiles"] = Tiles(handle)


def tiles_of(layer: nn.Module) -> Any:
    """None where it has none, or was given other parameters since."""
    tiles: Tiles | None = layer.__dict__.get("_tiles")
    if tiles is None or tiles.handle is None or native.active() is None:
        return None
    return tiles.handle if tiles.handle.stands_for([layer[name] for name in NAMES]) else None


def product(layer: nn.Module, x: mx.array) -> mx.array | None:
    """x @ weight.T, where there are tiles and x is not being traced."""
    ext, tiles = native.active(), tiles_of(layer)
    if ext is None or tiles is None or ext.traced(x):
        return None
    out: mx.array = ext.tiled_matmul(x, tiles, layer.exact)
    return out
