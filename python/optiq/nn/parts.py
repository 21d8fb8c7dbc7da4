"""The two ways to run the parts of a decoder block: natively, and composed of `mx.fast`.

Both have `project` (queries, keys and values of the block's input) and `attend` (all that follows
the cache). `Native` keeps the weights in the extension, so that a call builds one graph node.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..formats import DENSE, Format
from ..models.blocks import Block, Unknown
from ..ops import AffineWeight
from ..ops.attention import capped_attention, masking, packing
from .adapted import Adapted
from .layers import Linear, QuantizedLinear
from .sharded import Meeting, Summed
from .tiled import tiles_of

Mask = Any  # None, "causal" or an array that broadcasts to [batch, heads, rows, keys]
PLAIN = DENSE, DENSE  # formats of a cache that holds vectors


class Place(NamedTuple):
    """Where `rows` new rows go in a cache: from `start` on, so that it then has `length` rows. The
    first of them is at `position` of its sequence.
    """

    start: int
    length: int
    position: int
    rows: int


def module_at(block: nn.Module, path: str) -> Any:
    at: Any = block
    for key in path.split("."):
        at = at[key]
    return at


def matrix(block: nn.Module, path: str) -> tuple[Any, ...]:
    """(w, scales, biases, group size, bits, bias, tiles) of a linear layer, None and 0 where dense.

    Raises Unknown for a layer that computes something else.
    """
    layer = module_at(block, path)
    if isinstance(layer, Adapted | Summed):
        layer = layer.linear
    bias = layer.get("bias")
    if type(layer) in (Linear, nn.Linear):
        return layer["weight"], None, None, 0, 0, bias, None
    if type(layer) in (QuantizedLinear, nn.QuantizedLinear) and layer.mode == "affine":
        arrays = layer["weight"], layer["scales"], layer["biases"]
        return *arrays, layer.group_size, layer.bits, bias, tiles_of(layer)
    mode = f" in {layer.mode}" if hasattr(layer, "mode") else ""
    raise Unknown(f"{path} is a {type(layer).__name__}{mode}")


def norm(block: nn.Module, path: str | None) -> tuple[mx.array, float] | None:
    """(weight, eps) of an RMSNorm, None for no norm."""
    if path is None:
        return None
    layer = module_at(block, path)
    if "RMSNorm" not in type(layer).__name__ or set(layer) != {"weight"}:
        raise Unknown(f"{path} is a {type(layer).__name__}")
    return layer["weight"], float(layer.eps)


class Description:
    """The parts of a block as plain values, read once."""

    def __init__(self, block: nn.Module, anatomy: Block) -> None:
        a, m, norms = anatomy.attention, anatomy.mlp, anatomy.norms
        self.plus_one, self.saturates = norms.plus_one, anatomy.saturates
        out = module_at(block, a.out)
        self.meeting: Meeting | None = out.meeting if isinstance(out, Summed) else None
        if self.meeting and anatomy.shares:
            raise Unknown("its ranks meet in it, so it runs by its layers")
        self.attention: dict[str, Any] = {
            "qkv": [matrix(block, p) for p in a.qkv],
            "out": matrix(block, a.out),
            "heads": a.heads,
            "kv_heads": a.kv_heads,
            "scale": a.scale,
            "norm": norm(block, norms.attention_in),
            "q_norm": norm(block, a.q_norm),
            "k_norm": norm(block, a.k_norm),
            "v_norm": None if a.v_norm_eps is None else (None, a.v_norm_eps),
            "post_norm": norm(block, norms.attention_post),
            "whole_norm": a.whole_norm,
            "sinks": module_at(block, a.sinks) if a.sinks else None,
            "softcap": a.softcap,
            "gain": anatomy.gain,
        }
        self.width: int = self.attention["out"][0].shape[0]  # of the residual stream
        self.rope = a.rope
        self.mlp: dict[str, Any] | None = None
        if m is not None:
            self.mlp = {
                "gate_up": [matrix(block, p) for p in m.gate_up],
                "down": matrix(block, m.down),
                "activation": m.activation,
                "norm": norm(block, norms.mlp_in),
                "post_norm": norm(block, norms.mlp_post),
                "gain": anatomy.gain,
            }

        paths = [*a.qkv, a.out, *((*m.gate_up, m.down) if m else ())]
        layers = [module_at(block, path) for path in paths]
        self.adapted = [at if isinstance(at, Adapted) else None for at in layers]
        linear = [at.linear if isinstance(at, Adapted | Summed) else at for at in layers]
        self.exact = any(getattr(layer, "exact", False) for layer in linear)

    def launches(self) -> list[list[AffineWeight]]:
        """The quantized matrices of each product with several of them, or one."""
        a, m = self.attention, self.mlp
        products = [a["qkv"], [a["out"]], *((m["gate_up"], [m["down"]]) if m else ())]
        return [[AffineWeight(*w[:5]) for w in p] for p in products if quantized_parts(p)]

    def add_one(self) -> None:
        """To the weights of the norms."""
        for part in (self.attention, self.mlp or {}):
            for name in ("norm", "q_norm", "k_norm", "post_norm"):
                if part.get(name) is not None:
                    weight, eps = part[name]
                    part[name] = 1.0 + weight.astype(mx.float32), eps


class Native:
    """Runs a block in the extension, on the CPU in float32."""

    def __init__(self, ext: ModuleType, block: nn.Module, anatomy: Block) -> None:
        d = Description(block, anatomy)
        self.ext = ext
        self.block = ext.DecoderBlock(d.exact, d.meeting and d.meeting.native)
        if d.plus_one:
            d.add_one()
        r = d.rope
        rope = (r.dims, r.traditional, list(r.frequencies), r.magnitude) if r else None
        self.block.set_attention(**d.attention, rope=rope)
        if d.mlp is not None:
            self.block.set_mlp(**d.mlp)
        self._step = ext.block_step
        adapted = [a for a in d.adapted if a is not None]
        self._selection = adapted[0].selection if adapted else None
        if adapted:
            self.block.set_terms([a and a.terms.native for a in d.adapted])

    @property
    def slots(self) -> list[int]:
        """Of the adapters of the rows; empty where there are none."""
        chosen = self._selection.slots if self._selection else []
        return chosen if any(chosen) else []

    def only(self, row: int) -> AbstractContextManager[None]:
        """While this row of a batch runs by itself."""
        return self._selection.only(row) if self._selection else nullcontext()

    def step(
        self,
        x: mx.array,
        keys: Sequence[mx.array],
        values: Sequence[mx.array],
        places: Sequence[Place],
        mask: Mask,
        mlp: bool,
        formats: tuple[Format, Format] = PLAIN,
    ) -> list[mx.array]:
        """The block with the new rows put in their places: of one cache for the whole batch, of a
        cache for each row, or of none. Gives the output, then keys and values of each cache.
        """
        name, array = masking(mask)
        packings = [packing(f) for f in formats]
        out: list[mx.array] = self._step(
            self.block, x, keys, values, places, name, array, mlp, *packings, self.slots
        )
        return out

    def project(self, x: mx.array, offset: int | mx.array) -> list[mx.array]:
        if isinstance(offset, mx.array):
            offsets = mx.broadcast_to(offset, (x.shape[0],))
            out: list[mx.array] = self.ext.block_project(self.block, x, 0, offsets, self.slots)
        else:
            out = self.ext.block_project(self.block, x, offset, slots=self.slots)
        return out

    def attend(
        self,
        x: mx.array,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        mask: Mask,
        mlp: bool,
        k_format: Format = DENSE,
        v_format: Format = DENSE,
        **stored: Any,
    ) -> mx.array:
        """What follows the cache; keys, values and what is `stored` with them (`starts`, `first`,
        `recent`) as in `ops.quantized_attention`.
        """
        name, array = masking(mask)
        formats = packing(k_format), packing(v_format)
        out: mx.array = self.ext.block_attend(
            self.block, x, q, [k], [v], name, array, mlp, *formats, slots=self.slots, **stored
        )
        return out

    def attend_each(
        self, x: mx.array, q: mx.array, keys: Sequence[mx.array], values: Sequence[mx.array]
    ) -> mx.array:
        """What follows the cache, with plain vectors of each row, of which it sees all."""
        out: mx.array = self.ext.block_attend(
            self.block, x, q, keys, values, "", None, True, slots=self.slots
        )
        return out


class Composed:
    """Runs a block on `mx.fast`, the products of one input in one launch."""

    ext = None

    def __init__(self, block: nn.Module, anatomy: Block) -> None:
        self.d = Description(block, anatomy)
        if any(self.d.adapted):
            raise Unknown("an adapter lies beside its projections")
        if self.d.meeting:
            raise Unknown("its ranks meet between its halves")
        if rope := self.d.rope:
            self.wavelengths = mx.array([1 / f if f else mx.inf for f in rope.frequencies])

    def project(self, x: mx.array, offset: int | mx.array) -> list[mx.array]:
        a, one = self.d.attention, self.d.plus_one
        y: Any = _products(_norm(x, a["norm"], one), a["qkv"])
        heads, kv_heads = a["heads"], a["kv_heads"]
        if len(y) == 1:
            dim = y[0].shape[-1] // (heads + 2 * kv_heads)
            y = mx.split(y[0], [heads * dim, (heads + kv_heads) * dim], axis=-1)
        if len(y) == 2:
            y = [*y, y[1]]
        out = []
        for part, n, which in zip(y, (heads, kv_heads, kv_heads), "qkv", strict=True):
            own = a[f"{which}_norm"]
            part = _norm(part, own, one) if a["whole_norm"] else part
            part = part.reshape(*part.shape[:-1], n, -1)
            part = part if a["whole_norm"] else _norm(part, own, one)
            out.append(part.swapaxes(1, 2))
        return [self._rotate(out[0], offset), self._rotate(out[1], offset), out[2]]

    def attend(
        self,
        x: mx.array,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        mask: Mask,
        mlp: bool,
        **stored: Any,
    ) -> mx.array:
        a, m, one = self.d.attention, self.d.mlp, self.d.plus_one
        if stored:
            options = {name: a[name] for name in ("scale", "sinks", "softcap")}
            y = ops.quantized_attention(q, k, v, mask=mask, **options, **stored)
        elif a["softcap"]:
            y = capped_attention(q * a["scale"], k, v, mask, a["softcap"])
        else:
            y = mx.fast.scaled_dot_product_attention(
                q, k, v, scale=a["scale"], mask=mask, sinks=a["sinks"]
            )
        y = y.swapaxes(1, 2).reshape(*x.shape[:-1], -1)
        h = self._add(x, _products(y, [a["out"]])[0], a)
        if not mlp or m is None:
            return h
        parts = _products(_norm(h, m["norm"], one), m["gate_up"])
        gate, up = parts if len(parts) == 2 else mx.split(parts[0], 2, axis=-1)
        gated = _swiglu if m["activation"] == "silu" else _geglu
        return self._add(h, _products(gated(gate, up), [m["down"]])[0], m)

    def _add(self, h: mx.array, y: mx.array, layer: dict[str, Any]) -> mx.array:
        y = _norm(y, layer["post_norm"], self.d.plus_one)
        y = y if layer["gain"] == 1.0 else layer["gain"] * y
        return _saturating_sum(h, y) if self.d.saturates and h.dtype == mx.float16 else h + y

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        r = self.d.rope
        if r is None:
            return x
        if r.magnitude != 1.0:
            x = mx.concatenate([x[..., : r.dims] * r.magnitude, x[..., r.dims :]], axis=-1)
        return mx.fast.rope(
            x,
            r.dims,
            traditional=r.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.wavelengths,
        )


def _norm(x: mx.array, n: tuple[mx.array | None, float] | None, plus_one: bool = False) -> mx.array:
    if n is None:
        return x
    weight, eps = n
    if plus_one and weight is not None:
        weight = 1.0 + weight
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    out: mx.array = nn.silu(gate) * up
    return out


@partial(mx.compile, shapeless=True)
def _geglu(gate: mx.array, up: mx.array) -> mx.array:
    out: mx.array = nn.gelu_approx(gate) * up
    return out


@partial(mx.compile, shapeless=True)
def _saturating_sum(h: mx.array, y: mx.array) -> mx.array:
    top = mx.finfo(mx.float16).max
    return mx.clip(h.astype(mx.float32) + y.astype(mx.float32), -top, top).astype(mx.float16)


def quantized_parts(parts: list[tuple[Any, ...]]) -> bool:
    return all(scales is not None for _, scales, *_ in parts)


def _products(x: mx.array, parts: list[tuple[Any, ...]]) -> list[mx.array]:
    """One launch where all are quantized."""
    if quantized_parts(parts):
        out = ops.mixed_quantized_matmul(x, [AffineWeight(*part[:5]) for part in parts])
    else:
        out = [_product(x, *part[:5]) for part in parts]
    return [y if p[5] is None else y + p[5] for y, p in zip(out, parts, strict=True)]


def _product(
    x: mx.array, w: mx.array, scales: Any, biases: Any, group_size: int, bits: int
) -> mx.array:
    if scales is None:
        return ops.linear(x, w)
    return ops.quantized_matmul(x, w, scales, biases, group_size=group_size, bits=bits)
