"""MLX's kernels as Apple's compiler made them: the emulator runs real compiled code, and gives what
it gives for the same kernels from their source.

`make air` fetches the library that has them, from MLX's wheel for macOS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from . import air, test_mlx_kernels
from .build import ROOT
from .emulator import Chip, KernelError, Module, Out, needs_emulator
from .mlx_headers import DTYPES, INCLUDE, QUANTIZED, SDPA_VECTOR, buffer_dtype, random, to_buffer
from .mlx_quantize import gpu_quantize
from .test_mlx_kernels import BATCH, GROUP, Quantized, to_float64

PATH = Path(os.environ.get("MLX_METALLIB", ROOT / "build/air/mlx/lib/mlx.metallib"))
pytestmark = [
    needs_emulator,
    pytest.mark.air,
    pytest.mark.skipif(not PATH.exists(), reason=f"no {PATH}; run make air"),
]
NAMES = {"float": "float", "half": "float16_t", "bfloat": "bfloat16_t"}
KINDS = tuple(DTYPES)


@pytest.fixture(scope="module")
def library() -> air.Metallib:
    return air.Metallib(PATH)


def run(
    library: air.Metallib,
    name: str,
    source: Module,
    arguments: Mapping[int, Any],
    constants: Mapping[str, int] | None = None,
    **how: Any,
) -> np.ndarray:
    """The first output of the library's, which has the bits that the source gives."""
    for constant, value in (constants or {}).items():
        source.constant(constant, value)
    (first, *_), counters = air.module(library, name, constants)(name, arguments, **how)
    (expected, *_), same = source("k", arguments, **how)
    assert np.array_equal(first, expected)
    assert counters.operations == same.operations
    assert counters.threadgroup_memory == same.threadgroup_memory
    return first


