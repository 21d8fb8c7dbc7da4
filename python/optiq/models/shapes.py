"""Sums over the shapes of a model's modules, for estimates of memory. No MLX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

from .roles import Module, Role

_ROWS = 1 << 18  # a vocabulary as large as any


def dense_bytes(modules: Iterable[Module], itemsize: int) -> int:
    """Bytes of the modules' weights at full precision."""
    return itemsize * sum(prod(m.shape) for m in modules)


def embedding_shape(modules: Iterable[Module]) -> tuple[int, int]:
    """Rows of the vocabulary and width of the hidden states.

    At most, where the model file excludes its embedding from what can be quantized.
    """
    modules = list(modules)
    widest = max((m.shape[-1] for m in modules), default=0)
    rows, width = next((m.shape for m in modules if m.role is Role.EMBEDDING), (_ROWS, widest))
    return rows, width


def blocks_of(modules: Iterable[Module]) -> dict[int, list[Module]]:
    """The modules of each block, by the block's index."""
    blocks: dict[int, list[Module]] = defaultdict(list)
    for module in modules:
        if module.block is not None:
            blocks[module.block].append(module)
    return dict(sorted(blocks.items()))


def widest_block(modules: Sequence[Module], experts: int = 1) -> int:
    """Elements that go into and come out of the layers of the widest block, for one token.

    `experts` is how many run for a token.
    """
    return max(
        (sum(_in_and_out(m, experts) for m in of) for of in blocks_of(modules).values()), default=0
    )


def _in_and_out(module: Module, experts: int) -> int:
    return sum(module.shape[-2:]) * (experts if module.role is Role.EXPERT else 1)
