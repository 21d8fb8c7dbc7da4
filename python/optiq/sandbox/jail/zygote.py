"""A Python that has given up its privileges and forks a locked-in worker for each order.

Started by the host with the number of a socket and, as JSON, a `Setup`. It never runs untrusted
code itself. An order is one packet with the work folder, the limits and the worker's descriptors:
stdout, stderr, the channel, a socket for reports and, for a candidate and its test, their common
one. Over the report socket go a handle of the worker that its host can kill it by, and at its end
how it ended and what it used; or why it could not start a worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from . import linux, mounts, wire, worker

# What programs import most, so that a worker, which inherits what is loaded, need not.
_POPULAR = ("collections", "copy", "functools", "heapq", "itertools", "math", "string", "typing")
_FIRST_FREE = 5  # descriptors a worker keeps: 0 to worker.PEER
PACKET = 2**16


@dataclass(frozen=True)
class Setup:
    """What all workers of a zygote have in common.

    They may read `readable`. `place` is where each mounts its work folder, "" where they shall use
    the folders that the host makes; `inside`: bubblewrap has made the namespaces already. `path`
    is an entry of `sys.path`, "" for none; `preload` are modules to import before the first fork.
    """

    readable: list[str]
    place: str
    inside: bool
    path: str
    preload: list[str]


def main(control: str, setup: str) -> NoReturn:
    """Serve the host until it closes."""
    host, common = socket.socket(fileno=int(control)), Setup(**json.loads(setup))
    mounting = bool(common.place) and mounts.possible(common.place, common.inside)
    if mounting:
        mounts.enter(common.inside)
    linux.drop_privileges(mounting)
    sys.path += [common.path] if common.path else []
    for name in (*_POPULAR, *common.preload):
        with contextlib.suppress(Exception):  # the program will see it
            importlib.import_module(name)
    gc.freeze()  # so that a collection in a worker copies none of these pages
    hello = {"landlock": linux.landlock_version(), "mounting": mounting}
    host.send(json.dumps(hello).encode())
    reports: dict[int, tuple[int, socket.socket]] = {}  # by handle: process id, socket
    own = os.getpid()
    poll = select.poll()
    poll.register(host.fileno(), select.POLLIN)
    while True:
        for handle, _ in poll.poll():
            if handle in reports:
                poll.unregister(handle)
                _report(handle, *reports.pop(handle))
                continue
            packet, descriptors, _, _ = socket.recv_fds(host, PACKET, 8)
            if (
                not packet
            ):  # the host has closed or is gone: this process ends, and the workers with it
                os._exit(0)
            out, err, channel, report, *peer = descriptors
            reporter = socket.socket(fileno=report)
            try:
                pid = os.fork()
                if pid == 0:
                    ends = [out, err, channel, *peer]
                    _work(own, json.loads(packet), ends, common, mounting)
                process = os.pidfd_open(pid)
            except OSError as error:  # there are too many processes or descriptors
                with reporter, contextlib.suppress(OSError):
                    reporter.send(f"{error}".encode())
                continue
            finally:
                for descriptor in (out, err, channel, *peer):
                    os.close(descriptor)
            reports[process] = (pid, reporter)
            poll.register(process, select.POLLIN)
            try:
                socket.send_fds(reporter, [b"\0"], [process])
            except OSError:  # the host is not interested any more
                os.kill(pid, signal.SIGKILL)


def _work(
    parent: int, order: dict[str, Any], descriptors: list[int], common: Setup, mounting: bool
) -> NoReturn:
    """In the fork: lock the process in, say so, and do what the host orders."""
    try:
        linux.die_with_parent(parent)
        out, err, channel, *peer = [fcntl.fcntl(d, fcntl.F_DUPFD, 100) for d in descriptors]
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in zip(
            (null, out, err, channel, *peer), range(_FIRST_FREE), strict=False
        ):
            os.dup2(source, target)
        os.closerange(_FIRST_FREE if peer else _FIRST_FREE - 1, 1 << 20)
        _lock_in(order, common, mounting)
        worker.obey()
    finally:
        os._exit(1)


def _lock_in(order: dict[str, Any], common: Setup, mounting: bool) -> None:
    work, limits = order["work"], order["limits"]
    try:
        if mounting:
            mounts.mount(work, limits["disk"], limits["files"])
            linux.drop_privileges()
        os.chdir(work)
        os.umask(0o077)
        os.environ.update(HOME=work, TMPDIR=work)
        version = linux.landlock(work, common.readable)
        linux.ask_host(worker.CHANNEL, entries=not mounting)
        linux.limit(limits)
        linux.filter_calls()
    except BaseException as error:
        wire.send(worker.CHANNEL, {"unlocked": f"{type(error).__name__}: {error}"})
        raise
    wire.send(worker.CHANNEL, {"landlock": version})


def _report(process: int, pid: int, report: socket.socket) -> None:
    """How a worker ended. A worker has no children, so its own times are all it used."""
    _, status, used = os.wait4(pid, 0)
    os.close(process)
    ended = {
        "code": os.waitstatus_to_exitcode(status),
        "cpu": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss * 1024,
    }
    with report, contextlib.suppress(OSError):
        report.send(json.dumps(ended).encode())
