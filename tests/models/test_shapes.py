"""Sums over shapes against the arrays of real models."""

from __future__ import annotations

import pytest

from optiq.models.roles import Role, quantizable
from optiq.models.shapes import blocks_of, dense_bytes, embedding_shape, widest_block
from tests.architectures import construct


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "gemma4_text"])
def test_sums_are_those_of_the_arrays(name: str) -> None:
    model = construct(name)
    modules = quantizable(model)
    leaves = dict(model.named_modules())
    assert dense_bytes(modules, 2) == 2 * sum(leaves[m.path].weight.size for m in modules)
    embedding = next(m for m in modules if m.role is Role.EMBEDDING)
    assert embedding_shape(modules) == leaves[embedding.path].weight.shape

    blocks = blocks_of(reversed(modules))
    assert list(blocks) == list(range(len(model.layers)))
    inside = [m for of in blocks.values() for m in of]
    assert {m.path for m in inside} == {m.path for m in modules if ".layers." in m.path}
    elements = [
        sum(
            sum(leaves[m.path].weight.shape[-2:]) * (3 if leaves[m.path].weight.ndim == 3 else 1)
            for m in of
        )
        for of in blocks.values()
    ]
    assert widest_block(modules, experts=3) == max(elements)


def test_without_blocks_nothing_is_wide() -> None:
    assert blocks_of([]) == {}
    assert widest_block([]) == 0
