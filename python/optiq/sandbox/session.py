"""Snippets in one namespace of one process, which is frozen between them."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import SandboxError, UsageError
from . import folder
from .call import CANCELLED, Call
from .child import LAST, Child
from .limits import Limits, Result, Status
from .loop import watch

_GRACE = 1.0  # seconds for an interrupted snippet to end
_FREEZE = 1.0  # seconds for threads to stop; they do within microseconds


class ProcessSession:
    """A session's process; any thread may use it, one at a time.

    Between snippets all its threads are stopped (SIGSTOP, which no process can refuse), so nothing
    is written, counted or said that no snippet is charged with. Every snippet has a nonce of the
    host's, so that what was said before it cannot be taken for its end.
    """

    def __init__(self, child: Child, limits: Limits, mechanisms: tuple[str, ...]) -> None:
        self.limits = limits
        self._mechanisms = mechanisms
        self._child = child
        self._turn = threading.Lock()  # held while descriptors of the child are used
        self._state = threading.Lock()
        self._running = False
        self._release = weakref.finalize(self, _release, child, os.getpid())
        child.gentle = True
        nonce = secrets.token_hex(16)
        child.send({"mode": "session", "nonce": nonce})
        child.begin(limits, None)
        if not watch(
            [child],
            lambda: child.over or child.said("ready", nonce) is not None,
            time.monotonic() + LAST,
        ):
            child.end("timeout", "the session does not start")
        self._freeze()

    @property
    def alive(self) -> bool:
        return not (self._child.closing or self._child.exit or self._child.reason)

    def run(self, code: str, call: Call | None = None) -> Result:
        """One snippet. At a limit of time or output it is interrupted, and killed if it goes on."""
        call = call or Call()
        limits = self._allowed(call.limits)
        with self._turn:
            if not self.alive:
                raise SandboxError("the session has ended with its process; start another")
            child = self._child
            child.begin(limits, call.on_output)
            self._mark(running=True)
            try:
                with call.cancel.attached(child):
                    ended, status, said = self._snippet(code, limits)
            finally:
                self._mark(running=False)
            return child.result(ended, self._mechanisms, status, said)

    def list(self) -> dict[str, int]:
        """The files of the work folder and their sizes."""
        with self._turn:
            return {f.name: f.size for f in folder.files(self._open()).values()}

    def read(self, name: str) -> bytes:
        with self._turn:
            return folder.read(self._open(), name, self.limits.disk)

    def write(self, files: Mapping[str, bytes]) -> None:
        folder.check(files, self.limits)
        with self._turn:
            folder.fill(self._open(), files, self.limits.disk)

    def cancel(self) -> None:
        """Interrupt the snippet that runs, if one does; from any thread."""
        with self._state:
            if self._running:
                self._child.cancelled = CANCELLED

    def close(self) -> None:
        """End the process, also while another thread waits for a snippet of it."""
        self._child.closing = True
        with self._turn:
            self._release()

    def _mark(self, running: bool) -> None:
        with self._state:
            self._running = running
            self._child.cancelled = ""

    def _open(self) -> int:
        if self._child.closing:
            raise SandboxError("the session is closed; start another")
        return self._child.folder

    def _allowed(self, limits: Limits | None) -> Limits:
        """UsageError where limits differ in what a living process cannot change."""
        if limits is None:
            return self.limits
        own = self.limits
        same = replace(limits, wall=own.wall, cpu=own.cpu, output=own.output, returned=own.returned)
        if same != own:
            raise UsageError("a snippet may have its own wall, cpu, output and returned, no more")
        return limits

    def _snippet(
        self, source: str, limits: Limits
    ) -> tuple[tuple[Status, str], int | None, Mapping[str, Any]]:
        """((status, detail), exit status where it ended by itself, what it said of its end)."""
        child = self._child
        nonce = secrets.token_hex(16)
        child.cpu_until = child.so_far().cpu + limits.cpu
        child.heed()
        if child.overdue is not None:  # it was cancelled beforehand
            return child.overdue, None, {}
        child.send({"code": source, "nonce": nonce})
        try:
            self._wait(nonce, limits.wall)
        except BaseException:  # such as Ctrl-C in the host
            child.end("cancelled", "the host was interrupted")
            raise
        said = child.said("ready", nonce)
        if said is None or child.over:
            watch([child], lambda: child.over, time.monotonic() + LAST)
            return child.reason or child.overdue or child.verdict(), child.exit_status, {}
        self._freeze()
        child.drain()
        child.look()
        if child.reason is not None:
            return child.reason, None, {}
        if child.overdue is not None:
            status, detail = child.overdue
            goes_on = f"{detail}; the snippet was interrupted, the session goes on"
            return (status, goes_on), None, {}
        code = said.get("code")
        code = code if type(code) is int and 0 <= code < 256 else 1
        return child.told(code, said), code, said

    def _wait(self, nonce: str, seconds: float) -> None:
        """Until the snippet has ended, by itself, interrupted or killed."""
        child = self._child

        def done() -> bool:
            return child.over or child.said("ready", nonce) is not None

        deadline = time.monotonic() + seconds
        child.signal(signal.SIGCONT)
        if not watch([child], lambda: done() or child.overdue is not None, deadline):
            child.stop("timeout", f"more than {seconds:g} s")
        if not done() and child.overdue is not None:
            patience = time.monotonic() + _GRACE
            begun = partial(child.said, "begun", nonce)  # before that there is nothing to interrupt
            watch([child], lambda: done() or begun() is not None, patience)
            child.signal(signal.SIGINT)
            if not watch([child], done, patience):
                child.end(*child.overdue)

    def _freeze(self) -> None:
        self._child.signal(signal.SIGSTOP)
        start = time.monotonic()
        while not self._child.frozen():
            waited = time.monotonic() - start
            if waited > _FREEZE:
                self._child.end("killed", "its threads do not stop")
                return
            time.sleep(0 if waited < 1e-3 else 1e-3)


def _release(child: Child, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of the process that the child belongs to
        child.close()
