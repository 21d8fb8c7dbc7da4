"""How much memory there is to spare, and how much some work takes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

# Bytes beside MLX's arrays that stay: pages that are given back cost time when they are used again.
KEPT = 400_000_000

_libc = ctypes.CDLL(None)
_limit: int | None = None


def available_memory() -> int:
    """Bytes a process can still take without swapping; on macOS, what Metal recommends at most.

    Within `limited`, no more than what is left of that limit.
    """
    free = _free_memory()
    return free if _limit is None else max(0, min(free, _limit - held_memory()))


@contextmanager
def limited(nbytes: int | None) -> Iterator[None]:
    """Within it this process is to take at most so many bytes."""
    global _limit
    before, _limit = _limit, nbytes if nbytes is not None else _limit
    try:
        yield
    finally:
        _limit = before


def held_memory() -> int:
    """Bytes that this process has in memory."""
    file = Path("/proc/self/statm")
    if not file.exists():
        return int(mx.get_active_memory())
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Give the system what was freed, if that is much: glibc keeps what lies between arrays that
    are still held. At 1.5 billion weights that was a quarter of what fitting took.
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim and held_memory() - mx.get_active_memory() > KEPT:
        trim(0)


def _free_memory() -> int:
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


@dataclass(frozen=True)
class Needs:
    """Bytes of each part of some work when it is largest; their sum bounds the peak."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {nbytes / 1e9:.2f}" for part, nbytes in self.parts.items())
        return (
            f"at most {self.total / 1e9:.2f} GB ({parts}); {available_memory() / 1e9:.1f} GB are "
            "available"
        )
