"""Findings about this machine, and the advice where something could be better."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import optiq
from optiq import blas
from optiq.base import memory
from optiq.doctor import checks as doctor
from optiq.doctor.checks import examine
from optiq.ops import contest, native
from optiq.ops.contest import Times, Timings


def findings() -> dict[str, doctor.Finding]:
    return {f.name: f for f in examine()}


def test_versions_kernels_and_memory_are_listed() -> None:
    found = findings()
    assert found["optiq"].value == optiq.__version__ == version("optiq-mlx")
    assert found["mlx"].value == version("mlx")
    assert found["mlx-lm"].value == version("mlx-lm")
    assert found["python"].value == ".".join(map(str, sys.version_info[:3]))
    assert "cpu" in found["default device"].value or "gpu" in found["default device"].value
    assert float(found["memory"].value.split(" GB")[0]) > 0
    assert all("\n" not in f.value + f.advice for f in found.values())


def test_native_kernels_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(isa=lambda: "avx2", num_threads=lambda: 4)
    monkeypatch.setattr(native, "extension", built)
    assert findings()["native kernels"] == doctor.Finding("native kernels", "yes: avx2, 4 threads")
    monkeypatch.setattr(built, "isa", lambda: "scalar")
    assert "AVX2" in findings()["native kernels"].advice
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "reason", "built for mlx 1; pip install mlx==1")
    found = findings()["native kernels"]
    assert found.value == "no: pure MLX is used"
    assert found.advice == "built for mlx 1; pip install mlx==1"


def test_metal_kernels_that_were_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not any("metal" in name for name in findings())
    monkeypatch.setattr(native, "device", lambda: "metal")
    monkeypatch.setattr(native, "extension", SimpleNamespace(isa=lambda: "neon", num_threads=int))
    monkeypatch.delenv("OPTIQ_METAL", raising=False)
    timings = Timings(tmp_path, {"chip": "M9"})
    monkeypatch.setattr(contest, "timings", lambda: timings)
    assert "optiq generate" in findings()["metal kernels"].advice
    timings.ask("a product", lambda: Times(0.125, 0.25))
    timings.ask("another", lambda: Times(0.5, 0.25))
    found = examine()
    at = [f.name for f in found].index("metal kernels")
    file = tmp_path / "metal-M9.json"
    assert [(f.name, f.value, f.advice) for f in found[at : at + 3]] == [
        ("metal kernels", f"1 of 2 timed are not slower than stock ({file})", ""),
        ("  optiq", "a product: 0.125 ms, stock 0.25 ms", ""),
        ("  stock", "another: 0.5 ms, stock 0.25 ms", ""),
    ]
    for value in ("0", "1"):
        monkeypatch.setenv("OPTIQ_METAL", value)
        assert f"OPTIQ_METAL={value}" in findings()["metal kernels"].advice


def test_a_package_of_the_same_import_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings()["optiq"].advice == ""
    monkeypatch.setattr(doctor, "version", lambda package: "1.0")
    assert "pip uninstall mlx-optiq" in findings()["optiq"].advice


@pytest.mark.parametrize(
    ("library", "environment", "value", "advice"),
    [
        ("/x/liboptiq_cpu.so", {}, "optiq's", ""),
        ("/usr/lib/libopenblas.so.0", {}, "libopenblas.so.0", ""),
        ("", {}, "reference BLAS", "import optiq before mlx"),
        ("", {"OPTIQ_BLAS": "system"}, "reference BLAS", "unset OPTIQ_BLAS"),
    ],
)
def test_the_matmul_of_mlx_on_linux(
    monkeypatch: pytest.MonkeyPatch, library: str, environment: Any, value: str, advice: str
) -> None:
    for name in ("OPTIQ_BLAS", "OPTIQ_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(blas, "provider", lambda: library)
    found = findings()["float32 matmul of MLX"]
    assert found.value == value
    assert (advice in found.advice) if advice else found.advice == ""


def test_a_missing_compiler_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(memory, "available_memory", lambda: 1_500_000_000)
    found = findings()
    assert "g++" in found["compiler"].advice
    assert found["memory"].value == "1.5 GB available"
    assert "uniform4" in found["memory"].advice


def test_without_the_native_part_it_says_so() -> None:
    """In a process of its own, since what is loaded stays loaded."""
    code = "from optiq.cli import main; main(['doctor', '--json'])"
    environment = {**os.environ, "OPTIQ_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    found = {f["name"]: f for f in json.loads(done.stdout)}
    assert found["native kernels"]["value"] == "no: pure MLX is used"
    assert "OPTIQ_NATIVE" in found["native kernels"]["advice"]
    if sys.platform == "linux":
        assert found["float32 matmul of MLX"]["value"] != "optiq's"
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel needs another BLAS")
def test_mlx_imported_first_is_found_out() -> None:
    code = """
import mlx.core as mx
import optiq
from optiq import ops
from optiq.doctor.checks import examine
found = {f.name: f for f in examine()}["float32 matmul of MLX"]
assert found.value == "reference BLAS", found
assert "import optiq before mlx" in found.advice
assert ops.native.extension is not None
assert mx.allclose(ops.linear(mx.ones((3, 64)), mx.ones((5, 64))), mx.full((3, 5), 64.0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
