"""What Apple's compiler and chips may do with the same source: see `Chip`."""

from __future__ import annotations

import numpy as np
import pytest

from .emulator import APPLE, Chip, InOut, KernelError, Module, Out, needs_emulator

pytestmark = needs_emulator

SOURCE = """
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
kernel void products(device const float4* x, device float2* y,
                     uint i [[thread_position_in_grid]]) {
  float4 v = x[i];
  y[i] = float2(v.x * v.y + v.z, fma(v.x, v.y, v.z));
}
kernel void tiny(device const float* x, device const half* h, device float* y) {
  y[0] = x[0] * 2;          // a denormal, as an operand
  y[1] = x[1] * x[1];       // as a result
  y[2] = float(h[0]) * 2;   // of half: none in float
  y[3] = x[1];              // a copy
}
kernel void functions(device const float* x, device float* y,
                      uint i [[thread_position_in_grid]]) {
  float v = x[i];
  y[4 * i] = exp(v);
  y[4 * i + 1] = log(v);
  y[4 * i + 2] = tanh(v);
  y[4 * i + 3] = sqrt(v);
}
kernel void sums(device const float* x, device float* y, uint i [[thread_position_in_grid]]) {
  y[i] = simd_sum(x[i]);
}
kernel void matrices(device const float* x, device float* y) {
  simdgroup_matrix<float, 8, 8> a, b, c(0);
  simdgroup_load(a, x, 8);
  simdgroup_load(b, x + 64, 8);
  simdgroup_multiply_accumulate(c, a, b, c);
  simdgroup_store(c, y, 8);
}
"""
CHIPS = [Chip(n) for n in (1, 2, 3)]


@pytest.fixture(scope="module", params=["check", "fast"])
def module(request: pytest.FixtureRequest) -> Module:
    return Module(source=SOURCE, mode=request.param)


@pytest.mark.parametrize("contracts", [True, False])
def test_contraction(contracts: bool) -> None:
    """Only of a product and a sum in one expression; what says fma is one in any case."""
    module = Module(source=SOURCE, mode="fast", chip=Chip(contracts=contracts))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 4)).astype(np.float32)
    x[:, 2] = -(x[:, 0] * x[:, 1])  # what is left is the rounding of the product
    (y,), _ = module("products", {0: x, 1: Out((256, 2), np.float32)}, (8, 1, 1), (32, 1, 1))
    exact = x[:, 0].astype(np.float64) * x[:, 1] + x[:, 2]
    assert (y[:, 1] == exact.astype(np.float32)).all()
    assert (y[:, 0] == (y[:, 1] if contracts else 0)).all()
    assert (y[:, 1] != 0).mean() > 0.9


@pytest.mark.parametrize("flushes", [True, False])
def test_denormals(module: Module, flushes: bool) -> None:
    x, h = np.array([3e-39, 1e-20], np.float32), np.array([6e-8], np.float16)
    chip = Chip(flushes=flushes)
    (y,), _ = module("tiny", {0: x, 1: h, 2: Out(4, np.float32)}, (1, 1, 1), (1, 1, 1), chip=chip)
    expected = [x[0] * np.float32(2), x[1] * x[1], np.float32(h[0]) * 2, x[1]]
    assert 0 not in expected
    assert y.tolist() == ([0, 0] if flushes else expected[:2]) + expected[2:]
    assert np.float32(3e-39) * np.float32(1) != 0  # and the process goes on as before


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_functions_are_off_by_at_most_two_ulp(module: Module, chip: Chip) -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(1e-3, 8, 512).astype(np.float32)
    x[:4] = [0, 1, np.inf, 20]
    x[256:] = x[:256]
    args = {0: x, 1: Out((512, 4), np.float32)}
    exact, y, again = (
        module("functions", args, (16, 1, 1), (32, 1, 1), chip=c)[0][0] for c in (APPLE, chip, chip)
    )
    assert np.array_equal(y, again)
    assert np.array_equal(y[:256], y[256:])  # a function of x
    off = y.view(np.int32).astype(int) - exact.view(np.int32)
    assert abs(off).max() == 2
    assert (off[:, :3] != 0).mean() > 0.6
    assert (off[:, 3] == 0).all()  # sqrt is rounded right
    assert y[[0, 2], :2].tolist() == [[1, -np.inf], [np.inf, np.inf]]
    assert (y[1, 1], y[3, 2]) == (0, 1)  # log(1), tanh(20)


def test_each_chip_has_its_own_functions_and_sums(module: Module) -> None:
    x = np.random.default_rng(2).standard_normal(128).astype(np.float32)
    for kernel, size in (("sums", 128), ("matrices", 64)):
        seen = {
            module(kernel, {0: x, 1: Out(size, np.float32)}, (1, 1, 1), (32, 1, 1), chip=c)[0][0][
                :32
            ].tobytes()
            for c in (APPLE, *CHIPS)
        }
        assert len(seen) > 1


@pytest.mark.parametrize("chip", [APPLE, *CHIPS], ids=str)
def test_a_chip_sums_in_one_order(module: Module, chip: Chip) -> None:
    """Whatever the schedule; the sum is right."""
    x = np.random.default_rng(3).standard_normal(32).astype(np.float32)
    args = {0: np.tile(x, 4), 1: Out(128, np.float32)}
    sums = [
        module("sums", args, (1, 1, 1), (128, 1, 1), chip=chip, shuffle=seed)[0][0]
        for seed in (False, 1, 2)
    ]
    assert len({y.tobytes() for y in sums}) == 1
    assert len(set(sums[0].tolist())) == 1
    assert abs(sums[0][0] - x.astype(np.float64).sum()) < 1e-5
    (y,), _ = module("matrices", {0: np.tile(x, 4), 1: Out(64, np.float32)}, (1, 1, 1), (32, 1, 1),
                     chip=chip)  # fmt: skip
    a, b = np.tile(x, 4).astype(np.float64).reshape(2, 8, 8)
    assert abs(y.reshape(8, 8) - a @ b).max() < 1e-5


def test_what_a_kernel_writes_is_bound_once(module: Module) -> None:
    x = np.ones(64, np.float32)
    with pytest.raises(ValueError, match=r"sums: buffer\(0\) and buffer\(1\) overlap"):
        module("sums", {0: x, 1: InOut(x)}, (1, 1, 1), (32, 1, 1))
    with pytest.raises(ValueError, match="overlap"):  # a slice
        module("sums", {0: x[32:], 1: InOut(x)}, (1, 1, 1), (32, 1, 1))
    module("sums", {0: x[:32], 1: InOut(x[32:])}, (1, 1, 1), (32, 1, 1))


def test_another_contraction_takes_another_module(module: Module) -> None:
    with pytest.raises(ValueError, match="give the chip to Module"):
        module("sums", {0: np.ones(32, np.float32), 1: Out(32, np.float32)}, (1, 1, 1),
               (32, 1, 1), chip=Chip(contracts=False))  # fmt: skip


def test_errors_leave_denormals_as_they_were(module: Module) -> None:
    if module.mode == "check":
        with pytest.raises(KernelError):
            module("sums", {0: np.ones(8, np.float32), 1: Out(32, np.float32)}, (1, 1, 1),
                   (32, 1, 1))  # fmt: skip
        assert np.float32(3e-39) * np.float32(1) != 0
