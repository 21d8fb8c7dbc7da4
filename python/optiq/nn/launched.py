"""A decoder block on a Metal GPU as one node of few launches, for one new token of each sequence.

What it cannot do (prompts, masks, caches that have to make room first) is composed of `mx.fast`, as
`Composed` does it, and so is what is slower.
"""

from __future__ import annotations

from functools import reduce

import mlx.core as mx
import mlx.nn as nn

from ..formats import DENSE
from ..models.blocks import Block, Unknown
from ..ops import AffineWeight, quantize_kv
from ..ops.decode_layer import At, DecodeLayer
from ..ops.layer import Formats, Layer, Norm
from .parts import PLAIN, Composed, Place, quantized_parts

MOST_DIM = 256  # of a head


class Launched(Composed):
    """Raises Unknown for a block of which the kernels lack a part."""

    def __init__(self, block: nn.Module, anatomy: Block) -> None:
        super().__init__(block, anatomy)
        self.kernels = DecodeLayer(self._layer(), self._composed)
        a, m = self.d.attention, self.d.mlp or {}
        norms = [part.get(n) for part in (a, m) for n in ("norm", "q_norm", "k_norm", "post_norm")]
        vectors = [n[0] for n in norms if n is not None] + [p[5] for p in a["qkv"]]
        types = [v.dtype for v in (a["out"][1], *vectors) if v is not None]
        self.widest = reduce(mx.result_type, types)

    def step(
        self, x: mx.array, keys: mx.array, values: mx.array, place: Place, formats: Formats
    ) -> list[mx.array] | None:
        """The block's output, and its caches with the new token; None where `Composed` has to run:
        where sums saturate, or a vector of a wider type than x would make the result wider."""
        wider = mx.result_type(self.widest, x.dtype) != x.dtype
        if wider or (self.d.saturates and x.dtype == mx.float16):
            return None
        at = place.start, place.length, place.position
        return self.kernels.step(x, keys, values, at, formats)

    def _composed(
        self, x: mx.array, keys: mx.array, values: mx.array, at: At, formats: Formats
    ) -> mx.array:
        """The same where the new token goes behind all others."""
        start, _, position = at
        q, *new = self.project(x, position)
        k, v = (
            mx.concatenate([old[:, :, :start], a if f == DENSE else quantize_kv(a, f)], axis=2)
            for old, a, f in zip((keys, values), new, formats, strict=True)
        )
        if formats == PLAIN:
            return self.attend(x, q, k, v, None, True)
        return self.attend(x, q, k, v, None, True, k_format=formats[0], v_format=formats[1])

    def _layer(self) -> Layer:
        a, m, rope = self.d.attention, self.d.mlp, self.d.rope
        norm = self._gains(a["norm"])
        mlp_norm = self._gains(m["norm"]) if m else None
        if m is None or norm is None or mlp_norm is None or a["whole_norm"]:
            raise Unknown("no kernels for its norms or its MLP")
        projections = [*a["qkv"], a["out"], *m["gate_up"], m["down"]]
        if not quantized_parts(projections):
            raise Unknown("a projection is not quantized")
        if len({p[1].dtype for p in projections}) > 1:
            raise Unknown("its scales have several dtypes")
        biases = [p[5] for p in a["qkv"] if p[5] is not None]
        if len(biases) not in (0, len(a["qkv"])) or any(
            p[5] is not None for p in projections[len(a["qkv"]) :]
        ):
            raise Unknown("no kernels for its biases")
        out = AffineWeight(*a["out"][:5])
        dim = out.shape[1] // a["heads"]
        if dim > MOST_DIM or dim % 8:
            raise Unknown(f"no kernels for heads of {dim}")
        sinks = a["sinks"]
        rotation = None
        if rope is not None:
            rotation = rope.dims, rope.traditional, mx.array(rope.frequencies), rope.magnitude
        return Layer(
            self.d.width,
            tuple(AffineWeight(*p[:5]) for p in a["qkv"]), out,
            tuple(AffineWeight(*p[:5]) for p in m["gate_up"]), AffineWeight(*m["down"][:5]),
            a["heads"], a["kv_heads"], dim, a["scale"], norm, mlp_norm,
            q_norm=self._gains(a["q_norm"]), k_norm=self._gains(a["k_norm"]),
            v_eps=None if a["v_norm"] is None else a["v_norm"][1],
            post_norm=self._gains(a["post_norm"]), mlp_post_norm=self._gains(m["post_norm"]),
            bias=mx.concatenate(biases).astype(mx.float32) if biases else None,
            rope=rotation, sinks=None if sinks is None else sinks.astype(mx.float32),
            softcap=a["softcap"] or 0.0, gain=a["gain"], gelu=m["activation"] == "gelu_tanh",
        )  # fmt: skip

    def _gains(self, n: tuple[mx.array, float] | None) -> Norm | None:
        if n is None:
            return None
        weight = n[0].astype(mx.float32)
        return (1.0 + weight if self.d.plus_one else weight), n[1]
