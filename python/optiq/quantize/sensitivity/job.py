"""What both methods share: the work to do, and how it is cut into units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

import mlx.nn as nn

from ...distributed.ranks import ALONE, World
from ...errors import SensitivityError
from ...formats import DENSE, Format
from ...models.roles import Module
from ...nn.accelerate import quantized
from ..rounding.reference import Reference
from ..rounding.render import render_layer
from ..rounding.weights import Rounding
from .checkpoint import Checkpoint, Totals
from .weight_error import relative_error

# Tokens whose block outputs are kept at a time. A layer is rounded once per batch and format, so
# a batch must be worth that; all of a batch's tokens are in memory at every block.
BATCH_TOKENS = 4096

# What the checkpoint keeps beside the rounds: a "unit" for each module and format.
WEIGHT_ERRORS = "weight errors"
# And here one for each batch, router and format: the share of choices that change, and the tokens.
FLIPS = "flips"

# The batch, and the step within it.
Unit = tuple[int, int]


@dataclass
class Job:
    """One round: score every module of `formats` in each of its formats on `sequences` of tokens.

    A measurement is one or more rounds, told apart by `name`. `formats` is by module path; a
    module that it lacks is left alone.
    """

    model: nn.Module
    modules: Sequence[Module]
    formats: dict[str, tuple[Format, ...]]
    sequences: Sequence[Sequence[int]]
    reference: Reference
    checkpoint: Checkpoint
    rounding: Rounding
    seed: int
    progress: bool
    name: str = "0"
    world: World = ALONE

    def rounded(self, module: Module) -> list[Format]:
        """The formats of `module` that change its weight."""
        return [fmt for fmt in self.formats.get(module.path, ()) if fmt != DENSE]

    def render(self, module: Module, layer: nn.Module, fmt: Format) -> nn.Module:
        """`layer`, which has the module's weight or rows of it, rounded as it would be shipped.

        The error of a whole weight is noted the first time.
        """
        rounded = render_layer(layer, fmt, self.rounding, module.path)
        whole = layer.weight.shape == module.shape
        if whole and self.weight_error(module.path, str(fmt)) is None:
            self.note_error(module.path, str(fmt), relative_error(layer, rounded))
        return rounded

    def render_together(
        self, module: Module, layer: nn.Module, formats: Sequence[Format]
    ) -> list[nn.Module]:
        """`render` in each of the formats, which the ranks divide."""
        own: dict[int, Any] = {}
        for n in self.world.share([1.0] * len(formats)):
            made = self.render(module, layer, formats[n])
            own[n] = made.weight, made.scales, made.get("biases")
        parts = zip(formats, self.world.join(own), strict=True)
        return [quantized(layer, w, scales, biases, fmt) for fmt, (w, scales, biases) in parts]

    def note_error(self, path: str, fmt: str, error: float) -> None:
        """Keep the relative error of a module's weight in a format."""
        noted = self.checkpoint.units(WEIGHT_ERRORS)
        noted[f"{path} {fmt}"] = {path: {fmt: [error]}}

    def weight_error(self, path: str, fmt: str) -> float | None:
        """The relative error of a module's weight in a format, if it has been noted."""
        found = self.checkpoint.units(WEIGHT_ERRORS).get(f"{path} {fmt}")
        return found[path][fmt][0] if found else None

    def note_flips(self, batch: int, path: str, shares: Mapping[str, float]) -> None:
        """Keep how many of a batch's choices a router changes in each format."""
        tokens = float(sum(len(self.sequences[i]) for i in self.batches()[batch]))
        for fmt, share in shares.items():
            self.checkpoint.units(FLIPS)[f"{batch} {path} {fmt}"] = {path: {fmt: [share, tokens]}}

    def flips(self, path: str, fmt: str) -> float | None:
        """The share of its choices that a router changes in a format, if it has been noted."""
        noted = (found.get(path, {}).get(fmt) for found in self.checkpoint.units(FLIPS).values())
        each = [share_and_tokens for share_and_tokens in noted if share_and_tokens]
        tokens = sum(n for _, n in each)
        return sum(share * n for share, n in each) / tokens if tokens else None

    def batches(self) -> list[list[int]]:
        """Indices of the sequences, in order, at most BATCH_TOKENS tokens together or one each."""
        batches: list[list[int]] = []
        room = 0
        for i, tokens in enumerate(self.sequences):
            if len(tokens) > room:
                batches.append([])
                room = BATCH_TOKENS
            batches[-1].append(i)
            room -= len(tokens)
        return batches

    def blocks(self) -> list[list[Module]]:
        """The modules that there is work for, a list for each block."""
        work = [m for m in self.modules if self.rounded(m)]
        return [list(group) for _, group in groupby(work, key=lambda m: m.block)]

    def share(self, steps: Sequence[Sequence[Module]]) -> list[Unit]:
        """The units that this rank has to do: every size-th of those that are `waiting`.

        Neighbours cost about the same, so all ranks get about as much work.
        """
        return self.waiting(steps)[self.world.rank :: self.world.size]

    def waiting(self, steps: Sequence[Sequence[Module]]) -> list[Unit]:
        """The units that nobody has done.

        A unit scores the modules of one of `steps` on one batch. Raises SensitivityError when the
        checkpoint has units of another measurement.
        """
        batches = self.batches()
        units = [(b, s) for b in range(len(batches)) for s in range(len(steps))]
        scored = [{(m.path, str(f)) for m in step for f in self.rounded(m)} for step in steps]
        self.checkpoint.check(
            self.name, {_name((b, s)): (scored[s], len(batches[b])) for b, s in units}
        )
        done = self.checkpoint.units(self.name)
        return [unit for unit in units if _name(unit) not in done]

    def done(self) -> list[Unit]:
        """The units that are done, in order."""
        return sorted(map(_unit, self.checkpoint.units(self.name)))

    def save(self, unit: Unit, totals: Totals) -> None:
        """Keep what a unit found; SensitivityError when it is not finite."""
        for path, columns in totals.items():
            for fmt, column in columns.items():
                if not all(map(isfinite, column)):
                    raise SensitivityError(
                        f"the score of {path} in {fmt} is not finite; "
                        f"the model overflows with it: remove {fmt} from --formats"
                    )
        self.checkpoint.units(self.name)[_name(unit)] = totals
        self.checkpoint.save()

    def share_errors(self) -> None:
        """Take over the weight errors that the other ranks have noted."""
        own = self.checkpoint.units(WEIGHT_ERRORS)
        for theirs in self.world.gather(own):
            own.update(theirs)

    def collect(self) -> Totals:
        """The totals of all sequences, when every rank has done its share; the same on all."""
        units, *beside = (self.checkpoint.units(n) for n in (self.name, WEIGHT_ERRORS, FLIPS))
        for theirs, *their_others in self.world.gather((units, *beside)):
            units.update(theirs)
            for own, others in zip(beside, their_others, strict=True):
                own.update(others)
        found: Totals = {}
        for unit in self.done():
            for path, columns in units[_name(unit)].items():
                for fmt, column in columns.items():
                    found.setdefault(path, {}).setdefault(fmt, []).extend(column)
        return found


def _name(unit: Unit) -> str:
    return f"{unit[0]}/{unit[1]}"


def _unit(name: str) -> Unit:
    batch, step = map(int, name.split("/"))
    return batch, step
