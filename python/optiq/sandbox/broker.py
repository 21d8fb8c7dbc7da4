"""Answers the kernel's questions about a jail.

The `counted` filter of a worker stops it at some calls and tells us. May it make one more thread
or, without a file system of its own, one more file or folder? We look at the call's number alone
and let the kernel go on or refuse, so nothing depends on memory that the worker could change. Calls
about its own files we do ourselves: see own_files.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import select
import struct
import time
from functools import partial
from pathlib import Path

from . import folder
from .jail.seccomp import ARCHITECTURES, ON_BEHALF
from .limits import Limits
from .own_files import OwnFiles

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls SECCOMP_IOCTL_NOTIF_RECV and _SEND
_VALID = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID
_QUESTION = struct.Struct("=QIIiI7Q")  # id, pid, flags, call, architecture, address, arguments
_ANSWER = struct.Struct("=QqiI")  # id, result, error, flags
_CONTINUE = 1
_PATIENCE = 0.2  # seconds for tasks to run that have been allowed something


class _Granted:
    """Tasks of process `pid` that were allowed something, which they may not have done yet."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ran: dict[int, bytes] = {}  # for how long each had run when it was allowed

    def __len__(self) -> int:
        return len(self._ran)

    def add(self, task: int) -> None:
        self._ran[task] = self._runtime(task)

    def discard(self, task: int) -> None:
        """It asks again, so it has done what it was allowed."""
        self._ran.pop(task, None)

    def settle(self) -> None:
        """Wait until each has run since, and so has done it; on a busy machine that may take."""
        patience = time.monotonic() + _PATIENCE
        while self._ran and time.monotonic() < patience:
            for task, ran in list(self._ran.items()):
                if self._runtime(task) != ran:
                    del self._ran[task]
            time.sleep(1e-3)  # also for one that is in the middle of it
        self._ran.clear()

    def _runtime(self, task: int) -> bytes:
        try:
            return Path(f"/proc/{self._pid}/task/{task}/schedstat").read_bytes().split()[0]
        except (OSError, IndexError):
            return b""


class Broker:
    """Keeps the limits on entries and threads of one worker."""

    def __init__(self, listener: int, pid: int, own: OwnFiles, limits: Limits) -> None:
        self.listener = listener
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._pid = pid
        self._own = own
        self._limits = limits
        self._making, self._opening = _Granted(pid), _Granted(pid)  # threads; files and folders
        self._left = 0  # openings to grant before the folder is looked at again
        calls = ARCHITECTURES[platform.machine()][1]
        self._clone = calls["clone"]
        self._on_behalf = {calls[name]: name for name in ON_BEHALF if name in calls}

    def answer(self) -> bool:
        """Take one question, if there is one, and answer it; False when nobody is left to ask.

        The kernel is asked for a question only where it has one: before Linux 6.11 it waits for
        ever for the question of a process that has ended (seccomp_unotify(2), BUGS).
        """
        events = next((events for _, events in self._poll.poll(0)), 0)
        if not events & select.POLLIN:
            return not events & select.POLLHUP
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, question)
        except OSError as error:
            return error.errno == errno.ENOENT  # a signal has withdrawn it
        number, task, _, call, _, _, *arguments = _QUESTION.unpack(question)
        result = refusal = flags = 0
        try:
            if call in self._on_behalf:
                valid = partial(fcntl.ioctl, self.listener, _VALID, struct.pack("=Q", number))
                result = self._own.carry_out(self._on_behalf[call], task, arguments, valid)
            else:
                refusal = self._threads(task) if call == self._clone else self._entries(task)
                flags = 0 if refusal else _CONTINUE
        except OSError as error:
            refusal = error.errno or errno.EPERM
        try:
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(number, result, -refusal, flags))
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def _threads(self, task: int) -> int:
        """A thread that was allowed is not there yet. Near the limit we wait for such ones; that of
        a task that asks again has been made."""
        self._making.discard(task)
        most = self._limits.threads
        if self._count() < most <= self._count() + len(self._making):
            self._making.settle()
        if self._count() >= most:
            return errno.EAGAIN
        self._making.add(task)
        return 0

    def _count(self) -> int:
        try:
            return os.stat(f"/proc/{self._pid}/task").st_nlink - 2  # a name could say anything
        except OSError:
            return self._limits.threads  # it is ending

    def _entries(self, task: int) -> int:
        """A grant need not make an entry: the file may be there already. So grants are dealt out,
        and when they are used up the entries are counted, once other tasks have made theirs."""
        self._opening.discard(task)
        if self._left == 0:
            self._opening.settle()
            size, entries = folder.used(self._own.folder)
            self._left = max(0, self._limits.files - entries) if size < folder.ENDLESS else 0
        if self._left == 0:
            return errno.EDQUOT
        self._left -= 1
        self._opening.add(task)
        return 0
