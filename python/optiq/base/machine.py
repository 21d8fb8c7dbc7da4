"""The machine that figures were measured on, and how much memory it has to spare."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx


def available_memory() -> int:
    """Bytes a process can still take without swapping; on macOS, what Metal recommends at most."""
    if platform.system() == "Darwin":
        total = int(subprocess.check_output(["/usr/sbin/sysctl", "-n", "hw.memsize"]))
        return total * 3 // 4 - mx.get_active_memory()
    limits = [
        _meminfo("MemAvailable") or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ]
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        limits.append(limit - used)
    return min(limits)


def machine() -> dict[str, Any]:
    """What a reader needs to judge a time or a memory figure."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": str(mx.default_device()),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from .. import __version__

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


def _meminfo(key: str) -> int | None:
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """The integer in a cgroup file, or None when it is absent or "max"."""
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None
