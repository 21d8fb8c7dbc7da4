"""Divide a model among ranks, in place: tensor parallelism (Shoeybi et al. 2019).

Each rank keeps some key heads of every block with the query heads that read them, some rows of its
MLP, and some of the vocabulary. Each layer is divided by itself, so widths may be mixed. Groups
stay whole: where the ranks cannot have equal shares, some have one unit more than others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import leaf_modules
from ..errors import DistributedError
from ..models.blocks import Attention, Mlp, Unknown, describe, set_heads
from ..models.places import place_at
from ..models.roles import Role, role_of
from ..models.roles import blocks as blocks_of
from .sharded import Meeting, Ranks, ShardedEmbedding, ShardedHead, Summed

_ALIGNMENT = 8  # rows of an MLP that is not quantized


@dataclass(frozen=True)
class Span:
    """Rows or columns of a weight."""

    begin: int
    end: int

    def times(self, n: int, after: int = 0) -> Span:
        return Span(after + self.begin * n, after + self.end * n)


def shard(model: nn.Module, ranks: Ranks, name: str) -> None:
    """Keep what is this rank's share of `model`, and read no more of its weights than one layer at
    a time. Raises DistributedError for a model that cannot be divided so."""
    if ranks.size == 1:
        return
    meeting = Meeting(ranks)
    blocks = blocks_of(model)
    for path, block in blocks.items():
        try:
            _shard_block(block, meeting)
        except Unknown as reason:
            raise DistributedError(
                f"{name} cannot be divided among {ranks.size} ranks: {path}: {reason}; serve it "
                "with fewer ranks, or on one machine"
            ) from None
        mx.eval(block.parameters())
    for path, layer in leaf_modules(model).items():
        if not any(path.startswith(f"{block}.") for block in blocks):
            _shard_vocabulary(model, path, layer, meeting)


def shares(total: int, unit: int, ranks: int) -> list[Span]:
    """`total` in `ranks` parts, all but the last a multiple of `unit`, as equal as can be; none
    where there are fewer units than ranks."""
    units = -(-total // unit)
    if units < ranks:
        return []
    each, more = divmod(units, ranks)
    ends = [0]
    for rank in range(ranks):
        ends.append(ends[-1] + (each + (rank < more)) * unit)
    ends[-1] = total
    return [Span(*ends) for ends in pairwise(ends)]


def _shard_block(block: nn.Module, meeting: Meeting) -> None:
    anatomy = describe(block)
    if anatomy.mlp is None:
        raise Unknown("its experts are not divided among ranks")
    if anatomy.attention.whole_norm:
        raise Unknown("its norm runs over all query heads together")
    _shard_attention(block, anatomy.attention, meeting)
    _shard_mlp(block, anatomy.mlp, meeting)


def _shard_attention(block: nn.Module, a: Attention, meeting: Meeting) -> None:
    out = place_at(block, a.out).get()
    columns = _columns(out)
    head = columns // a.heads
    together = a.heads // a.kv_heads  # query heads of a key head
    width = together * head
    unit = _group(out) // gcd(_group(out), width)  # key heads
    own = _own_share(a.kv_heads, unit, meeting, "key heads")
    count = own.end - own.begin
    if len(a.qkv) == 1:
        keys, values = a.heads * head, (a.heads + a.kv_heads) * head
        parts = [[own.times(width), own.times(head, keys), own.times(head, values)]]
    else:
        parts = [[own.times(width)], *([own.times(head)] for _ in a.qkv[1:])]
    for path, spans in zip(a.qkv, parts, strict=True):
        _keep(block, path, _rows(place_at(block, path).get(), spans))
    _keep(block, a.out, Summed(_inputs(out, own.times(width), meeting), meeting))
    set_heads(block, count * together, count)
    if a.sinks:
        heads, place = own.times(together), place_at(block, a.sinks)
        sinks = place.parent[place.key]
        place.parent[place.key] = mx.contiguous(sinks[heads.begin : heads.end])


def _shard_mlp(block: nn.Module, m: Mlp, meeting: Meeting) -> None:
    down = place_at(block, m.down).get()
    inner = _columns(down)
    own = _own_share(inner, max(_group(down), _ALIGNMENT), meeting, "rows of the MLP")
    for path in m.gate_up:
        spans = [own] if len(m.gate_up) == 2 else [own, own.times(1, inner)]
        _keep(block, path, _rows(place_at(block, path).get(), spans))
    _keep(block, m.down, Summed(_inputs(down, own, meeting), meeting))


def _own_share(total: int, unit: int, meeting: Meeting, of: str) -> Span:
    spans = shares(total, unit, meeting.size)
    if not spans:
        parts = -(-total // unit)
        raise Unknown(
            f"its {total} {of} can only be divided by {unit}, in {parts} part{'s'[: parts != 1]}, "
            f"not among {meeting.size} ranks"
        )
    return spans[meeting.rank]


def _shard_vocabulary(model: nn.Module, path: str, layer: Any, meeting: Meeting) -> None:
    """If the layer is an embedding or the output head."""
    embeds = hasattr(layer, "as_linear")
    if not embeds and role_of(path) is not Role.HEAD:
        return
    vocabulary = layer.weight.shape[0]
    most = -(-vocabulary // meeting.size)
    own = Span(min(meeting.rank * most, vocabulary), min((meeting.rank + 1) * most, vocabulary))
    kept = _rows(layer, [own])
    mx.eval(kept.parameters())
    if embeds:
        _keep(model, path, ShardedEmbedding(kept, own.begin, vocabulary, meeting))
    else:
        _keep(model, path, ShardedHead(kept, vocabulary, meeting))


def _keep(parent: nn.Module, path: str, module: nn.Module) -> None:
    place_at(parent, path).set(module)


def _columns(layer: Any) -> int:
    """Inputs of a linear layer."""
    columns: int = layer.weight.shape[1]
    return columns * 32 // layer.bits if hasattr(layer, "bits") else columns


def _group(layer: Any) -> int:
    """Inputs that share a scale."""
    return int(getattr(layer, "group_size", 1))


def _rows(layer: Any, spans: list[Span]) -> nn.Module:
    """The layer with these of its outputs."""
    return _changed(
        layer, lambda x: mx.contiguous(mx.concatenate([x[s.begin : s.end] for s in spans]))
    )


def _inputs(layer: Any, span: Span, meeting: Meeting) -> nn.Module:
    """The layer with these of its inputs; only rank 0 adds the bias."""
    columns = _columns(layer)

    def part(x: mx.array) -> mx.array:
        if x.ndim == 1:
            return x if meeting.rank == 0 else mx.zeros_like(x)
        begin, end = (n * x.shape[1] // columns for n in (span.begin, span.end))
        return mx.contiguous(x[:, begin:end])

    return _changed(layer, part)


def _changed(layer: Any, change: Callable[[mx.array], mx.array]) -> nn.Module:
    """A layer of the same class with changed arrays."""
    if not isinstance(layer, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
        raise Unknown(f"a {type(layer).__name__} is not divided among ranks")
    changed = nn.Module.__new__(type(layer))
    nn.Module.__init__(changed)
    changed.__dict__.update(layer.__dict__)
    for name, value in layer.items():
        changed[name] = change(value) if isinstance(value, mx.array) else value
    return changed
