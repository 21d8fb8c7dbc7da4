"""The same cases on a real GPU, through the primitives. No Mac has run these yet."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import optiq
from optiq import ops
from optiq.doctor import selftest
from optiq.ops import metal, native
from optiq.ops.attention_cases import ATTENTION, Attention
from optiq.ops.cases import (
    DTYPES,
    LARGE_PAIRS,
    PAIRS,
    QUANTIZED,
    TERMS,
    Pair,
    Product,
    Terms,
    f64,
)
from tests.tiny import tiny_folder

from .test_trials import LAUNCHES

pytestmark = pytest.mark.metal
if not mx.metal.is_available():
    pytest.skip("needs an Apple GPU", allow_module_level=True)
if native.extension is None:
    pytest.skip(f"no extension: {native.reason}", allow_module_level=True)


def multiply(
    x: mx.array, weight: Any, case: Product, transpose: bool = True, **options: Any
) -> Any:
    assert native.extension is not None
    out = native.extension.quantized_matmul(
        x, *weight, transpose, case.group_size, case.bits, stream=mx.gpu, **options
    )
    mx.eval(out)
    return out


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_matmul(case: Product, transpose: bool) -> None:
    x = case.activations(None if transpose else case.out)
    y = multiply(x, case.quantized(), case, transpose)
    assert y.dtype == x.dtype
    assert case.part(y, transpose) <= 1


@pytest.mark.parametrize(("bits", "dtype"), list(product((2, 3, 4, 5, 6, 8), DTYPES)))
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int, dtype: str) -> None:
    case = Product(16, 300, 1056, bits, 32, dtype)
    x, weight = case.activations(), case.quantized()
    whole = multiply(x, weight, case)
    for rows in range(1, 16):
        assert mx.array_equal(multiply(x[:rows], weight, case), whole[:rows])


@pytest.mark.parametrize("rows", [1, 6, 16, 100])
def test_several_weights_in_one_launch(rows: int) -> None:
    assert native.extension is not None
    sizes = [(96, 4, 64), (32, 6, 64), (33, 8, 32), (500, 3, 128), (40, 4, 64)]
    cases = [Product(rows, out, 256, bits, g, "f16") for out, bits, g in sizes]
    x = cases[0].activations()
    parts = [(*c.quantized(), c.group_size, c.bits) for c in cases]
    out = native.extension.mixed_quantized_matmul(x, parts, stream=mx.gpu)
    mx.eval(out)
    for case, y in zip(cases, out, strict=True):
        assert case.part(y) <= 1


@pytest.mark.parametrize("case", TERMS, ids=str)
def test_gathered_low_rank(case: Terms) -> None:
    assert native.extension is not None
    out = native.extension.gathered_low_rank(*case.inputs(), stream=mx.gpu)
    mx.eval(out)
    assert case.part(out) <= 1


@pytest.mark.parametrize("transpose", [True, False])
def test_experts(transpose: bool) -> None:
    case = Product(11, 64, 96, 4, 32, "f16")
    rng = np.random.default_rng(0)
    w = mx.array(rng.standard_normal((5, 64, 96), dtype=np.float32)).astype(mx.float16)
    x = case.activations(96 if transpose else 64)
    which = mx.array(rng.integers(0, 5, 11).astype(np.uint32))
    weight = mx.quantize(w, 32, 4)
    y = multiply(x, weight, case, transpose, indices=which)
    full = f64(mx.dequantize(*weight, 32, 4))
    for i, expert in enumerate(np.array(which)):
        right = full[expert] if transpose else full[expert].T
        # mx.dequantize rounds to float16 what the kernel keeps in float32.
        truth = f64(x[i]) @ right.T
        bound = 2.0**-10 * (np.abs(truth) + np.abs(f64(x[i])) @ np.abs(right).T)
        assert (np.abs(f64(y[i]) - truth) <= bound).all()


def test_strides_slices_and_empty_inputs() -> None:
    case = Product(12, 24, 64, 4)
    x, (codes, scales, biases) = case.activations(), case.quantized()
    flat = multiply(x, (codes, scales, biases), case)
    twice = mx.repeat(codes, 2, axis=0)[::2], mx.repeat(scales, 2, axis=0)[::2], biases
    assert mx.array_equal(multiply(mx.repeat(x, 2, axis=0)[::2], twice, case), flat)
    shifted = mx.concatenate([mx.zeros(1), x.flatten()])[1:].reshape(12, 64)
    assert mx.array_equal(multiply(shifted, (codes, scales, biases), case), flat)
    assert multiply(x[:0], (codes, scales, biases), case).shape == (0, 24)


def test_gradient() -> None:
    case = Product(6, 40, 128, 4)
    x, weight, pull = case.activations(), case.quantized(), mx.random.normal((6, 40))

    def ours(x: mx.array) -> mx.array:
        assert native.extension is not None
        y = native.extension.quantized_matmul(x, *weight, True, 64, 4, stream=mx.gpu)
        return (y * pull).sum()

    def stock(x: mx.array) -> mx.array:
        return ((x @ mx.dequantize(*weight, 64, 4).T) * pull).sum()

    assert mx.allclose(mx.grad(ours)(x), mx.grad(stock)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "launch"), LAUNCHES, ids=str)
def test_trials_pass(op: str, launch: Any) -> None:
    assert metal.proven(op, *launch) is native.extension


def test_selftest() -> None:
    """Rounding, and the products in other shapes, with the cases that users can run."""
    lines = [line for line in selftest.run(gpu=True) if isinstance(line, selftest.Line)]
    assert [f"{line.op}: {f}" for line in lines for f in line.failures] == []


@pytest.mark.parametrize("case", [*PAIRS, *LARGE_PAIRS], ids=str)
def test_kl_divergence(case: Pair) -> None:
    sides = case.sides()
    assert case.part(ops.kl_divergence(*sides, soft_cap=case.soft_cap)) <= 1

    def total(h_q: mx.array) -> mx.array:
        return ops.kl_divergence(*sides[:2], h_q, sides[3], soft_cap=case.soft_cap).kl.sum()

    assert mx.isfinite(mx.grad(total)(sides[2])).all()


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_quantized_attention(case: Attention) -> None:
    got = ops.quantized_attention(case.queries(), *case.stored(), **case.arguments())
    assert case.part(got) <= 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model(dtype: mx.Dtype, tmp_path: Path) -> None:
    """Token by token as stock mlx-lm, to the rounding of 16 bits."""
    models = [load_model(tiny_folder(tmp_path, name=n))[0] for n in "ab"]
    for m in models:
        m.set_dtype(dtype)
        nn.quantize(m, 64, 4)
    report = optiq.accelerate(models[0])
    assert set(report.fused.values()) == {"attention and MLP"}
    tokens = mx.arange(4, 44)[None]
    logits = []
    for m in models:
        cache = make_prompt_cache(m)
        steps = [m(tokens[:, :20], cache=cache)]
        steps += [m(tokens[:, i : i + 1], cache=cache) for i in range(20, 40)]
        logits.append(mx.concatenate(steps, axis=1).astype(mx.float32))
    error = mx.abs(logits[0] - logits[1]).max() / mx.abs(logits[1]).max()
    assert error.item() <= 8 * mx.finfo(dtype).eps
