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
from ...models.kinds import Kind, kind_of
from ...models.places import Wrapper
from ...models.roles import Module
from ...nn.layers import expert_rows
from ...nn.replay import Replay
from ...ops import metal
from ..replay.streamed import Drop, keep

# Rows of evidence that the average over all experts or heads counts as, for one seen less often.
PRIOR_ROWS = 16


@metal.restarts
def column_squares(
    model: nn.Module,
    modules: Sequence[Module],
    sequences: Sequence[Sequence[int]],
    *,
    drop: Drop = keep,
    progress: bool = True,
) -> dict[str, mx.array]:
    """Mean square of each input column, float32 `[in]`, `[experts, in]` or `[heads, in]`, by path.

    Modules whose columns multiply nothing are left out: an embedding that is only looked up, and
    a latent projection that is only run backwards, from the latent to keys. Each block runs on all
    sequences before the next one; `drop` is told when its weights are needed no more.
    """
    meters: dict[int | None, list[_Meter]] = defaultdict(list)
    with (
        Replay(model, modules) as replay,
        Progress(
            len(sequences) * len(model.layers), "measuring sensitivity", enabled=progress
        ) as bar,
    ):

        def metered(block: int | None, t: int) -> list[Any]:
            bar.step(block is not None)
            return [meter.until(t + 1, len(sequences)) for meter in meters[block]]

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
    return {meter.module.path: meter.mean() for meter in every if len(meter.sums) > 1}


class _Meter(Wrapper):
    """Sums the squares of what goes into `inner`; the output is never needed but its shape is.

    `sums` are squares and rows after each call, since what a call adds can be evaluated only when
    the blocks before it are.
    """

    def __init__(self, inner: nn.Module, module: Module) -> None:
        super().__init__(inner)
        kind = kind_of(inner)
        outer = () if kind is Kind.MATRIX else module.shape[:1]
        first = mx.zeros((*outer, module.shape[-1])), mx.zeros(outer)
        self.__dict__.update(module=module, kind=kind, sums=[first])

    def until(self, done: int, of: int) -> tuple[mx.array, mx.array]:
        """Squares and rows after the calls of `done` of `of` sequences."""
        sums: tuple[mx.array, mx.array] = self.sums[(len(self.sums) - 1) * done // of]
        return sums

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
        squares, rows = self.sums[-1]
        each = mx.square(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        self.sums.append((squares + mx.sum(each, axis=0), rows + each.shape[0]))

    def _add_experts(self, x: mx.array, indices: mx.array) -> None:
        squares, rows = self.sums[-1]
        each, experts, _ = expert_rows(x, indices)
        squares = squares.at[experts].add(mx.square(each.astype(mx.float32)))
        self.sums.append((squares, rows.at[experts].add(1.0)))

    def _add_heads(self, x: mx.array) -> None:
        """Of `x [..., heads or 1, n, in]`."""
        squares, rows = self.sums[-1]
        each = mx.square(x.reshape(-1, *x.shape[-3:]).astype(mx.float32))
        squares = squares + mx.sum(each, axis=(0, 2))
        self.sums.append((squares, rows + each.shape[0] * each.shape[2]))

    def mean(self) -> mx.array:
        squares: mx.array
        rows: mx.array
        squares, rows = self.sums[-1]
        if not rows.ndim:
            return squares / rows
        overall = mx.sum(squares, axis=0) / mx.sum(rows)
        return (squares + PRIOR_ROWS * overall) / (rows + PRIOR_ROWS)[:, None]
