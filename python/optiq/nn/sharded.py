"""The layers of a model that several ranks share: what a rank has of them, and where ranks meet.

Heads, rows of the MLP and of the vocabulary are divided; each rank has the weights of its own. So
projections from the residual stream are plain layers with fewer rows, and those back to it give a
part of a sum.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn


class Ranks(Protocol):
    """What layers need of distributed.ranks.World."""

    rank: int
    size: int

    def total(self, x: Any) -> Any: ...
    def side_by_side(self, x: Any) -> Any: ...


class Summed(nn.Module):
    """A linear layer with the columns, and the inputs, of this rank; its bias is on rank 0."""

    def __init__(self, linear: nn.Module, ranks: Ranks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear, self.ranks = linear, ranks

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.ranks.total(self.linear(x))
        return y


class ShardedHead(nn.Module):
    """An output head with the rows of this rank; it gives the logits of all."""

    def __init__(self, linear: nn.Module, vocabulary: int, ranks: Ranks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear, self.ranks, self.vocabulary = linear, ranks, vocabulary

    def __call__(self, x: mx.array) -> mx.array:
        return _logits(self.linear(x), self.vocabulary, self.ranks)


class ShardedEmbedding(nn.Module):
    """An embedding with the rows of this rank, from token `first` on."""

    def __init__(self, embedding: nn.Module, first: int, vocabulary: int, ranks: Ranks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding, self.ranks = embedding, ranks
        self.first, self.vocabulary = first, vocabulary

    def __call__(self, ids: mx.array) -> mx.array:
        own = ids.astype(mx.int32) - self.first
        inside = (own >= 0) & (own < self.embedding["weight"].shape[0])
        x = self.embedding(mx.where(inside, own, 0))
        found: mx.array = self.ranks.total(mx.where(inside[..., None], x, mx.zeros_like(x)))
        return found

    def as_linear(self, x: mx.array) -> mx.array:
        return _logits(self.embedding.as_linear(x), self.vocabulary, self.ranks)


def _logits(own: mx.array, vocabulary: int, ranks: Ranks) -> mx.array:
    """Those of all ranks. Each has as many rows of the head but for the last, which is padded."""
    most = -(-vocabulary // ranks.size)
    padding = [(0, 0)] * (own.ndim - 1) + [(0, most - own.shape[-1])]
    everything: mx.array = ranks.side_by_side(mx.pad(own, padding))
    return everything[..., :vocabulary]
