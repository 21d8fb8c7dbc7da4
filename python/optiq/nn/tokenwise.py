"""What blocks that run layer by layer do to each token alone: RMS norms and rotations, each one
native op with a gradient. Stock MLX computes them from a dozen, in one thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..models.places import place_at
from ..ops import native
from ..sources.rotation import Rotation, of_module
from .check import agree
from .layers import Adopting


class Norm(Adopting):
    """Mixed into the class of an RMSNorm that multiplies by its weight.

    Some of these classes also take a gate; with one they run as they are.
    """

    def __call__(self, x: mx.array, *gate: Any, **named: Any) -> mx.array:
        if gate or named:
            y: mx.array = super().__call__(x, *gate, **named)
            return y
        return ops.rms_norm(x, self._gain(), self.eps)

    def _gain(self) -> mx.array:
        weight: mx.array = self["weight"]
        return weight


class NormPlusOne(Norm):
    """The same, of an RMSNorm that multiplies by one more than its weight."""

    def _gain(self) -> mx.array:
        return 1 + super()._gain()


class Rotated(Adopting):
    """Mixed into the class of a rotation that is the same for texts of all lengths."""

    def __call__(self, x: mx.array, offset: Any = 0, **named: Any) -> mx.array:
        if named or x.ndim != 4 or not isinstance(offset, int):
            y: mx.array = super().__call__(x, offset, **named)
            return y
        turn: Rotation = self.__dict__["_turn"]
        return ops.rotary(
            x,
            turn.frequencies,
            traditional=turn.traditional,
            magnitude=turn.magnitude,
            offset=offset,
        )


def norm_and_rotate(model: nn.Module) -> None:
    """Let RMS norms and rotations of float32 values be native, in place.

    Each kind is first compared with the original on random input, and left where they disagree.
    """
    if not native.active():
        return
    agreed: dict[Any, bool] = {}
    for path, module in model.named_modules():
        if isinstance(module, (Norm, Rotated)):
            continue
        for kind, swap, x in _swaps(module):
            if kind not in agreed:
                agreed[kind] = agree(module, swap, x)
            if agreed[kind]:
                place_at(model, path).set(swap)
                break


def _swaps(module: Any) -> Iterator[tuple[Any, nn.Module, mx.array]]:
    """What `module` may be replaced with: its kind, the module, and an input to compare on."""
    shape: tuple[int, ...]
    key = mx.random.key(0)
    if "RMSNorm" in type(module).__name__ and set(module) == {"weight"}:
        shape = 2, 3, module["weight"].size
        for mixin in (Norm, NormPlusOne):
            yield (mixin, type(module)), mixin.mixed_into(module), mx.random.normal(shape, key=key)
    elif turn := of_module(module):
        swap = Rotated.mixed_into(module)
        swap.__dict__["_turn"] = turn
        shape = 1, 2, 3, turn.dims
        yield (turn, type(module)), swap, mx.random.normal(shape, key=key)
