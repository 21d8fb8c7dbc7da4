"""A decoder layer for one new token of each sequence, on a Metal GPU: one node, few launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..formats import DENSE
from . import metal, native
from .attention import TIMED_KEYS, quantize_kv
from .contest import Sample
from .layer import Formats, Layer

OP = "decode_layer"
GPU_ROWS = 16  # sequences, at most

At = tuple[int, int, int]  # index in the caches, keys with the new one, position in the sequence
# The layer by stock MLX: of its input, caches with one more key than they had, and where it goes.
Stock = Callable[[mx.array, mx.array, mx.array, At, Formats], mx.array]


class DecodeLayer:
    """A layer where its launches are proven and not slower; else whoever asks runs it."""

    def __init__(self, layer: Layer, stock: Stock) -> None:
        self.layer, self.stock = layer, stock
        self._launches: dict[Any, Any] = {}  # by dtype, sequences, formats
        self._native: dict[Any, Any] = {}
        self._refusals: dict[Any, str] = {}  # by dtype, sequences, formats, power of two of keys

    def step(
        self, h: mx.array, keys: mx.array, values: mx.array, at: At, formats: Formats
    ) -> list[mx.array] | None:
        """h `[B, 1, width]` after the layer, and the caches with the new token. None where stock
        MLX has to do it."""
        batch = h.shape[0]
        extension = metal.enabled()
        if extension is None or not 0 < batch <= GPU_ROWS or extension.traced(h):
            return None
        kind = h.dtype, batch, formats
        if kind not in self._launches:
            self._launches[kind] = self.layer.launch(*kind)
        launch = self._launches[kind]

        def ours(ext: ModuleType) -> list[mx.array]:
            out: list[mx.array] = ext.decode_layer(
                self._handle(ext, h.dtype, formats), h, keys, values, at
            )
            return out

        refused = partial(self._refused, launch, *kind, at[1])
        return metal.run(OP, launch, ours, lambda: None, refused)

    def _handle(self, ext: ModuleType, dtype: mx.Dtype, formats: Formats) -> Any:
        key = ext, dtype, formats
        if key not in self._native:
            self._native[key] = self.layer.native(ext, dtype, formats)
        return self._native[key]

    def _refused(
        self, launch: Any, dtype: mx.Dtype, batch: int, formats: Formats, keys: int
    ) -> str:
        """Asked for each power of two of keys, over made-up ones."""
        size = max(TIMED_KEYS, 1 << (keys - 1).bit_length())
        key = native.extension, dtype, batch, formats, size
        if key not in self._refusals:
            self._refusals[key] = self._contest(launch, dtype, batch, size, formats)
        return self._refusals[key]

    def _contest(
        self, launch: Any, dtype: mx.Dtype, batch: int, size: int, formats: Formats
    ) -> str:
        layer, at = self.layer, (size - 1, size, size - 1)
        shape = batch, layer.kv_heads, size, layer.dim
        made_up = [mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i in (1, 2)]
        keys, values = (
            a if f == DENSE else quantize_kv(a, f) for a, f in zip(made_up, formats, strict=True)
        )

        def ours(ext: ModuleType, x: mx.array) -> mx.array:
            out: mx.array = ext.decode_layer(
                self._handle(ext, dtype, formats), x, keys, values, at
            )[0]
            return out

        def stock(x: mx.array) -> mx.array:
            return self.stock(x, keys, values, at, formats)

        outs = " + ".join("x".join(map(str, w.shape)) for w in layer.weights)
        name = f"{batch} x {outs}, {layer.kv_heads} x {size} keys"
        reads = tuple(a for w in layer.weights for a in w[:3])
        sample = Sample(name, (batch, 1, layer.width), reads)
        return metal.refusal(OP, launch, dtype, ours, stock, sample)
