"""Every way to run the same maths agrees: instruction sets, thread counts, the fallback."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optiq.ops import native

PROBE = """
import warnings
warnings.simplefilter("error")
import optiq
import mlx.core as mx, numpy as np
from optiq import ops
from optiq.ops import native, reference
from optiq.ops.cases import Product, f64
from tests.ops import test_training as training
from tests.ops.test_matmul import assert_product
for case in [Product(m, 50, 384, b, g, d) for m in (1, 5, 40) for d in ("f32", "f16", "bf16")
             for b, g in ((0, 64), (3, 128), (4, 64), (4, 32), (8, 64))]:
    x = case.activations().astype(mx.float32)
    if case.bits:
        out = ops.quantized_matmul(x, *case.quantized(), group_size=case.group_size, bits=case.bits)
        w = f64(case.affine())
    else:
        out, w = ops.linear(x, case.weight()), f64(case.weight())
    assert_product(out, f64(x), w, "f32", case.group_size if case.bits else 0)
if native.extension:
    codes = mx.quantize(mx.random.normal((48, 384)), 64, 5)
    tiles, x = native.extension.tile(*codes, 64, 5), mx.random.normal((3, 384))
    assert all(mx.array_equal(a, b) for a, b in zip(tiles.arrays, codes))
    out = native.extension.tiled_matmul(x, tiles)
    assert mx.array_equal(out, ops.quantized_matmul(x, *codes, group_size=64, bits=5))
p, q = (mx.random.normal((9, 777), key=mx.random.key(i)) for i in (1, 2))
kl, agree = ops.kl_from_logits(p, q)
truth = reference.kl_from_logits(np.array(p), np.array(q))
assert np.allclose(np.array(kl), truth, rtol=1e-5)
w = mx.random.normal((3, 8, 64)); x = mx.random.normal((6, 64))
i = mx.array([2, 0, 1, 2, 2, 0], dtype=mx.uint32)
assert mx.allclose(ops.linear(x, w, indices=i)[3], x[3] @ w[2].T, atol=1e-4)
codes = mx.quantize(w, 64, 4)
w2 = mx.dequantize(codes[0][2], codes[1][2], codes[2][2], 64, 4)
assert_product(ops.quantized_matmul(x, *codes, indices=i)[3:4], f64(x[3:4]), f64(w2), "f32", 64)
training.test_gated("gelu_tanh", (3, 70))
training.test_cross_entropy(3, 1000)
training.test_add_low_rank((5,), 64, 40, 3)
training.test_rms_norm((3, 100))
training.test_rotary(3, 7, 64, 32, False)
training.test_steps_of_adamw_are_those_of_mlx()
training.test_causal_attention(9, 6, 2, 4)
print(native.extension.isa() if native.extension else "fallback")
"""


def run(**env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def isas() -> list[str]:
    if native.extension is None:
        pytest.skip(f"no native kernels: {native.reason}")
    names: list[str] = native.extension.isas()
    return names


def skip_where_not_run(isa: str) -> None:
    if isa not in isas():
        pytest.skip(f"this processor runs {', '.join(isas())}, not {isa}")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx", "neon"])
def test_instruction_sets(isa: str) -> None:
    skip_where_not_run(isa)
    assert run(OPTIQ_ISA=isa) == isa


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 only")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
def test_the_instruction_sets_are_those_the_kernel_reports() -> None:
    line = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert line is not None
    flags, avx2 = set(line[1].split()), {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512bw", "avx512vl", "avx512_vnni"}
    amx = avx512 | {"avx512_bf16", "amx_tile", "amx_bf16"}
    needed = {"amx": amx, "avx512": avx512, "avx2": avx2}
    assert isas() == [*(isa for isa, flags_of in needed.items() if flags_of <= flags), "scalar"]
    assert run(OPTIQ_ISA="") == isas()[0]  # set to nothing: the fastest


def test_an_unusable_instruction_set_is_an_error() -> None:
    """One line, wherever it shows first: in an op, in the doctor, in MLX's own matmul."""
    other = next(isa for isa in ("neon", "avx512") if isa not in isas())
    doctor = [sys.executable, "-c", "import optiq.cli; exit(optiq.cli.main(['doctor']))"]
    multiply = "import optiq, mlx.core as mx; a = mx.ones((9, 9)); print((a @ a).sum())"
    cases = [([sys.executable, "-c", "import optiq; optiq.ops"], 1), (doctor, 2)]
    if sys.platform == "linux":  # elsewhere MLX has a matmul of its own
        cases.append(([sys.executable, "-c", multiply], 1))
    for command, code in cases:
        got = subprocess.run(
            command,
            env=os.environ | {"OPTIQ_ISA": other},
            capture_output=True,
            text=True,
            timeout=120,
        )
        names = ", ".join(isas())
        message = f"OPTIQ_ISA is '{other}', but optiq can use {names} here; set it to one of these"
        assert (got.returncode, got.stdout) == (code, ""), got
        assert message in got.stderr.splitlines()[-1]


def test_one_thread_and_many() -> None:
    run(OPTIQ_NUM_THREADS="1")
    run(OPTIQ_NUM_THREADS="7")
    run(OPTIQ_NUM_THREADS="1000000")  # a typing error, not an order


def test_fallback() -> None:
    assert run(OPTIQ_NATIVE="0") == "fallback"


def test_another_mlx_means_one_warning_and_the_fallback() -> None:
    code = "import mlx.core; mlx.core.__version__ = '0.31.0'" + PROBE.replace(
        'warnings.simplefilter("error")', 'warnings.simplefilter("always")'
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fallback"
    assert result.stderr.count("built for mlx") == 1
    assert (
        "built for mlx 0.32.4, but mlx 0.31.0 is loaded; pip install mlx==0.32.4" in result.stderr
    )


def test_the_version_built_for_is_the_pinned_one() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert set(re.findall(r'"mlx(?:\[cpu\])?==([\d.]+)', project)) == {native.BUILT_FOR}


def test_a_forked_child_can_multiply() -> None:
    """MLX's own matmul goes through our thread pool, whose threads a fork does not copy."""
    code = """
import ctypes, os, sys
import optiq
import numpy as np
gemm = ctypes.CDLL(None).cblas_sgemm
a = np.ones((200, 200), dtype=np.float32)
def product():
    c = np.zeros_like(a)
    p = ctypes.c_void_p
    gemm(101, 111, 111, 200, 200, 200, ctypes.c_float(1), p(a.ctypes.data), 200,
         p(a.ctypes.data), 200, ctypes.c_float(0), p(c.ctypes.data), 200)
    return (c == 200).all()
assert product()
child = os.fork()
if child == 0:
    os._exit(0 if product() else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
