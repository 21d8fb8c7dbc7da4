"""The work folder of a run, seen from outside and by descriptor.

A path could lead elsewhere by the time it is used, and a folder in a mount namespace of the jail's
own has no path here at all. So everything starts at an open folder and follows no link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import SandboxError, UsageError
from .limits import Limits

DEEPEST = 64  # folders in each other; an opened descriptor each while they are counted
ENDLESS = 2**62  # bytes of what cannot be counted: more than any limit
_PAGE = 4096
_GIVEN_AT = 946_684_800  # when the caller's files were last written, so that any write shows
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_removing = threading.Lock()

Mark = tuple[int, int, int, int]


@dataclass(frozen=True)
class Found:
    """A file of the work folder; `mark` changes with every write."""

    name: str
    size: int
    mark: Mark


def check(files: Mapping[str, bytes], limits: Limits) -> None:
    """UsageError for files that cannot lie in a work folder under these limits."""
    entries: set[PurePosixPath] = set()
    size = 0
    for name, data in files.items():
        if not isinstance(name, str) or not isinstance(data, (bytes, bytearray, memoryview)):
            raise UsageError(f"files are bytes by name; {name!r} has a {type(data).__name__}")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or not any(parts) or "\0" in name:
            raise UsageError(f"file name {name!r} leads out of the work folder; give a plain one")
        path = PurePosixPath(name)
        if len(path.parts) > DEEPEST or any(len(os.fsencode(p)) > 255 for p in _plain(path)):
            raise UsageError(f"file name {name[:80]!r}... is too long or too deep; shorten it")
        entries.update([path, *path.parents])
        size += -(-memoryview(data).nbytes // _PAGE) * _PAGE
    entries.discard(PurePosixPath("."))
    if size > limits.disk:
        raise UsageError(f"the files take {size} bytes of the limit disk={limits.disk}; raise it")
    if len(entries) > limits.files:
        raise UsageError(f"the files are {len(entries)} entries, above files={limits.files}")


def _plain(path: PurePosixPath) -> tuple[str, ...]:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"file name {str(path)!r} is not text; give a plain one") from None
    return path.parts


def fill(folder: int, files: Mapping[str, bytes], disk: int | None = None) -> None:
    """Write checked files, over what is there by their names; no more than `disk` bytes in all."""
    size = sum(memoryview(data).nbytes for data in files.values())
    if disk is not None and used(folder)[0] + size > disk:
        raise UsageError(f"{size} bytes more are above the limit disk={disk} of the work folder")
    for name, data in files.items():
        path = PurePosixPath(name)
        try:
            with _inside(folder, path.parts[:-1], make=True) as here:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(path.name, flags, 0o600, dir_fd=here), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.utime(file.fileno(), (_GIVEN_AT, _GIVEN_AT))
        except OSError as error:
            raise UsageError(f"file {name!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _inside(folder: int, parts: tuple[str, ...], make: bool = False) -> Iterator[int]:
    """The folder below by these names, open."""
    here = os.dup(folder)
    try:
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=here)
            below = os.open(part, _FOLDER, dir_fd=here)
            os.close(here)
            here = below
        yield here
    finally:
        os.close(here)


def read(folder: int, name: str, most: int) -> bytes:
    """Up to `most` bytes of a file; SandboxError where there is no such file."""
    path = PurePosixPath(name)
    try:
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError("the name leads out of the work folder")
        with _inside(folder, path.parts[:-1]) as here:
            return _content(here, path.name, most)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SandboxError(f"{name!r} cannot be read from the work folder: {why}") from None


def _content(here: int, name: str, most: int) -> bytes:
    with open(os.open(name, _FILE, dir_fd=here), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read(most)


def files(folder: int) -> dict[str, Found]:
    """The regular files by name; what the code made unreadable for us is left out."""
    found: dict[str, Found] = {}

    def add(here: int, prefix: str, deeper: int) -> None:
        with os.scandir(here) as entries:
            listed = sorted(entries, key=lambda e: e.name)
        for entry in listed:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and deeper:
                    below = os.open(entry.name, _FOLDER, dir_fd=here)
                    try:
                        add(below, f"{prefix}{entry.name}/", deeper - 1)
                    finally:
                        os.close(below)
                elif entry.is_file(follow_symlinks=False):
                    s = entry.stat(follow_symlinks=False)
                    mark = (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                    name = prefix + entry.name
                    found[name] = Found(name, s.st_size, mark)

    add(folder, "", DEEPEST)
    return found


def changed(
    folder: int, before: Mapping[str, Found], most: int
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """(new and changed files up to `most` bytes together, names of those left out)."""
    kept: dict[str, bytes] = {}
    left_out = []
    for name, found in files(folder).items():
        if name in before and before[name].mark == found.mark:
            continue
        if name.startswith(".") or "/." in name:  # what libraries keep for themselves
            continue
        try:
            if found.size > most:
                raise ValueError("too large")
            kept[name] = read(folder, name, found.size)
            most -= len(kept[name])
        except (SandboxError, ValueError):
            left_out.append(name)
    return kept, tuple(left_out)


def used(folder: int) -> tuple[int, int]:
    """(bytes, entries); what cannot be counted, or is deeper than `DEEPEST`, is endless."""
    return _tally(folder, DEEPEST)


def _tally(here: int, deeper: int) -> tuple[int, int]:
    if deeper == 0:
        return ENDLESS, 0
    size = entries = 0
    folders = []
    try:
        with os.scandir(here) as found:
            for entry in found:
                entries += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                    continue
                with contextlib.suppress(FileNotFoundError):  # it may be gone by now
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
        for name in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                below = os.open(name, _FOLDER, dir_fd=here)
                try:
                    inner_size, inner_entries = _tally(below, deeper - 1)
                finally:
                    os.close(below)
                size, entries = size + inner_size, entries + inner_entries
    except OSError:
        return ENDLESS, entries
    return size, entries


def unlinked(work: Path, pid: int) -> int:
    """Bytes of files that a process has open or mapped and that have no name any more."""
    held: dict[int, int] = {}
    for task in _tasks(pid):
        with contextlib.suppress(OSError), os.scandir(f"{task}/fd") as found:
            for entry in found:
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    if status.st_nlink == 0:
                        held[status.st_ino] = status.st_blocks * 512
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n"):
            fields = line.split(None, 5)
            path = fields[5] if len(fields) == 6 else b""
            if path.startswith(os.fsencode(work)) and path.endswith(b" (deleted)"):
                held.setdefault(int(fields[4]), ENDLESS)  # nobody tells the size of such a file
    return sum(held.values())


def _tasks(pid: int) -> list[str]:
    """The threads of a process: the first may have ended and show nothing of what they share."""
    with contextlib.suppress(OSError):
        return [f"/proc/{pid}/task/{name}" for name in os.listdir(f"/proc/{pid}/task")]
    return []


def remove(folder: Path) -> None:
    """One at a time, since every level of nested folders takes a descriptor meanwhile."""
    with _removing:
        for parent, names, _ in os.walk(folder):
            for path in (os.path.join(parent, name) for name in names):
                if not os.path.islink(path):  # it would lead elsewhere
                    with contextlib.suppress(OSError):
                        os.chmod(path, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