def test_the_library_says_what_it_lacks(library: air.Metallib) -> None:
    assert len(library.places) > 10_000
    with pytest.raises(KeyError, match="no function 'qmv'"):
        library.code("qmv")
    with pytest.raises(ValueError, match="the function has has_mask, query_transposed"):
        air.module(library, "sdpa_vector_float16_t_64_64", {"has_mask": 1})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_quantize(library: air.Metallib, kind: str, bits: int) -> None:
    """Codes, scales and biases to the bit."""
    w = random(kind, 8, GROUP)
    name = f"affine_quantize_{NAMES[kind]}_gs_{GROUP}_b_{bits}"
    outputs = (
        Out((8, GROUP * bits // 8), np.uint8),
        *(Out((8, 1), buffer_dtype(kind)) for _ in range(2)),
    )
    got, counters = air.module(library, name)(
        name,
        dict(enumerate((to_buffer(w), *outputs))),
        grid=(8 * 32, 1, 1),
        threads=(32, 1, 1),
        dispatch_threads=True,
    )
    expected = gpu_quantize(w, GROUP, bits)
    assert np.array_equal(got[0].view(np.uint32), np.array(expected[0]))
    for found, right in zip(got[1:], expected[1:], strict=True):
        assert np.array_equal(found, to_buffer(right))
    assert counters.bytes_read[0] == w.nbytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_qmv_fast(library: air.Metallib, kind: str, bits: int) -> None:
    case = Quantized(kind, bits, rows=2, out=16, inner=1024)
    name = f"affine_qmv_fast_{NAMES[kind]}_gs_{GROUP}_b_{bits}_batch_0_pr_0_hgs_0_r_4"
    arguments = case.buffers() | {4: case.output(), 5: np.int32(case.inner), 6: np.int32(case.out)}
    arguments |= {7 + i: argument for i, argument in enumerate(BATCH)}
    source = from_source(QUANTIZED, f"affine_qmv_fast<{kind}, {GROUP}, {bits}, false>")
    y = run(library, name, source, arguments, grid=(2, 2, 1), threads=(32, 2, 1))
    case.check(y, tile_is_rounded=False)


def test_apple_contracts(library: air.Metallib) -> None:
    """Though fast-math is off: without contraction the source gives other bits."""
    case = Quantized("float", 4, rows=2, out=64, inner=1024)
    name = f"affine_qmv_fast_float_gs_{GROUP}_b_4_batch_0_pr_0_hgs_0_r_4"
    kernels = {"k": f"affine_qmv_fast<float, {GROUP}, 4, false>"}
    arguments = case.buffers() | {4: case.output(), 5: np.int32(case.inner), 6: np.int32(case.out)}
    arguments |= {7 + i: argument for i, argument in enumerate(BATCH)}
    how = {"grid": (2, 8, 1), "threads": (32, 2, 1)}
    (y,), _ = air.module(library, name)(name, arguments, **how)
    for contracts in (True, False):
        source = Module(
            source=QUANTIZED, kernels=kernels, include=[INCLUDE], chip=Chip(contracts=contracts)
        )
        assert np.array_equal(y, source("k", arguments, **how)[0][0]) == contracts


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_qmm_t(library: air.Metallib, kind: str, bits: int) -> None:
    case = Quantized(kind, bits, rows=37, out=64, inner=192)
    name = f"affine_qmm_t_{NAMES[kind]}_gs_{GROUP}_b_{bits}_alN_true_batch_0"
    sizes = (np.int32(case.inner), np.int32(case.out), np.int32(case.rows))
    arguments = case.buffers() | {4: case.output()}
    arguments |= {5 + i: argument for i, argument in enumerate((*sizes, *BATCH))}
    source = from_source(QUANTIZED, f"affine_qmm_t<{kind}, {GROUP}, {bits}, true, false>")
    y = run(library, name, source, arguments, grid=(2, 2, 1), threads=(32, 2, 2))
    case.check(y, tile_is_rounded=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_vector(library: air.Metallib, kind: str, causal: bool) -> None:
    """With sinks where it is causal; threadgroup memory, barriers, and sums over 32 simdgroups."""
    heads, keys, depth, queries = 4, 77, 64, 3 if causal else 1
    q, k, v, sinks = (
        random(kind, *shape, seed=seed)
        for seed, shape in enumerate(
            [(1, heads, queries, depth), *[(1, 2, keys, depth)] * 2, (heads,)]
        )
    )
    constants = dict.fromkeys(("has_mask", "query_transposed", "bool_mask", "float_mask"), 0)
    constants |= {"do_causal": int(causal), "has_sinks": int(causal)}
    head, row = np.uint64(keys * depth), np.uint64(depth)
    arguments: dict[int, Any] = {0: to_buffer(q), 1: to_buffer(k), 2: to_buffer(v)}
    arguments |= {3: Out(q.shape, buffer_dtype(kind)), 4: np.int32(2), 5: np.int32(keys)}
    arguments |= {6: head, 7: row, 8: head, 9: row, 10: np.float32(depth**-0.5)}
    if causal:
        arguments |= {16: to_buffer(sinks), 17: np.int32(heads)}
    name = f"sdpa_vector_{NAMES[kind]}_{depth}_{depth}"
    source = from_source(SDPA_VECTOR, f"sdpa_vector<{kind}, {depth}, {depth}>")
    source.constant("blocks", 0)
    o = run(
        library, name, source, arguments, constants, grid=(heads, queries, 1), threads=(1024, 1, 1)
    )
    given = sinks if causal else None
    expected = test_mlx_kernels.attention_reference(q, k, v, causal, given)
    largest = np.abs(to_float64(to_buffer(v))).max()
    bound = DTYPES[kind][1] * np.abs(expected) + (keys + depth) * 2.0**-24 * largest
    assert (np.abs(to_float64(o) - expected) <= bound).all()
    stock = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=depth**-0.5, mask="causal" if causal else None, sinks=given
    )
    far = np.abs(to_float64(o) - to_float64(to_buffer(stock)))
    assert (far <= 2 * bound + 4 * DTYPES[kind][1] * largest).all()


def test_sorted_experts(library: air.Metallib) -> None:
    """Prefix sums and shuffles. Each expert has as many rows."""
    experts, rows, width = 3, 60, 64
    case = Quantized("half", 4, rows, experts * width, width)
    x, weight = case.x, [a.reshape(experts, width, -1) for a in (case.w, case.scales, case.biases)]
    arguments: dict[int, Any] = {i: to_buffer(a) for i, a in enumerate((x, *weight))}
    each = rows // experts
    arguments |= {4: np.arange(0, rows, each, dtype=np.int32), 5: Out((rows, width), np.float16)}
    arguments |= {6 + i: np.int32(n) for i, n in enumerate((rows, width, width, experts))}
    y = run(
        library, "affine_gather_qmm_rhs_nt_float16_t_gs_64_b_4_bm_16_bn_32_bk_32_wm_1_wn_2",
        from_source(QUANTIZED, "affine_gather_qmm_rhs<half, 64, 4, 16, 32, 32, 1, 2, true>"),
        arguments, {"align_N": 1, "align_K": 1}, grid=(2, 7, 1), threads=(32, 2, 1),
    )  # fmt: skip
    own = np.repeat(np.arange(experts), each)[:, None] * width + np.arange(width)
    exact, magnitude = (np.take_along_axis(a, own, 1) for a in (case.exact, case.magnitude))
    bound = 2.0**-11 * (np.abs(exact) + magnitude) + width * 2.0**-24 * magnitude
    assert (np.abs(to_float64(y) - exact) <= bound).all()


def test_faults_of_a_launch_are_found(library: air.Metallib) -> None:
    """As in kernels from source: here a buffer that is too short."""
    name = f"affine_quantize_half_gs_{GROUP}_b_4".replace("half", NAMES["half"])
    w = to_buffer(random("half", 8, GROUP))
    outputs = Out((7, 32), np.uint8), Out((8, 1), np.float16), Out((8, 1), np.float16)
    how = {"grid": (8 * 32, 1, 1), "threads": (32, 1, 1), "dispatch_threads": True}
    with pytest.raises(KernelError, match=r"out-of-bounds.*buffer\(1\)"):
        air.module(library, name)(name, dict(enumerate((w, *outputs))), **how)


def from_source(source: str, kernel: str) -> Module:
    return Module(source=source, kernels={"k": kernel}, include=[INCLUDE])
