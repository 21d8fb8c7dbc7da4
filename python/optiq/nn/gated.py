"""Gated MLPs whose activation is one native op with a gradient, layer by layer around it."""

from __future__ import annotations

import copy
from contextlib import suppress

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..models.blocks import Mlp, Unknown, describe
from ..models.places import place_at
from ..models.roles import blocks as blocks_of
from ..ops import native
from .check import agree
from .layers import Adopting, Linear

WIDTH, INNER = 16, 32  # of the layers with which two MLPs are compared


class Gated(Adopting):
    """Mixed into the class of the original MLP, which keeps its children."""

    def __call__(self, x: mx.array) -> mx.array:
        anatomy: Mlp = self.__dict__["_anatomy"]
        paths = (*anatomy.gate_up, anatomy.down)
        *gate_up, down = (self[path.rpartition(".")[2]] for path in paths)
        of_each = [layer(x) for layer in gate_up]
        gate, up = of_each if len(of_each) == 2 else mx.split(of_each[0], 2, axis=-1)
        y: mx.array = down(ops.gated(gate, up, anatomy.activation))
        return y


def gate(model: nn.Module) -> None:
    """Let the plain gated MLPs of described blocks use the native activation, in place.

    Each kind is first compared with the original on random input, and left where they disagree.
    """
    if not native.active():
        return
    agreed: dict[tuple[type, str], bool] = {}
    for path, block in blocks_of(model).items():
        anatomy = None
        with suppress(Unknown):
            anatomy = describe(block).mlp
        if anatomy is None:
            continue
        place = place_at(model, f"{path}.{anatomy.down.rpartition('.')[0]}")
        original = place.get()
        if isinstance(original, Gated):
            continue
        gated, kind = _gated(original, anatomy), (type(original), anatomy.activation)
        if kind not in agreed:
            agreed[kind] = _agree(original, gated, anatomy)
        if agreed[kind]:
            place.set(gated)


def _gated(mlp: nn.Module, anatomy: Mlp) -> nn.Module:
    made = Gated.mixed_into(mlp)
    made.__dict__["_anatomy"] = anatomy
    return made


def _agree(original: nn.Module, gated: nn.Module, anatomy: Mlp) -> bool:
    """With small layers in the place of theirs, so that no weight is read."""
    *gate_up, down = (path.rpartition(".")[2] for path in (*anatomy.gate_up, anatomy.down))
    shapes = dict.fromkeys(gate_up, (INNER * (3 - len(gate_up)), WIDTH)) | {down: (WIDTH, INNER)}
    x, *weights = (
        mx.random.normal(shape, key=mx.random.key(i))
        for i, shape in enumerate(((1, 3, WIDTH), *shapes.values()))
    )
    small = dict(zip(shapes, map(_linear, weights), strict=True))
    return agree(_with(original, small), _with(gated, small), x)


def _linear(weight: mx.array) -> nn.Module:
    layer = Linear.empty()
    layer.weight = weight
    return layer


def _with(module: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    made = copy.copy(module)
    dict.update(made, layers)
    return made
