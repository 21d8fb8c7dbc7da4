"""How strongly each input column of a layer is driven: the weights of the rounding search.

A layer's output error is sum over tokens of (dw . x)^2; its diagonal part weighs the error of
column k by the second moment of x_k (the "importance matrix" of llama.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...base.progress import Progress
from ...models.blocks import whole_text_caches
from ...models.kinds import Kind, kind_of
from ...models.places import Wrapper, place_at
from ...models.roles import Module
from ...nn.layers import expert_rows
from ...ops import metal

# Rows of evidence that the average over all experts or heads counts as, for one seen less often.
PRIOR_ROWS = 16


@metal.restarts
def column_squares(
    model: nn.Module,
    modules: Sequence[Module],
    sequences: Sequence[Sequence[int]],
    *,
    progress: bool = True,
) -> dict[str, mx.array]:
    """Mean square of each input column, float32 `[in]`, `[experts, in]` or `[heads, in]`, by path.

    Modules whose columns multiply nothing are left out: an embedding that is only looked up, and
    a latent projection that is only run backwards, from the latent to keys.
    """
    meters = {m.path: _Meter(place_at(model, m.path).get(), m) for m in modules}
    for path, meter in meters.items():
        place_at(model, path).set(meter)
    total = sum(len(tokens) for tokens in sequences)
    try:
        with Progress(total, "measuring sensitivity", enabled=progress) as bar:
            for tokens in sequences:
                caches = whole_text_caches(model)
                model(mx.array([list(tokens)]), **({"cache": caches} if caches else {}))
                mx.eval([(m.squares, m.rows) for m in meters.values()])
                bar.step(len(tokens))
    finally:
        for path, meter in meters.items():
            place_at(model, path).set(meter.inner)
    return {path: meter.mean() for path, meter in meters.items() if meter.seen}


class _Meter(Wrapper):
    """Sums the squares of what goes into `inner`; the output is never needed but its shape is."""

    def __init__(self, inner: nn.Module, module: Module) -> None:
        super().__init__(inner)
        self.kind = kind_of(inner)
        outer = () if self.kind is Kind.MATRIX else module.shape[:1]
        self.squares = mx.zeros((*outer, module.shape[-1]))
        self.rows = mx.zeros(outer)
        self.seen = False

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
        rows = mx.square(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        self.squares = self.squares + mx.sum(rows, axis=0)
        self.rows = self.rows + rows.shape[0]
        self.seen = True

    def _add_experts(self, x: mx.array, indices: mx.array) -> None:
        rows, experts, _ = expert_rows(x, indices)
        self.squares = self.squares.at[experts].add(mx.square(rows.astype(mx.float32)))
        self.rows = self.rows.at[experts].add(1.0)
        self.seen = True

    def _add_heads(self, x: mx.array) -> None:
        """Of `x [..., heads or 1, n, in]`."""
        rows = mx.square(x.reshape(-1, *x.shape[-3:]).astype(mx.float32))
        self.squares = self.squares + mx.sum(rows, axis=(0, 2))
        self.rows = self.rows + rows.shape[0] * rows.shape[2]
        self.seen = True

    def mean(self) -> mx.array:
        if not self.rows.ndim:
            return self.squares / self.rows
        overall = mx.sum(self.squares, axis=0) / mx.sum(self.rows)
        return (self.squares + PRIOR_ROWS * overall) / (self.rows + PRIOR_ROWS)[:, None]
