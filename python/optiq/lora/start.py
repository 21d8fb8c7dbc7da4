"""What an adapter is before training: which layers, which ranks, which numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.progress import Progress
from ..errors import UsageError
from ..models.adaptable import adaptable
from ..models.places import Wrapper, place_at
from ..models.roles import Module, Role
from . import ranks as plans
from .closed_form import Repair, left_vectors, principal, repair
from .data import Sample
from .layers import LowRank, dense
from .moments import FloatArray, moments
from .options import Training
from .tuned import Tuned

PROBED = 64  # samples that moments and gradients are measured on

_ROLES = {"attention": {Role.ATTENTION}, "mlp": {Role.MLP}}
Terms = dict[str, LowRank]


@dataclass(frozen=True)
class Start:
    """`minus`: what is taken away from each layer again, so that its output is the base's at first.

    `notes` say what the ranks came from.
    """

    terms: Terms
    minus: Terms = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class _Listener(Wrapper):
    """Knows whether its layer is called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.called = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.called = True
        return self.inner(*args, **kwargs)


def chosen(model: nn.Module, targets: str) -> list[Module]:
    """The layers that `targets` names and a run calls: some blocks of Gemma 4 read the keys and
    values of another, and have projections that nothing calls.

    Raises UsageError where there are none, and for experts.
    """
    wanted = [m for m in adaptable(model) if targets == "all" or m.role in _ROLES[targets]]
    experts = [m.path for m in wanted if m.role is Role.EXPERT]
    if experts:
        raise UsageError(
            f"{experts[0]} holds experts, which cannot be adapted here; use --targets attention, "
            "or --targets mlp for the shared experts"
        )
    listeners = {m.path: _Listener(place_at(model, m.path).get()) for m in wanted}
    for path, listener in listeners.items():
        place_at(model, path).set(listener)
    try:
        model(mx.array([[1, 2, 3, 4]]))
    finally:
        for path, listener in listeners.items():
            place_at(model, path).set(listener.inner)
    found = [m for m in wanted if listeners[m.path].called]
    if not found:
        raise UsageError(f"the model has no linear layers in its blocks for --targets {targets}")
    return found


