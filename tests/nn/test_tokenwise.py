"""Norms and rotations by our ops: values and gradients of stock modules, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from optiq.nn.tokenwise import Norm, NormPlusOne, Rotated, norm_and_rotate
from tests.nn.alike import assert_alike, opened

IDS = mx.array([[1 + (5 * i) % 60 for i in range(40)], [1 + (7 * i) % 60 for i in range(40)]])


def swapped(model: nn.Module, mixin: type[nn.Module]) -> int:
    return sum(isinstance(m, mixin) for m in model.modules())


# Norms of one more than their weight, norms of heads, two rotations in a model, yarn.
@pytest.mark.parametrize(
    ("kind", "norm", "norms"),
    [("llama", Norm, 2), ("gemma3_text", NormPlusOne, 6), ("qwen3", Norm, 4), ("gpt_oss", Norm, 2)],
)
def test_values_and_gradients_are_those_of_stock(
    tmp_path: Path, kind: str, norm: type[nn.Module], norms: int
) -> None:
    ours, plain = opened(tmp_path, kind, norm_and_rotate)
    blocks = len(ours.layers)
    assert swapped(ours, norm) == norms * blocks + 1
    assert swapped(ours, Rotated) == blocks
    names = [type(m).__name__ for m in plain.modules()]
    assert [type(m).__name__ for m in ours.modules()] == names
    assert_alike(ours, plain, IDS)
    classes = [type(m) for m in ours.modules()]
    norm_and_rotate(ours)  # again
    assert [type(m) for m in ours.modules()] == classes


def test_what_computes_something_else_is_left(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "llama", norm_and_rotate)
    _, plain = opened(tmp_path, "llama", norm_and_rotate)
    block = plain.layers[0]

    class DoubledRMSNorm(nn.RMSNorm):
        def __call__(self, x: mx.array) -> Any:
            return 2 * super().__call__(x)  # type: ignore[no-untyped-call]

    class RoPE(nn.RoPE):  # the name of one that is known
        def __call__(self, x: mx.array, offset: int = 0) -> Any:
            return super().__call__(x, offset + 1)  # type: ignore[no-untyped-call]

    block.input_layernorm.__class__ = DoubledRMSNorm
    block.self_attn.rope.__class__ = RoPE
    norm_and_rotate(plain)
    assert type(block.input_layernorm) is DoubledRMSNorm
    assert type(block.self_attn.rope) is RoPE
    assert swapped(plain, Norm) == swapped(ours, Norm) - 1
    assert swapped(plain, Rotated) == swapped(ours, Rotated) - 1


def test_a_norm_with_a_gate_runs_as_it_is(tmp_path: Path) -> None:
    _, plain = opened(tmp_path, "llama", norm_and_rotate)

    class GatedRMSNorm(nn.RMSNorm):
        def __call__(self, x: mx.array, gate: mx.array | None = None) -> Any:
            y = super().__call__(x)  # type: ignore[no-untyped-call]
            return y if gate is None else y * gate

    norm = plain.layers[0].input_layernorm
    norm.__class__ = GatedRMSNorm
    norm_and_rotate(plain)
    ours, x = plain.layers[0].input_layernorm, mx.random.normal((3, norm.weight.size))
    assert isinstance(ours, Norm)
    for gate in ((), (x,)):
        assert mx.abs(ours(x, *gate) - norm(x, *gate)).max() < 1e-5
    assert mx.array_equal(ours(x, gate=x), ours(x, x))


def test_a_rotation_with_more_arguments_runs_as_it_is(tmp_path: Path) -> None:
    _, plain = opened(tmp_path, "llama", norm_and_rotate)

    class RoPE(nn.RoPE):
        def __call__(self, x: mx.array, offset: int = 0, scale: float = 1.0) -> Any:
            return scale * super().__call__(x, offset)  # type: ignore[no-untyped-call]

    rope = plain.layers[0].self_attn.rope
    rope.__class__ = RoPE
    norm_and_rotate(plain)
    ours, x = plain.layers[0].self_attn.rope, mx.random.normal((1, 2, 5, 16))
    assert isinstance(ours, Rotated)
    assert mx.array_equal(ours(x, scale=2.0), rope(x, scale=2.0))


def test_positions_may_begin_anywhere_and_be_arrays(tmp_path: Path) -> None:
    ours, plain = opened(tmp_path, "llama", norm_and_rotate)
    x = mx.random.normal((1, 2, 5, 16), key=mx.random.key(1))
    for offset in (0, 7, mx.array(7)):
        turned, expected = (m.layers[0].self_attn.rope(x, offset=offset) for m in (ours, plain))
        assert mx.abs(turned - expected).max() < 1e-5
