"""How strongly each input column of a layer is driven: the weights of the rounding search.

A layer's output error is sum over tokens of (dw . x)^2; its diagonal part weighs the error of
column k by the second moment of x_k (the "importance matrix" of llama.cpp).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...base.progress import Progress
from ...distributed.ranks import ALONE, World
from ...models.kinds import Kind, kind_of
from ...models.places import Wrapper
from ...models.roles import Module
from ...nn.layers import expert_rows
from ...nn.replay import Replay
from ...ops import metal
from ..replay.streamed import Drop, keep

# Rows of evidence that the average over all experts or heads counts as, for one seen less often.
PRIOR_ROWS = 16


# Of one call: the squares of each column, and the rows.
Sums = tuple[mx.array, mx.array]


def column_squares(
    model: nn.Module,
    modules: Sequence[Module],
    sequences: Sequence[Sequence[int]],
    *,
    drop: Drop = keep,
    progress: bool = True,
    world: World = ALONE,
) -> dict[str, mx.array]:
    """Mean square of each input column, float32 `[in]`, `[experts, in]` or `[heads, in]`, by path.

    Modules whose columns multiply nothing are left out: an embedding that is only looked up, and
    a latent projection that is only run backwards, from the latent to keys. Each block runs on all
    sequences before the next one; `drop` is told when its weights are needed no more. The ranks of
    `world` divide the sequences, whose sums are added up in their order.
    """
    own = world.share([len(tokens) for tokens in sequences])
    found = _sums(model, modules, [sequences[i] for i in own], drop, progress)
    of_all = world.join(dict(zip(own, found, strict=True)))
    means: dict[str, mx.array] = {}
    for path in of_all[0]:
        if calls := [call for of in of_all for call in of[path]]:
            means[path] = _mean(calls)
            mx.eval(means[path])
    return means


@metal.restarts
def _sums(
    model: nn.Module,
    modules: Sequence[Module],
    sequences: Sequence[Sequence[int]],
    drop: Drop,
    progress: bool,
) -> list[dict[str, list[Sums]]]:
    """Of each sequence: by path, the sums of each call."""
    meters: dict[int | None, list[_Meter]] = defaultdict(list)
    with (
        Replay(model, modules) as replay,
        Progress(
            len(sequences) * len(model.layers), "measuring sensitivity", enabled=progress
        ) as bar,
    ):

        def metered(block: int | None, t: int) -> list[Any]:
            bar.step(block is not None)
            return [meter.of(t, len(sequences)) for meter in meters[block]]

        for m in modules:
            place = replay.place(m.path)
            meter = _Meter(place.get(), m)
            place.set(meter)
            meters[m.block].append(meter)
        every = [meter for of in meters.values() for meter in of]
        try:
            replay.record_together(sequences, after=drop, beside=metered, thin=True)
        finally:
            for meter in every:
                replay.place(meter.module.path).set(meter.inner)
    count = len(sequences)
    return [{meter.module.path: meter.of(t, count) for meter in every} for t in range(count)]


def _mean(calls: Sequence[Sums]) -> mx.array:
    squares, rows = calls[0]
    for more, and_rows in calls[1:]:
        squares, rows = squares + more, rows + and_rows
    if not rows.ndim:
        return squares / rows
    overall = mx.sum(squares, axis=0) / mx.sum(rows)
    return (squares + PRIOR_ROWS * overall) / (rows + PRIOR_ROWS)[:, None]


class _Meter(Wrapper):
    """Sums the squares of what goes into `inner`; the output is never needed but its shape is.

    What a call adds is kept apart, since it can be evaluated only when the blocks before it are.
    """

    def __init__(self, inner: nn.Module, module: Module) -> None:
        super().__init__(inner)
        self.__dict__.update(module=module, kind=kind_of(inner), calls=[])

    def of(self, sequence: int, count: int) -> list[Sums]:
        """The calls of one of `count` sequences."""
        each = len(self.calls) // count
        calls: list[Sums] = self.calls[sequence * each : (sequence + 1) * each]
        return calls

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.kind is Kind.EXPERTS:
            self._add_experts(x, args[0])
        elif self.kind is Kind.HEADS:
            if kwargs.get("transpose", True) and all(args):
                self._add_heads(x)
        elif mx.issubdtype(x.dtype, mx.floating):  # not the token ids of a lookup
            self._add(x)
        out: mx.array = self.inner(x, *args, **kwargs)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        self._add(x)
        out: mx.array = self.inner.as_linear(x)
        return out

    def _add(self, x: mx.array) -> None:
        each = mx.square(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        self.calls.append((mx.sum(each, axis=0), mx.array(float(each.shape[0]))))

    def _add_experts(self, x: mx.array, indices: mx.array) -> None:
        each, experts, _ = expert_rows(x, indices)
        count, columns = self.module.shape[0], self.module.shape[-1]
        squares = mx.zeros((count, columns)).at[experts].add(mx.square(each.astype(mx.float32)))
        self.calls.append((squares, mx.zeros(count).at[experts].add(1.0)))

    def _add_heads(self, x: mx.array) -> None:
        """Of `x [..., heads or 1, n, in]`."""
        each = mx.square(x.reshape(-1, *x.shape[-3:]).astype(mx.float32))
        heads, columns = self.module.shape[0], self.module.shape[-1]
        squares = mx.broadcast_to(mx.sum(each, axis=(0, 2)), (heads, columns))
        self.calls.append((squares, mx.full(heads, float(each.shape[0] * each.shape[2]))))
