"""How many choices of experts change when a router is rounded.

A router picks the experts with the largest scores, so a small error does nothing, or sends a token
to another expert. What that does to the output is in the router's KL; how often it happens says how
far a plan may trust that KL on other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.places import Place, Wrapper
from ...models.roles import Module, Role
from ...nn.replay import Replay, Tape


class _Listener(Wrapper):
    """Notes the experts that the tokens of each call go to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.__dict__["asked"] = []

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(args[0] if args else kwargs.get("indices"))
        return self.inner(x, *args, **kwargs)


def flips(
    replay: Replay,
    tapes: Sequence[Tape],
    modules: Sequence[Module],
    router: Module,
    dense: nn.Module,
    rounded: Mapping[str, nn.Module],
) -> dict[str, float]:
    """The share of choices of experts that differ with each of `rounded` in the router's place.

    Empty where the choice cannot be seen, as of a gate of shared experts. Only what comes before
    the experts in the router's block is run.
    """
    place = _of_experts(replay, modules, router)
    if place is None or router.block not in replay.order or router.shape[0] == 1:
        return {}
    call = replay.order.index(router.block)
    listener = _Listener(place.get())

    def choices(layer: nn.Module) -> list[np.ndarray[Any, Any]] | None:
        found = []
        for tape in tapes:
            listener.asked.clear()
            with place.holding(listener), replay.place(router.path).holding(layer):
                replay.run(tape.tokens, tape.outputs, range(call, call + 1))
            if len(listener.asked) != 1 or not isinstance(listener.asked[0], mx.array):
                return None
            found.append(np.asarray(listener.asked[0]))
        return found

    before = choices(dense)
    if before is None:
        return {}
    shares: dict[str, float] = {}
    for name, layer in rounded.items():
        after = choices(layer)
        assert after is not None  # the same model
        kept = [
            (a[..., :, None] == b[..., None, :]).any(-1) for a, b in zip(before, after, strict=True)
        ]
        shares[name] = float(1 - sum(k.sum() for k in kept) / sum(k.size for k in kept))
    return shares


def _of_experts(replay: Replay, modules: Sequence[Module], router: Module) -> Place | None:
    """The place of the module that holds the experts of the router's block."""
    expert = next((m for m in modules if m.role is Role.EXPERT and m.block == router.block), None)
    if expert is None:
        return None
    holder = replay.place(expert.path).parent
    return next(
        (Place(m, k) for m in replay.model.modules() for k, v in m.items() if v is holder), None
    )
