"""What an adapter is before training: which layers, which ranks, which numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from ..models.adaptable import adaptable
from ..models.places import Wrapper, place_at
from ..models.roles import Module, Role
from . import ranks as rank_plans
from .layers import LowRank
from .options import RANKS, Training

_ROLES = {"attention": {Role.ATTENTION}, "mlp": {Role.MLP}}


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


def plan_ranks(
    options: Training, model: nn.Module, modules: Sequence[Module], gains: rank_plans.Gains | None
) -> dict[str, int]:
    """The ranks that `options` asks for; `gains` are those of `--ranks sensitivity`."""
    if options.ranks == "sensitivity":
        assert gains is not None
        return rank_plans.by_gain(modules, options.rank, gains)
    if options.ranks == "bits":
        bits = {m.path: bits_of(place_at(model, m.path).get()) for m in modules}
        return rank_plans.proportional(modules, options.rank, bits)
    if options.ranks == "uniform":
        return rank_plans.uniform(modules, options.rank)
    assert options.ranks not in RANKS
    return rank_plans.from_file(Path(options.ranks), modules)


def bits_of(layer: nn.Module) -> int:
    """Bits of a layer's weight, 16 where it is not quantized."""
    return int(getattr(layer, "bits", 16))


def zero(modules: Sequence[Module], ranks: Mapping[str, int], seed: int) -> dict[str, LowRank]:
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
