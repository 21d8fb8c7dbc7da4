"""Rounding, launched as planned and run on the emulator: min/max bit for bit as MLX's own GPU
kernel, the search as good as the CPU's."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS, Format
from optiq.ops import native
from optiq.ops.cases import DTYPES, Rounding
from tests.msl.emulator import Module, needs_emulator
from tests.msl.mlx_quantize import gpu_quantize
from tests.ops.test_quantize_minmax import ODD, bits_of

from .launcher import NAMES, Plan, compile_together, run

pytestmark = needs_emulator

FORMATS = [Format("affine", b, g) for b, g in product(AFFINE_BITS, AFFINE_GROUPS)]
CASES = [(f, d) for i, f in enumerate(FORMATS) for j, d in enumerate(DTYPES) if (i + j) % 3 == 0]


def plan(fmt: Format, dtype: str, rows: int, cols: int, rows_per_importance: int = 0) -> Plan:
    assert native.extension is not None, native.reason
    the_plan: Plan = native.extension.plan_quantize(
        rows, cols, fmt.group_size, fmt.bits, NAMES[dtype], rows_per_importance
    )
    return the_plan


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together([plan(f, d, 4, 128) for f, d in product(FORMATS, DTYPES)])
    compile_together([plan(f, d, 4, 128, 4) for f, d in CASES])


def quantized(w: mx.array, fmt: Format, importance: mx.array | None = None) -> list[mx.array]:
    dtype = next(k for k, v in DTYPES.items() if v == w.dtype)
    rows, cols = w.size // w.shape[-1], w.shape[-1]
    inputs, shared = [w], 0
    if importance is not None:
        inputs.append(importance)
        shared = rows * cols // importance.size
    groups = (*w.shape[:-1], cols // fmt.group_size)
    codes = (*w.shape[:-1], cols * fmt.bits // 32)
    out, _ = run(
        plan(fmt, dtype, rows, cols, shared),
        inputs,
        [(codes, mx.uint32), (groups, w.dtype), (groups, w.dtype)],
    )
    return out


def ties(bits: int) -> np.ndarray:
    """Weights on and half way between the codes of a grid of step 1."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = np.random.default_rng(bits).integers(2 * low, 2 * high + 1, 128) / 2
    w[::32], w[1::32] = low, high
    return w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_minmax_is_that_of_mlx_on_a_gpu(fmt: Format, dtype: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, (12, 384)).astype(np.float32)
    w[8:] = -np.abs(w[8:]) - 3
    finite = [row for row in ODD.values() if np.abs(row).max() < 65000]
    odd = np.stack([ties(fmt.bits), *finite])
    x = mx.array(np.concatenate([w, np.tile(odd, (1, 3))])).astype(DTYPES[dtype])
    got, expected = quantized(x, fmt), gpu_quantize(x, fmt.group_size, fmt.bits)
    for mine, theirs in zip(got, expected, strict=True):
        assert (bits_of(mine) == bits_of(theirs)).all()
    on_the_cpu = mx.quantize(x, fmt.group_size, fmt.bits)
    assert not mx.array_equal(got[0], on_the_cpu[0])  # ties
    assert not mx.array_equal(got[1][8:12], on_the_cpu[1][8:12])  # negative groups


def test_nan_is_in_no_range_and_infinity_makes_the_scale_nan() -> None:
    fmt = Format("affine", 4, 64)
    w = np.tile(np.arange(-20, 44, dtype=np.float32), (3, 1))
    whole = w.copy()
    w[0, 5], w[1, :], w[2, 5] = np.nan, np.nan, np.inf
    got, expected = quantized(mx.array(w), fmt), quantized(mx.array(whole), fmt)
    assert mx.array_equal(got[1][0], expected[1][0])
    assert got[0][0, 0].item() == expected[0][0, 0].item() & ~(15 << 20)  # code 5 becomes 0
    assert mx.isnan(got[1][1:]).all()


@pytest.mark.parametrize(("fmt", "dtype"), CASES, ids=str)
def test_search_is_as_good_as_on_the_cpu(fmt: Format, dtype: str) -> None:
    case = Rounding(fmt.bits, fmt.group_size, dtype, rows=8)
    w, importance = case.inputs()
    found = quantized(w, fmt, importance)
    assert case.part(found) <= 1
    cpu = case.errors(ops.quantize(w, fmt, importance))
    assert case.errors(found).sum() == pytest.approx(cpu.sum(), rel=0.01)


def test_search_of_experts_and_odd_groups() -> None:
    fmt = Format("affine", 4, 32)
    w = mx.random.normal((3, 5, 64), key=mx.random.key(0))
    w[1, 2] = 0.25
    importance = mx.random.uniform(0, 5, (3, 64), key=mx.random.key(1))
    importance[2, :32] = 0
    together = quantized(w, fmt, importance)
    for e in range(3):
        alone = quantized(w[e], fmt, importance[e])
        for a, b in zip(together, alone, strict=True):
            assert mx.array_equal(a[e], b)
    back = mx.dequantize(*together, group_size=32, bits=4)
    assert mx.all(mx.isfinite(back)).item()
    assert mx.allclose(back[1, 2], w[1, 2]).item()


@pytest.mark.parametrize("shared", [0, 4], ids=["minmax", "search"])
def test_the_text_for_metal_compiles(shared: int) -> None:
    (launch,) = plan(FORMATS[4], "bf16", 4, 128, shared)["launches"]
    Module(source=launch["library_source"], kernels=[launch["kernel"]])


def test_plans_refuse_what_no_kernel_does() -> None:
    assert native.extension is not None, native.reason
    make = native.extension.plan_quantize
    for arguments, message in (
        ((4, 64, 64, 7), "bits is 7"),
        ((4, 64, 16, 4), "group_size is 16"),
        ((4, 96, 64, 4), "cols is 96"),
        ((2**30, 2**10, 64, 4), "split it"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*arguments)
    assert make(0, 64)["launches"] == []
