"""Answers the kernel's questions about a jail.

The `counted` filter of a worker stops it at some calls and tells us. May it make one more thread
or, without a file system of its own, one more file or folder? We look at the call's number alone
and let the kernel go on or refuse, so nothing hangs on memory that the worker could change. Calls
about its own files we do ourselves: see own_files.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import select
import struct
from functools import partial

from . import folder
from .jail.seccomp import ARCHITECTURES, ON_BEHALF
from .limits import Limits
from .own_files import OwnFiles

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls SECCOMP_IOCTL_NOTIF_RECV and _SEND
_VALID = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID
_QUESTION = struct.Struct("=QIIiI7Q")  # id, pid, flags, call, architecture, address, arguments
_ANSWER = struct.Struct("=QqiI")  # id, result, error, flags
_CONTINUE = 1


class Broker:
    """Keeps the limits on entries and threads of one worker."""

    def __init__(self, listener: int, pid: int, own: OwnFiles, limits: Limits) -> None:
        self.listener = listener
        self._pid = pid
        self._own = own
        self._limits = limits
        self._left = 0  # openings to grant before the folder is looked at again
        calls = ARCHITECTURES[platform.machine()][1]
        self._clone = calls["clone"]
        self._on_behalf = {calls[name]: name for name in ON_BEHALF if name in calls}

    def answer(self) -> bool:
        """Take one question and answer it; False when nobody is left to ask."""
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, question)
        except OSError as error:
            # Without a question a signal has withdrawn it, or there is nobody any more.
            return error.errno == errno.ENOENT and not self._alone()
        number, task, _, call, _, _, *arguments = _QUESTION.unpack(question)
        result = refusal = flags = 0
        try:
            if call in self._on_behalf:
                valid = partial(fcntl.ioctl, self.listener, _VALID, struct.pack("=Q", number))
                result = self._own.carry_out(self._on_behalf[call], task, arguments, valid)
            else:
                refusal = self._threads() if call == self._clone else self._entries()
                flags = 0 if refusal else _CONTINUE
        except OSError as error:
            refusal = error.errno or errno.EPERM
        try:
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(number, result, -refusal, flags))
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def _alone(self) -> bool:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def _threads(self) -> int:
        try:
            count = os.stat(f"/proc/{self._pid}/task").st_nlink - 2  # a name could say anything
        except OSError:
            return errno.EAGAIN  # it is ending
        return errno.EAGAIN if count >= self._limits.threads else 0

    def _entries(self) -> int:
        """A grant need not make an entry: the file may be there already. So grants are dealt out,
        and when they are used up the entries are counted."""
        if self._left == 0:
            size, entries = folder.used(self._own.folder)
            self._left = max(0, self._limits.files - entries) if size < folder.ENDLESS else 0
        if self._left == 0:
            return errno.EDQUOT
        self._left -= 1
        return 0
