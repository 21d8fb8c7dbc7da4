"""Modules and launches: what is refused, what is counted, what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import build
from .build import find_clang, unavailable
from .counters import SIMD_OPERATIONS
from .emulator import CompileError, InOut, KernelError, Module, Out, needs_emulator

pytestmark = needs_emulator

SOURCE = """
#include <metal_stdlib>
using namespace metal;
#ifndef SCALE
#define SCALE 1
#endif
struct Sizes { uint n; float factor; };
template <typename T>
[[kernel, max_total_threads_per_threadgroup(64)]] void scale(device const T* x [[buffer(0)]],
    device T* y [[buffer(1)]], constant Sizes& sizes [[buffer(2)]],
    threadgroup T* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
    uint t [[thread_index_in_threadgroup]]) {
  tile[t] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  T sum = tile[t] + T(simd_sum(float(tile[t ^ 1])));
  simdgroup_barrier(mem_flags::mem_none);
  y[i] = sum * T(sizes.factor) * T(SCALE);
}
kernel void strided(device const uint* x, device uint* y, uint i [[thread_position_in_grid]]) {
  y[i] = x[16 * (i % 8)];
}
"""
SIZES = np.array([(64, 1.0)], [("n", "u4"), ("factor", "f4")])
X = np.arange(128, dtype=np.float32)
LAUNCH = {"grid": (2, 1, 1), "threads": (64, 1, 1), "threadgroup_memory": {0: 256}}


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(source=SOURCE, kernels={"scale": "scale<float>", "strided": "strided"})


@pytest.mark.parametrize(
    ("buffers", "launch", "error", "message"),
    [
        ({2: SIZES[:0]}, {}, ValueError, r"buffer\(2\) has 0 bytes, but .* is 8 bytes"),
        ({2: np.float64([1, 2])}, {}, ValueError, r"buffer\(2\) has 16 bytes, but .* is 8 bytes"),
        ({0: np.zeros(7, np.uint8)}, {}, ValueError, r"buffer\(0\) has 7 bytes, .* of 4 bytes"),
        ({3: SIZES}, {}, ValueError, r"scale has no buffer\(3\); it has \[0, 1, 2\]"),
        ({31: SIZES}, {}, ValueError, "buffer index 31; Metal has 0 to 30"),
        ({2: 64}, {}, TypeError, r"buffer\(2\) is a int; pass a NumPy array or scalar"),
        ({}, {"threads": (64, 32, 1)}, ValueError, "2048 threads; Metal allows 1024"),
        ({}, {"grid": (0, 1, 1)}, ValueError, "grid is three positive numbers"),
        ({}, {"threadgroup_memory": {}}, ValueError, r"threadgroup arguments \[0\]"),
        ({}, {"threadgroup_memory": {0: 40000}}, ValueError, "over 32 KiB: 40000 bytes"),
    ],
)
def test_a_wrong_launch_is_refused(
    module: Module, buffers: dict, launch: dict, error: type[Exception], message: str
) -> None:
    arguments = {0: X, 1: Out(128, np.float32), 2: SIZES} | buffers
    with pytest.raises(error, match=message):
        module("scale", arguments, **(LAUNCH | launch))


def test_an_output_that_is_too_short_is_a_kernel_error(module: Module) -> None:
    with pytest.raises(
        KernelError, match=r"store of 4 bytes at byte \d+ of buffer\(1\), which has 400 bytes"
    ):
        module("scale", {0: X, 1: Out(100, np.float32), 2: SIZES}, **LAUNCH)


def test_counters(module: Module) -> None:
    _, counters = module("scale", {0: X, 1: Out(128, np.float32), 2: SIZES}, **LAUNCH)
    assert counters.dispatches == 1
    assert (counters.threads, counters.threadgroups) == (128, 2)
    assert counters.barriers == 2
    assert counters.simdgroup_barriers == 4
    assert counters.operations["sum"] == counters.simdgroup_operations == 4
    assert set(counters.operations) == set(SIMD_OPERATIONS)
    assert counters.bytes_read[:3] == [512, 0, 512]  # sizes.factor is read by every thread
    assert counters.bytes_written[:3] == [0, 512, 0]
    assert counters.loads[0] == counters.stores[1] == 128
    assert counters.lines_read[:3] == [8, 0, 1]
    assert counters.lines_read_by_threadgroups[:3] == [8, 0, 2]
    assert counters.lines_written[1] == 8
    assert counters.simdgroup_loads[:3] == [4, 0, 4]
    assert counters.lines_of_loads[:3] == [8, 0, 4]
    assert counters.threadgroup_memory == 256
    assert counters.threadgroup_bytes_written == 512
    assert counters.threadgroup_bytes_read >= 512
    both = counters + counters
    assert both.dispatches == 2
    assert both.bytes_read[0] == 1024
    assert both.operations["sum"] == 8
    assert both.threadgroup_memory == 256


def test_lines_show_strides(module: Module) -> None:
    x = np.arange(128, dtype=np.uint32)
    (y,), counters = module("strided", {0: x, 1: Out(32, np.uint32)}, (1, 1, 1), (32, 1, 1))
    assert y.tolist() == [16 * (i % 8) for i in range(32)]
    assert counters.bytes_read[0] == 128
    assert counters.lines_read[0] == 8  # one for each of the words that it reads
    assert counters.simdgroup_loads[0] == 1
    assert counters.lines_of_loads[0] == 8


def test_the_fast_build_does_not_claim_to_count() -> None:
    module = Module(source=SOURCE, kernels={"strided": "strided"}, mode="fast")
    x = np.zeros(128, np.uint32)
    _, counters = module("strided", {0: x, 1: Out(32, np.uint32)}, (1, 1, 1), (32, 1, 1))
    assert counters.threads == 32
    for use in (lambda: counters.bytes_read[0], lambda: counters.threadgroup_loads > 0):
        with pytest.raises(ValueError, match="counted with mode='check' only"):
            use()
    assert (counters + counters).threads == 64


def test_arguments_are_not_changed(module: Module) -> None:
    before, output = X.copy(), InOut(np.zeros(128, np.float32))
    (y,), _ = module("scale", {0: X, 1: output, 2: SIZES}, **LAUNCH)
    assert (before == X).all()
    assert not output.array.any()
    assert y.any()


def test_defines_and_kernel_names(tmp_path: Path) -> None:
    path = tmp_path / "scale.metal"
    path.write_text(SOURCE.replace("#include <metal_stdlib>", '#include "all.h"'))
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "all.h").write_text("#include <metal_stdlib>\n")
    module = Module(
        path, ["scale<half>"], include=[tmp_path / "headers"], define=["SCALE=3"], mode="fast"
    )
    x = np.ones(64, np.float16)
    (y,), _ = module(
        "scale<half>",
        {0: x, 1: Out(64, np.float16), 2: SIZES},
        (1, 1, 1),
        (64, 1, 1),
        {0: 128},
    )
    assert (y == 33 * 3).all()
    assert Module(path, include=[tmp_path / "headers"], mode="fast").kernels == ("strided",)


def test_unknown_things_are_named(module: Module) -> None:
    with pytest.raises(KeyError, match="no kernel 'scael'; this source has: scale, strided"):
        Module(source=SOURCE, kernels=["scael"])
    with pytest.raises(KeyError, match="no kernel 'scael'; this module has: scale, strided"):
        module("scael", {}, **LAUNCH)
    with pytest.raises(FileNotFoundError, match=r"no Metal source at nowhere\.metal"):
        Module("nowhere.metal")
    with pytest.raises(TypeError, match="a path or a source"):
        Module("nowhere.metal", source=SOURCE)


def test_compile_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.metal"
    path.write_text(SOURCE + "\nkernel void k(device float* y) {\n  y[0] = frobnicate(1);\n}\n")
    line = path.read_text().splitlines().index("  y[0] = frobnicate(1);") + 1
    with pytest.raises(CompileError, match=rf"wrong\.metal:{line}:10: error: .*'frobnicate'"):
        Module(path, ["k"])
    path.write_text(SOURCE + "\nkernel void k(device float* y, uint i [[thread_positoin]]) {}\n")
    with pytest.raises(ValueError, match=r"no attribute binds `uint i \[\[thread_positoin\]\]`"):
        Module(path, ["k"])


def test_a_second_module_comes_from_the_cache() -> None:
    first = Module(source=SOURCE + "// cached\n", kernels=["strided"], mode="fast")
    again = Module(source=SOURCE + "// cached\n", kernels=["strided"], mode="fast")
    assert again.built.library == first.built.library
    assert again.built.seconds == {}
    other = Module(
        source=SOURCE + "// cached\n", kernels=["strided"], mode="fast", define=["UNUSED"]
    )
    assert other.built.library == first.built.library  # it changes nothing in the text
    other = Module(source=SOURCE + "int f();", kernels=["strided"], mode="fast")
    assert other.built.library != first.built.library


def test_without_a_compiler_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSL_CLANG", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    find_clang.cache_clear()
    unavailable.cache_clear()
    try:
        assert "apt-get install clang-19, or pip install ziglang" in str(unavailable())
    finally:
        monkeypatch.undo()
        find_clang.cache_clear()
        unavailable.cache_clear()
    assert unavailable() is None
