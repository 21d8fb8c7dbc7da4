"""The running model that everything is measured in, and the full-precision weight of a module.

A score always means: the divergence that one module's format causes against the same module at
full precision. With the reference "bf16" all other modules are also at full precision: weights are
read when their block runs, and what passes over the blocks once drops them after it. With
"uniform4" the others run in 4 bits, so that a model fits memory that is run as a whole time and
again, and the full-precision weights are read from the files when their turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ...base.memory import available_memory
from ...errors import SensitivityError
from ...formats import DENSE, UNIFORM4, Format
from ...models.places import place_at
from ...models.roles import Module, allowed
from ...nn.replay import arrays
from ...sources import Source, open_model
from ..replay.streamed import Streamed, keep
from .render import render_layer
from .weights import Rounding

_SHARE = 0.7  # of the available memory; the rest is for activations, logits and the system

# What the 4-bit running model uses: the first that fits the shape and respects the role's floor.
_RUNNING = (UNIFORM4, *(Format("affine", b, g) for b, g in ((4, 32), (8, 64), (8, 32))))


def choose(asked: str, nbytes: int) -> tuple[str, str]:
    """The reference to use for a model of `nbytes` weight bytes, and the reason in words."""
    if asked != "auto":
        return asked, "as asked"
    free = available_memory()
    fits = nbytes <= _SHARE * free
    return ("bf16" if fits else "uniform4"), (
        f"{nbytes / 1e9:.2f} GB of weights {'fit' if fits else 'do not fit'} "
        f"{_SHARE:.0%} of the {free / 1e9:.1f} GB of available memory"
    )


def in_passes(asked: str) -> str:
    """The reference of what passes over the blocks one by one, so that any model fits."""
    return "uniform4" if asked == "uniform4" else "bf16"


def common(offers: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Of the choices of all ranks the one that fits all, and the reason: the first that is not
    bf16, if any.
    """
    name, why = next((offer for offer in offers if offer[0] != "bf16"), offers[0])
    return name, why


class Reference(Protocol):
    """Gives each module at full precision, within one pass over the modules."""

    name: str

    def begin(self) -> None:
        """Start a new pass."""

    def dense(self, path: str) -> nn.Module:
        """The module at full precision, at most once per pass."""
        ...

    def running(self, path: str) -> Format:
        """The format that the module has in the running model."""
        ...

    def drop(self, block: int | None) -> None:
        """Give up what can be read again of a block, or with None of what is in no block."""


class Bf16:
    """The running model is the source model; without `source` its weights stay in memory."""

    name = "bf16"

    def __init__(
        self, model: nn.Module, modules: Sequence[Module], source: Source | None = None
    ) -> None:
        self.drop = Streamed(source, model).drop if source else keep
        self._modules = {m.path: place_at(model, m.path).get() for m in modules}

    def begin(self) -> None:
        pass

    def dense(self, path: str) -> nn.Module:
        return self._modules[path]

    def running(self, path: str) -> Format:
        return DENSE


class Uniform4:
    """The running model is 4-bit: `model` is quantized in place, module by module."""

    name = "uniform4"

    def __init__(
        self, source: Source, model: nn.Module, modules: Sequence[Module], rounding: Rounding
    ) -> None:
        self._source = source
        self._formats = {m.path: allowed(m, _RUNNING)[0] for m in modules}
        self._fresh: nn.Module | None = None
        for path, fmt in self._formats.items():
            place = place_at(model, path)
            if fmt != DENSE:
                quantized = render_layer(place.get(), fmt, rounding, path)
                mx.eval(quantized.parameters())
                place.set(quantized)  # the dense weight is dropped here

    def begin(self) -> None:
        """Map the files again: a weight that was used stays in memory as long as its array."""
        from ...nn.accelerate import accelerate

        self._fresh, _ = open_model(self._source)
        accelerate(self._fresh, blocks=False, exact=False)

    def dense(self, path: str) -> nn.Module:
        if self._fresh is None:
            raise SensitivityError("begin() must be called before a full-precision weight is read")
        place = place_at(self._fresh, path)
        module = place.get()
        place.set(nn.Module())
        return module

    def running(self, path: str) -> Format:
        return self._formats[path]

    def drop(self, block: int | None) -> None:
        """The 4-bit weights stay."""


def open_reference(
    name: str, source: Source, model: nn.Module, modules: Sequence[Module], rounding: Rounding
) -> Reference:
    """The reference called `name`, "bf16" or "uniform4"; the latter makes `model` 4-bit.

    `model` is accelerated already, as its layers are those that run.
    """
    if name == "bf16":
        return Bf16(model, modules, source)
    return Uniform4(source, model, modules, rounding)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, without reading them."""
    return sum(array.nbytes for array in arrays(model.parameters()))
