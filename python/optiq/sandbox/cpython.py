"""The Python that runs in a jail: how it is started, and what it must be able to read."""

from __future__ import annotations

import mimetypes
import os
import sys
import sysconfig
import zoneinfo
from pathlib import Path

HERE = str(Path(__file__).parent)  # where the package `jail` lies

# Nothing of the caller's environment comes along. The hash seed makes runs repeatable.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "LOGNAME": "sandbox",
    "MPLBACKEND": "agg",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "1",  # else every thread reserves 64 MB of the memory limit
    "OMP_NUM_THREADS": "1",  # and no threads are there when programs are forked
    "OPENBLAS_NUM_THREADS": "1",
}


def environment(fonts: Path | None = None) -> dict[str, str]:
    """Of the processes of a jail; matplotlib, imported beforehand, keeps its list in `fonts`."""
    return {**_ENVIRONMENT, **({"MPLCONFIGDIR": str(fonts)} if fonts else {})}


def executable() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `main(*arguments)` of a module of `jail`."""
    start = (
        f"import sys; sys.path.append(sys.argv[1]); from jail.{module} import main; "
        "sys.path.pop(); main(*sys.argv[2:])"
    )
    return [executable(), "-s", "-S", "-B", "-c", start, HERE, *arguments]


def readable() -> list[str]:
    """The standard library, and the folders of the C library and of Python's own."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # no virtual environment's
    paths = {sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")}
    paths.add(sysconfig.get_config_var("DESTSHARED") or "")
    for path in _mapped():
        if Path(path).name.startswith(("libc.so", "libc-", "libpython", "ld-")):
            paths.add(str(Path(path).parent))
    paths |= {"/etc/ld.so.cache", *zoneinfo.TZPATH, *map(str, mimetypes.knownfiles)}
    return sorted({os.path.realpath(path) for path in paths if path and Path(path).exists()})


def _mapped() -> list[str]:
    """Files that this process has mapped, on Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return ["/" + line.partition("/")[2] for line in lines if "/" in line]
