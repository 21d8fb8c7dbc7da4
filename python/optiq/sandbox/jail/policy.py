"""Courtesies to honest programs: the kernel refuses what it refuses whether or not they are there.

A refusal says which rule of the sandbox it comes from, and calls that the host carries out are made
again where a signal came between, which no file system ever does to them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

_NETWORK = "the sandbox has no network"
_PROCESSES = "the sandbox starts no processes; use threads"
_FILES = "the sandbox reads Python's library and its packages, and writes in the work folder alone"
_CALLS = "the sandbox does not allow this system call"
_FULL = "the work folder of the sandbox is at its limit of bytes or of files"

_ASKED = ("chmod", "fchmod", "utime", "readlink", "mkdir", "symlink")
# By the interpreter's audit event.
RULES = {
    **dict.fromkeys(
        ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"), _NETWORK
    ),
    **dict.fromkeys(
        ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system"), _PROCESSES
    ),
    "subprocess.Popen": _PROCESSES,
    "socket.__new__": _NETWORK,
}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    rule = RULES.get(event)
    if rule and not (event == "socket.__new__" and arguments[1] in (-1, socket.AF_UNIX)):
        raise PermissionError(errno.EPERM, rule)


def install() -> None:
    """From now on what would be refused is refused with a reason, before the kernel does it."""
    sys.addaudithook(_refuse)
    for name in _ASKED:
        plain = getattr(os, name)
        patient = _patient(plain)
        setattr(os, name, patient)
        for kind in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if plain in kind:
                kind.add(patient)


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def again(*arguments: Any, **named: Any) -> Any:
        while True:
            with contextlib.suppress(InterruptedError):
                return call(*arguments, **named)

    return again


def explain(error: BaseException) -> tuple[str, str]:
    """(status, the rule, "" where the message has it already) of an uncaught exception."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return "memory", ""
        if not isinstance(cause, OSError):
            continue
        if _in_multiprocessing(cause):
            return "denied", _PROCESSES
        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "disk", _FULL
        if cause.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
            known = cause.strerror in RULES.values()
            return "denied", "" if known else _FILES if cause.filename is not None else _CALLS
        outside = not str(cause.filename).startswith(os.environ["HOME"])
        if cause.errno == errno.ENOENT and str(cause.filename).startswith("/") and outside:
            return "error", _FILES
    return "error", ""


def _in_multiprocessing(error: OSError) -> bool:
    """Its locks need shared memory, which looks like a missing file."""
    trace = error.__traceback__
    while trace is not None:
        if f"{os.sep}multiprocessing{os.sep}" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what libraries wrap in theirs: urllib in `reason`, others as the cause."""
    seen: list[BaseException] = []
    todo: list[object] = [error]
    while todo and len(seen) < 20:
        cause = todo.pop(0)
        if isinstance(cause, BaseException) and cause not in seen:
            seen.append(cause)
            yield cause
            todo += [cause.__cause__, getattr(cause, "reason", None)]
