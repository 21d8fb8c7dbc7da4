"""The layers of a model that several ranks share: what a rank has of them, and where ranks meet.

Heads, rows of the MLP and of the vocabulary are divided; each rank has the weights of its own. So
projections from the residual stream are plain layers with fewer rows, and those back to it give a
part of a sum.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..ops import native


class Ranks(Protocol):
    """What layers need of distributed.ranks.World."""

    rank: int
    size: int

    def same(self, job: dict[str, Any]) -> None: ...
    def connections(self) -> Mapping[int, socket.socket]: ...
    def total(self, x: Any) -> Any: ...
    def side_by_side(self, x: Any) -> Any: ...


class Meeting:
    """Where the ranks of a model put together what each has: the same bits on every rank, and for a
    row whatever rows are beside it.

    On the CPU natively, over connections of their own. While MLX's ring waits, two threads of each
    rank go round in circles, and take the cores from those that others wait for.
    """

    def __init__(self, ranks: Ranks) -> None:
        """All ranks have to make one together. Raises DistributedError where some have no native
        part."""
        self.rank, self.size, self._ranks = ranks.rank, ranks.size, ranks
        ext = native.active()
        ranks.same({"native part": ext is not None})
        self.native: Any = None  # what a native block takes
        if ext is not None:
            peers = ranks.connections()
            descriptors = [peers[rank].fileno() for rank in sorted(peers)]
            self.native = ext.Ranks(self.rank, self.size, descriptors)

    def total(self, x: mx.array) -> mx.array:
        """The sum over the ranks, whose parts are added in their order."""
        if self.native is None:
            total: mx.array = self._ranks.total(x)
            return total
        total = self.native.total(x.astype(mx.float32))
        return total.astype(x.dtype)

    def side_by_side(self, x: mx.array) -> mx.array:
        """The arrays of all ranks, one after the other along the last axis."""
        if self.native is None:
            joined: mx.array = self._ranks.side_by_side(x)
            return joined
        joined = self.native.side_by_side(x.astype(mx.float32))
        return joined.astype(x.dtype)


class Summed(nn.Module):
    """A linear layer with the columns, and the inputs, of this rank; its bias is on rank 0."""

    def __init__(self, linear: nn.Module, meeting: Meeting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear, self.meeting = linear, meeting

    def __call__(self, x: mx.array) -> mx.array:
        return self.meeting.total(self.linear(x))


class ShardedHead(nn.Module):
    """An output head with the rows of this rank; it gives the logits of all."""

    def __init__(self, linear: nn.Module, vocabulary: int, meeting: Meeting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear, self.meeting, self.vocabulary = linear, meeting, vocabulary

    def __call__(self, x: mx.array) -> mx.array:
        return _logits(self.linear(x), self.vocabulary, self.meeting)


class ShardedEmbedding(nn.Module):
    """An embedding with the rows of this rank, from token `first` on."""

    def __init__(self, embedding: nn.Module, first: int, vocabulary: int, meeting: Meeting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding, self.meeting = embedding, meeting
        self.first, self.vocabulary = first, vocabulary

    def __call__(self, ids: mx.array) -> mx.array:
        own = ids.astype(mx.int32) - self.first
        inside = (own >= 0) & (own < self.embedding["weight"].shape[0])
        x = self.embedding(mx.where(inside, own, 0))
        return self.meeting.total(mx.where(inside[..., None], x, mx.zeros_like(x)))

    def as_linear(self, x: mx.array) -> mx.array:
        return _logits(self.embedding.as_linear(x), self.vocabulary, self.meeting)


def _logits(own: mx.array, vocabulary: int, meeting: Meeting) -> mx.array:
    """Those of all ranks. Each has as many rows of the head but for the last, which is padded."""
    most = -(-vocabulary // meeting.size)
    padding = [(0, 0)] * (own.ndim - 1) + [(0, most - own.shape[-1])]
    return meeting.side_by_side(mx.pad(own, padding))[..., :vocabulary]
