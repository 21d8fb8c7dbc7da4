"""The machine and the versions that figures were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from ..version import __version__


def machine() -> dict[str, str | int | None]:
    """What a reader needs to judge a time or a memory figure."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": str(mx.default_device()),
    }


def scheduled() -> tuple[float, float]:
    """Seconds that this process's threads have run, and that they waited for a processor.

    Zeros where the system does not say (it does on Linux).
    """
    ran = waited = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread is over
            run, wait, _ = path.read_text().split()
            ran, waited = ran + int(run) / 1e9, waited + int(wait) / 1e9
    return ran, waited


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"optiq": __version__}
    for key, package in (("mlx", "mlx"), ("mlx_lm", "mlx-lm")):
        try:
            found[key] = version(package)
        except PackageNotFoundError:
            found[key] = "unknown"
    return found


def _cpu() -> str:
    if platform.system() == "Darwin":
        name = subprocess.check_output(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"])
        return name.decode().strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