class Beginning:
    """Makes the `Start` of a run; `original` is the model that the base was quantized from, and
    `lost` what the score of each layer says that its format costs, in nats."""

    def __init__(
        self,
        options: Training,
        model: nn.Module,
        modules: Sequence[Module],
        samples: Sequence[Sample],
        *,
        original: nn.Module | None = None,
        lost: Mapping[str, float] | None = None,
        progress: bool = True,
    ) -> None:
        self.options, self.model, self.modules = options, model, modules
        self.samples = samples[:PROBED]
        self.original, self.lost, self.progress = original, lost, progress
        self._repairs: dict[str, Repair] = {}

    def make(self) -> Start:
        """Raises UsageError where what is asked for needs the original."""
        ranks, notes = self._ranks()
        seed, scale = self.options.seed, self.options.scale
        if self.options.init == "zero":
            return Start(zero(self.modules, ranks, seed), notes=notes)
        if self.options.init == "qera":
            repairs = self._repaired()
            terms = {path: repairs[path].term(rank, scale) for path, rank in ranks.items()}
            return Start(terms, notes=notes)
        terms = {
            path: principal(weight_of(place_at(self.model, path).get()), rank, scale)
            for path, rank in ranks.items()
        }
        return Start(terms, dict(terms), notes)

    def _ranks(self) -> tuple[dict[str, int], tuple[str, ...]]:
        options, modules = self.options, self.modules
        if options.ranks == "uniform":
            return plans.uniform(modules, options.rank), ()
        if options.ranks == "bits":
            bits = {m.path: bits_of(place_at(self.model, m.path).get()) for m in modules}
            return plans.proportional(modules, options.rank, bits), ()
        if options.ranks != "sensitivity":
            return plans.from_file(Path(options.ranks), modules), ()
        parts, notes = [self._task_gains()], ["gradient of the task"]
        if self.original is not None and self.lost is not None:
            parts.append(self._repair_gains(self.lost))
            notes.append("what quantization lost and a rank repairs")
        return plans.by_gain(modules, options.rank, plans.combined(parts)), tuple(notes)

    def _task_gains(self) -> dict[str, list[float]]:
        """Squared singular values of the loss's gradient at each weight, of a random projection.

        With b = 0 the gradient at b is scale * a' G', so terms of a random orthonormal `a` see the
        gradient G without its ever being made.
        """
        terms = {}
        for i, m in enumerate(self.modules):
            rank = min(plans.MOST * self.options.rank, *m.shape)
            terms[m.path] = LowRank(_orthonormal(m, rank, i), mx.zeros((rank, m.shape[0])))
        tuned = Tuned(self.model, terms, 1.0, recompute=self.options.recompute)
        total: dict[str, FloatArray] = {}
        packs = tuned.packs(self.samples, self.options.pack_length)
        with tuned, Progress(len(packs), "gradients", enabled=self.progress) as bar:
            for packed in packs:
                of = partial(tuned.summed, packed)
                _, found = tuned.loss_and_gradients(tuned.parameters(), of)
                for path in terms:
                    gradient = np.asarray(found[f"{path}.lora_b"], np.float64)
                    total[path] = total.get(path, np.zeros(())) + gradient
                bar.step()
        tuned.remove()
        widths = {m.path: m.shape[1] for m in self.modules}
        return {
            path: list(left_vectors(g, len(g))[0][: len(g)] * widths[path] / len(g))
            for path, g in total.items()
        }

    def _repair_gains(self, lost: Mapping[str, float]) -> dict[str, list[float]]:
        """The score of a layer's format, times the part of its output error that a rank repairs."""
        most = plans.MOST * self.options.rank
        return {
            path: list(lost.get(path, 0.0) * found.energies[:most] / found.energies.sum())
            for path, found in self._repaired().items()
            if found.energies.sum() > 0
        }

    def _repaired(self) -> dict[str, Repair]:
        if self._repairs:
            return self._repairs
        if self.original is None:
            raise UsageError(
                "--init qera repairs what quantization lost, so it needs the model from before; "
                "give it as --original MODEL"
            )
        n = len(self.samples) + len(self.modules)
        with Progress(n, "errors of layers", enabled=self.progress) as bar:
            found = moments(self.model, self.modules, self.samples, bar.step)
            for m in self.modules:
                error = error_of(self.model, self.original, m)
                most = plans.MOST * self.options.rank
                self._repairs[m.path] = repair(error, found.pop(m.path), most)
                bar.step(note=m.path)
        return self._repairs


def error_of(model: nn.Module, original: nn.Module, module: Module) -> FloatArray:
    """Weight of the original less that of the base, [out, in]. Raises UsageError."""
    try:
        dense: Any = place_at(original, module.path).get()
        weight = weight_of(dense)
    except (KeyError, IndexError, AttributeError, TypeError):
        raise UsageError(f"the original has no layer {module.path}; give the base's own") from None
    if weight.shape != module.shape:
        raise UsageError(
            f"{module.path} is {weight.shape} in the original and {module.shape} in the base; give "
            "the model that the base was quantized from"
        )
    error: FloatArray = weight - weight_of(place_at(model, module.path).get())
    return error


def weight_of(layer: Any) -> FloatArray:
    """The weight that a layer holds or stands for."""
    return np.asarray(dense(layer), np.float64)


def bits_of(layer: nn.Module) -> int:
    """Bits of a layer's weight, 16 where it is not quantized."""
    return int(getattr(layer, "bits", 16))


def zero(modules: Sequence[Module], ranks: Mapping[str, int], seed: int) -> Terms:
    """Terms that add nothing yet: a is random as in mlx-lm, b is zero."""
    terms = {}
    keys = mx.random.split(mx.random.key(seed), len(modules))
    for module, key in zip(modules, keys, strict=True):
        if rank := ranks.get(module.path, 0):
            out, width = module.shape
            bound = width**-0.5
            a = mx.random.uniform(-bound, bound, (width, rank), key=key)
            terms[module.path] = LowRank(a, mx.zeros((rank, out)))
    return terms


def _orthonormal(module: Module, rank: int, seed: int) -> mx.array:
    draw = np.random.default_rng([seed, rank]).normal(size=(module.shape[1], rank))
    return mx.array(np.linalg.qr(draw)[0].astype(np.float32))
