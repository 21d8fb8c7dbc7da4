"""Changes modes and times and reads links for a jailed process, in its work folder alone.

The kernel would do it to any file of the user, and Landlock does not judge it. So the call is never
let through: we take its arguments out of the process's memory, find the file below the work folder
as the kernel guarantees it (openat2, RESOLVE_BENEATH), and do it ourselves to that very file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_OPENAT2 = 437  # on both architectures
_BENEATH = 0x08 | 0x02  # RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS
_HERE = -100  # AT_FDCWD
_NO_FOLLOW = 0x100  # AT_SYMLINK_NOFOLLOW
_NOW, _OMIT = 0x3FFFFFFF, 0x3FFFFFFE
_LONGEST = 4096
_HANDLE = os.O_PATH | os.O_CLOEXEC


class OwnFiles:
    """The work folder `folder`, which a worker knows as `work`.

    Links in the folder `packages`, which the host has made, may also be read; "" stands for none.
    """

    def __init__(self, work: Path, folder: int, packages: str) -> None:
        self.folder = folder
        self._packages = os.fsencode(packages)
        self._work = os.fsencode(work)

    def carry_out(
        self, call: str, task: int, arguments: Sequence[int], valid: Callable[[], object]
    ) -> int:
        """What a call returns; OSError where it fails. `valid` raises if the caller has gone."""
        memory = os.open(f"/proc/{task}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            valid()  # so the memory is that of the caller, whose number nobody else had meanwhile
            return self._do(call, task, arguments, memory)
        except OverflowError:  # an address or a time that no machine has
            raise OSError(errno.EINVAL, "out of range") from None
        finally:
            os.close(memory)

    def _do(self, call: str, task: int, a: Sequence[int], memory: int) -> int:
        if call in ("chmod", "readlink"):  # the same without a folder's descriptor
            call, a = call + "at", [_HERE, *a]
        at = _int(a[0])
        if call == "readlinkat":
            content = self._link(task, at, a[1], memory)
            if _int(a[3]) <= 0:
                raise OSError(errno.EINVAL, "no room")
            return os.pwrite(memory, content[: _int(a[3])], a[2])
        if call == "fchmod":
            return self._chmod(self._open(task, at, 0, False, memory), a[1])
        if call in ("chmodat", "fchmodat"):
            return self._chmod(self._open(task, at, a[1], False, memory), a[2])
        no_follow = bool(a[3] & _NO_FOLLOW)
        return self._utime(self._open(task, at, a[1], no_follow, memory), a[2], memory)

    def _chmod(self, handle: int, mode: int) -> int:
        """Permissions only, and never so that the host cannot list a folder."""
        try:
            is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            os.chmod(f"/proc/self/fd/{handle}", mode & 0o777 | (0o700 if is_folder else 0))
        finally:
            os.close(handle)
        return 0

    def _utime(self, handle: int, times: int, memory: int) -> int:
        try:
            status, now = os.fstat(handle), time.time_ns()
            old = [status.st_atime_ns, status.st_mtime_ns]
            new = [now, now]
            if times:
                fields = struct.unpack("=4q", _take(memory, times, 32))
                for i, (seconds, part) in enumerate(zip(fields[::2], fields[1::2], strict=True)):
                    if part == _OMIT:
                        new[i] = old[i]
                    elif part != _NOW:
                        new[i] = seconds * 10**9 + part
            os.utime(f"/proc/self/fd/{handle}", ns=(new[0], new[1]))
        finally:
            os.close(handle)
        return 0

    def _link(self, task: int, at: int, name: int, memory: int) -> bytes:
        folder, _, package = _text(memory, name).rpartition(b"/")
        if self._packages and folder == self._packages and package not in (b"", b".", b".."):
            return os.readlink(folder + b"/" + package)
        handle = self._open(task, at, name, True, memory)
        try:
            return os.readlink(b"", dir_fd=handle)
        finally:
            os.close(handle)

    def _open(self, task: int, at: int, name: int, no_follow: bool, memory: int) -> int:
        """A handle of the file, which lies in the work folder: by descriptor, or below one."""
        path = _text(memory, name) if name else b""
        if path.startswith(b"/"):
            return self._beneath(path, no_follow)
        base = f"/proc/{task}/cwd" if at == _HERE else f"/proc/{task}/fd/{at}"
        handle = os.open(base, _HANDLE)
        try:
            place = os.readlink(f"/proc/self/fd/{handle}".encode())
            same = os.fstat(handle).st_dev == os.fstat(self.folder).st_dev
            if not same or not (place + b"/").startswith(self._work + b"/"):
                raise PermissionError(errno.EPERM, "not in the work folder")
            if not path:
                if at == _HERE:
                    raise OSError(errno.ENOENT, "no name")
                handle, opened = -1, handle
                return opened
        finally:
            if handle >= 0:
                os.close(handle)
        return self._beneath(place + b"/" + path, no_follow)

    def _beneath(self, path: bytes, no_follow: bool) -> int:
        if not (path + b"/").startswith(self._work + b"/"):
            raise PermissionError(errno.EPERM, "not in the work folder")
        inner = path[len(self._work) :].lstrip(b"/") or b"."
        flags = _HANDLE | (os.O_NOFOLLOW if no_follow else 0)
        how = struct.pack("=3Q", flags, 0, _BENEATH)
        handle = int(_libc.syscall(_OPENAT2, self.folder, inner, how, ctypes.c_size_t(len(how))))
        if handle < 0:
            code = ctypes.get_errno()
            raise OSError(errno.EPERM if code == errno.EXDEV else code, os.strerror(code))
        return handle


def _take(memory: int, address: int, size: int) -> bytes:
    data = os.pread(memory, size, address)
    if len(data) < size:
        raise OSError(errno.EFAULT, "not there")
    return data


def _text(memory: int, address: int) -> bytes:
    """A string that ends in a zero; a page at a time, since the next may not be there."""
    text = b""
    while len(text) < _LONGEST:
        room = _LONGEST - (address + len(text)) % _LONGEST
        try:
            more, zero, _ = os.pread(memory, room, address + len(text)).partition(b"\0")
        except OSError:
            raise OSError(errno.EFAULT, "not there") from None
        text += more
        if zero:
            return text
    raise OSError(errno.ENAMETOOLONG, "too long")


def _int(register: int) -> int:
    """A descriptor, mode or flags: the lower half."""
    lower = register & 0xFFFFFFFF
    return lower - 2**32 if lower >= 2**31 else lower
