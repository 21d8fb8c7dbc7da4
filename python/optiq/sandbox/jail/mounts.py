"""A file system of its own for every work folder, where the kernel lets an ordinary user mount one.

Its size and its number of files are limits that the kernel itself keeps, whatever happens to the
files: without a name, mapped, or in no folder that can be listed. It is gone with the process and
with the host's descriptor of it, so that there is nothing to remove.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE, _NEW_USER = 0x20000, 0x10000000
_NOSUID, _NODEV, _PRIVATE = 2, 4, (1 << 18) | (1 << 14)  # the last with all that is mounted below


def possible(place: str, inside: bool) -> bool:
    """Whether `enter` and `mount` work here: tried in a fork, which leaves nothing behind."""
    pid = os.fork()
    if pid == 0:
        try:
            enter(inside)
            mount(place, 2**20, 1)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def enter(inside: bool) -> None:
    """Become one whose forks may mount; where bubblewrap has been `inside` already, it is one."""
    user, group = os.geteuid(), os.getegid()
    if not inside:
        _check(_libc.unshare(_NEW_USER | _NEW_NAMESPACE))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(_libc.mount(None, b"/", None, _PRIVATE, None))


def mount(place: str, size: int, files: int) -> None:
    """A file system of `size` bytes and `files` entries, which this process alone sees."""
    _check(_libc.unshare(_NEW_NAMESPACE))
    options = f"size={max(size, 1)},nr_inodes={files + 1},mode=700"  # one is the folder itself
    _check(_libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", _NOSUID | _NODEV, options.encode()))


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
