"""What optiq runs on here, and what to do where it could be better."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .. import blas
from ..version import __version__

if TYPE_CHECKING:
    from ..ops.contest import Times


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` is empty where nothing needs doing."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings, without loading a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is a finding here
        import mlx.core as mx

        from ..ops import native
    from ..base.memory import available_memory

    extension = native.extension
    findings = [
        Finding("optiq", __version__, _name_clash()),
        Finding("python", sys.version.split()[0]),
        Finding("mlx", _version("mlx")),
        Finding("mlx-lm", _version("mlx-lm")),
        Finding("default device", str(mx.default_device())),
    ]
    if extension is None:
        findings.append(Finding("native kernels", "no: pure MLX is used", native.reason))
    else:
        value = f"yes: {extension.isa()}, {extension.num_threads()} threads"
        findings.append(Finding("native kernels", value, _cpu_advice(extension.isa())))
    findings += _metal()
    if sys.platform == "linux":
        findings.append(_blas())
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            advice = "MLX compiles fused operations with g++ on Linux; apt-get install g++"
            findings.append(Finding("compiler", "none", advice))
    memory = available_memory()
    findings.append(Finding("memory", f"{memory / 1e9:.1f} GB available", _memory_advice(memory)))
    return findings + _sandbox()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _name_clash() -> str:
    if _version("mlx-optiq") == "not installed":
        return ""
    return "mlx-optiq uses the same import name; pip uninstall mlx-optiq, then reinstall optiq-mlx"


def _cpu_advice(isa: str) -> str:
    if isa == "scalar":
        return "no vector instructions are used; on x86 a processor with AVX2 is 10 times faster"
    return ""


def _blas() -> Finding:
    provider = Path(blas.provider()).name
    if provider == "liboptiq_cpu.so":
        return Finding("float32 matmul of MLX", "optiq's")
    if provider:
        return Finding("float32 matmul of MLX", provider)
    advice = "50 times slower than it could be; " + (
        "unset OPTIQ_BLAS and OPTIQ_NATIVE"
        if os.environ.get("OPTIQ_BLAS") or os.environ.get("OPTIQ_NATIVE")
        else "import optiq before mlx, or preload OpenBLAS"
    )
    return Finding("float32 matmul of MLX", "reference BLAS", advice)


def _metal() -> list[Finding]:
    """Which Metal kernels run here: all that were timed against stock MLX, by `accelerate`."""
    from ..ops import contest, metal, native

    if native.device() != "metal" or native.extension is None:
        return []
    mode, timings = metal.mode(), contest.timings()
    if mode == "0":
        value, advice = "no", "OPTIQ_METAL=0 leaves them alone; unset it"
    elif mode == "1":
        value, advice = "yes, also slower ones", "OPTIQ_METAL=1 takes all; unset it"
    else:
        wins = sum(not t.slower for t in timings.known.values())
        value = f"{wins} of {len(timings.known)} timed are not slower than stock ({timings.path})"
        advice = (
            "" if timings.known else "nothing was timed yet; run: optiq generate MODEL -p hello"
        )
    return [
        Finding("metal kernels", value, advice),
        *(
            Finding("  stock" if t.slower else "  optiq", f"{work}: {_milliseconds(t)}")
            for work, t in sorted(timings.known.items())
        ),
    ]


def _milliseconds(times: Times) -> str:
    return f"{times.ours:.4g} ms, stock {times.stock:.4g} ms"


def _sandbox() -> list[Finding]:
    """What holds untrusted code at each level, found by running an empty program."""
    from ..sandbox.mechanisms import available

    return [
        Finding(f"sandbox, {a.level}", ", ".join(a.mechanisms) or "no", a.reason)
        for a in available()
    ]


def _memory_advice(available: int) -> str:
    if available > 4e9:
        return ""
    return "models above 1 billion parameters are measured with --reference uniform4"
