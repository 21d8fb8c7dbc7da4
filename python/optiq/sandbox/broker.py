"""Answers the kernel's questions about a jail: may it make one more file, folder or thread?

The `counted` filter of a worker stops it at such a call and tells us. We look at the call's number
alone and let the kernel go on or refuse, so nothing hangs on memory that the worker could change.
"""

from __future__ import annotations

import errno
import fcntl
import platform
import struct
from pathlib import Path

from . import folder
from .jail.seccomp import ARCHITECTURES
from .limits import Limits

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls SECCOMP_IOCTL_NOTIF_RECV and _SEND
_QUESTION = struct.Struct("=QIIiI7Q")  # id, pid, flags, call, architecture, address, arguments
_ANSWER = struct.Struct("=QqiI")  # id, result, error, flags
_CONTINUE = 1


class Broker:
    """Keeps the limits on entries and threads of one worker."""

    def __init__(self, listener: int, pid: int, work: Path, limits: Limits) -> None:
        self.listener = listener
        self._pid = pid
        self._work = work
        self._limits = limits
        self._left = 0  # openings to grant before the folder is looked at again
        self._clone = ARCHITECTURES[platform.machine()][1]["clone"]

    def answer(self) -> bool:
        """Take one question and answer it; False when nobody is left to ask."""
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, question)
        except OSError:  # who asked is no more
            return False
        number, _, _, call, *_ = _QUESTION.unpack(question)
        refusal = self._threads() if call == self._clone else self._entries()
        answer = _ANSWER.pack(number, 0, -refusal, 0 if refusal else _CONTINUE)
        try:
            fcntl.ioctl(self.listener, _SEND, answer)
        except OSError:
            return False
        return True

    def _threads(self) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        (count,) = (int(x.split()[1]) for x in status.splitlines() if x.startswith("Threads:"))
        return errno.EAGAIN if count >= self._limits.threads else 0

    def _entries(self) -> int:
        """A grant need not make an entry: the file may be there already. So grants are dealt out,
        and when they are used up the entries are counted."""
        if self._left == 0:
            _, entries = folder.used(self._work)
            self._left = max(0, self._limits.files - entries)
        if self._left == 0:
            return errno.EDQUOT
        self._left -= 1
        return 0
