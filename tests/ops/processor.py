"""Which instruction sets this processor has, by the system and not by our own dispatch."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from optiq.ops import native

AVX2 = {"avx2", "fma", "f16c"}
NEEDED = {"avx2": AVX2, "avx512": AVX2 | {"avx512bw", "avx512vl", "avx512_vnni"}}


def needs(isa: str) -> None:
    """Skip the test where kernels of this instruction set cannot run."""
    if native.extension is None:
        pytest.skip(f"no native kernels: {native.reason}")
    cpuinfo = Path("/proc/cpuinfo")  # of the host, under emulation
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    arm = platform.machine() in ("arm64", "aarch64")
    there = arm if isa == "neon" else not arm and NEEDED.get(isa, set()) <= flags
    if isa != "scalar" and not there:
        pytest.skip(f"this processor has no {isa}")
