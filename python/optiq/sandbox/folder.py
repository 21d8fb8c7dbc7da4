"""The work folder of a run, seen from outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ..errors import UsageError

DEEPEST = 64
TOO_DEEP = 2**62
_removing = threading.Lock()
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the caller's files; a name that leads out of the folder is an error."""
    for name, data in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise UsageError(f"file name {name!r} leads out of the work folder; give a plain one")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def used(folder: Path, pid: int | None = None) -> tuple[int, int]:
    """(bytes, entries) of a folder, and of what process `pid` holds open under no name.

    One nested deeper than `DEEPEST` has more bytes than any limit.
    """
    size = entries = 0
    with contextlib.suppress(OSError):
        here = os.open(folder, _FOLDER)
        try:
            size, entries = _tally(here, DEEPEST)
        finally:
            os.close(here)
    return size + (_unlinked(pid) if pid else 0), entries


def _tally(here: int, deeper: int) -> tuple[int, int]:
    """By descriptors: a path could be too long, or lead elsewhere by the time it is used."""
    if deeper == 0:
        return TOO_DEEP, 0
    size = entries = 0
    folders = []
    with os.scandir(here) as found:
        for entry in found:
            entries += 1
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
                continue
            with contextlib.suppress(OSError):  # it may be gone by now
                size += entry.stat(follow_symlinks=False).st_blocks * 512
    for name in folders:
        with contextlib.suppress(OSError):
            below = os.open(name, _FOLDER, dir_fd=here)
            try:
                inner_size, inner_entries = _tally(below, deeper - 1)
            finally:
                os.close(below)
            size, entries = size + inner_size, entries + inner_entries
    return size, entries


def remove(folder: Path) -> None:
    """One at a time, since every level of nested folders takes a descriptor meanwhile."""
    with _removing:
        shutil.rmtree(folder, ignore_errors=True)


def _unlinked(pid: int) -> int:
    """Bytes of files that a process holds open and that have no name."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as found:
        for entry in found:
            with contextlib.suppress(OSError):
                status = entry.stat()
                size += status.st_blocks * 512 if status.st_nlink == 0 else 0
    return size
